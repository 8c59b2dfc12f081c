"""What a person sees: a bar on a terminal, a line now and then elsewhere, a table and paths at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from posttrain.flight_recorder import record
from posttrain.metrics import Metric

SECONDS_BETWEEN_LINES = 10.0

# What is shown of a step, in this order, if it is among the metrics: name, label, format.
SHOWN = (
    ("reward/mean", "reward", ".3f"),
    ("audit/verifier_mean", "verified", ".3f"),
    ("train/loss", "loss", ".3f"),
    ("train/accuracy", "accuracy", ".3f"),
    ("completion/length_mean", "length", ".1f"),
    ("parity/logprob_abs_max", "parity", ".1e"),
    ("throughput/tokens_per_second", "tok/s", ",.0f"),
)


class Progress:
    """Context manager around a stage's loop."""

    def __init__(self, stage: str, total_steps: int | None) -> None:
        self._stage = stage
        self._console = Console()
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(stage, total=total_steps, shown="")
        self._total = total_steps
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def set_total(self, total_steps: int) -> None:
        """For loops that learn their length after they have started."""
        self._total = total_steps
        self._bar.update(self._task, total=total_steps)

    def update(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Show a finished step."""
        shown = "  ".join(f"{label} {metrics[name].value:{form}}" for name, label, form in SHOWN if name in metrics)
        self._bar.update(self._task, completed=step, shown=shown)
        now = time.perf_counter()
        self._first = self._first or (step, now)
        is_due = now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total
        if not self._console.is_terminal and is_due:
            self._last_line = now
            print(f"{self._stage} {step}/{self._total}  {shown}{self._time_left(step, now)}", flush=True)

    def note(self, text: str) -> None:
        """Say something beside the bar, and in the log."""
        record("note", text=text)
        self._console.print(text, style="yellow", markup=False, highlight=False)

    def _time_left(self, step: int, now: float) -> str:
        assert self._first is not None
        done = step - self._first[0]
        if not done or self._total is None:
            return ""
        seconds = (now - self._first[1]) / done * (self._total - step)
        return f"  {seconds // 60:.0f}m{seconds % 60:02.0f}s left"


def before_after_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Evaluations side by side: a row per kind of problem, a column per moment.

    Args:
        results: moment -> `EvalResult.to_dict()`.
    """
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("")
    for moment in results:
        table.add_column(moment, justify="right")
    rows = {"pass@1 (sampled)": "pass_at_1", "greedy": "greedy"}
    for label, key in rows.items():
        cells = [result.get(key) for result in results.values()]
        if any(cells):
            table.add_row(label, *[_interval(cell) for cell in cells])
    for kind in dict.fromkeys(kind for result in results.values() for kind in result["by_level"]):
        table.add_row(f"  {kind}", *[_interval(result["by_level"].get(kind)) for result in results.values()])
    table.add_row("answer length", *[f"{result['completion_length_mean']:.1f}" for result in results.values()])
    Console().print(table)


def _interval(estimate: Mapping[str, float] | None) -> str:
    if not estimate:
        return "-"
    return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}] n={estimate['n']}"


def paths_written(run_dir: Path, paths: Sequence[Path]) -> None:
    """Where the results are."""
    print(f"written: {run_dir.resolve()}")
    for path in paths:
        print(f"  {path.resolve() if path.suffix else path.absolute()}")
