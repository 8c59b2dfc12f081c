"""A run in the terminal: how far it is, its last numbers, and how they went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eval.report_run import read_run, stage_directories
from posttrain.metrics import LogReader

SECONDS = 2.0
LEVELS = "▁▂▃▄▅▆▇█"
POINTS = 40  # of a line of bars
WINDOW = 10  # steps of a mean

# What is shown, if it was logged: metric, label.
SHOWN = (
    ("reward/mean", "reward"),
    ("train/loss", "loss"),
    ("eval/pass_at_1", "pass@1"),
    ("completion/length_mean", "length (tokens)"),
    ("completion/truncated_fraction", "truncated"),
    ("groups/with_signal", "groups with signal"),
    ("policy/entropy", "entropy (nats)"),
    ("policy/kl_ref", "KL to the reference"),
    ("parity/logprob_abs_max", "sampler/learner gap"),
    ("router/max_violation", "MaxVio"),
    ("lag/max", "lag (versions)"),
    ("optim/grad_norm", "gradient norm"),
    ("throughput/tokens_per_second", "tokens/s"),
)


def watch_terminal(run_dir: Path, *, once: bool = False) -> None:
    """Show a run, or the stages of a pipeline, until it is finished or Ctrl-C."""
    console, logs = Console(), LogReader()
    if once:
        console.print(view(run_dir, logs))
        return
    with Live(view(run_dir, logs), console=console, auto_refresh=False) as live:
        while not is_finished(run_dir, logs):
            time.sleep(SECONDS)
            live.update(view(run_dir, logs), refresh=True)


def is_finished(run_dir: Path, logs: LogReader) -> bool:
    """Whether the run, of a pipeline all of it, wrote its summary."""
    return (run_dir / "summary.json").exists() and all(
        read_run(directory, logs.read)["finished"] is not None for directory in stage_directories(run_dir)
    )


def view(run_dir: Path, logs: LogReader) -> Group:
    """A panel for each stage that has begun."""
    return Group(*(_panel(directory, read_run(directory, logs.read)) for directory in stage_directories(run_dir)))


def _panel(directory: Path, run: Mapping[str, Any]) -> Panel:
    metrics: Mapping[str, Sequence[float | None]] = run["metrics"]
    table = Table(box=None, pad_edge=False)
    for title in ("", "last", f"mean of {WINDOW}"):
        table.add_column(title, justify="right" if title else "left")
    table.add_column("so far", no_wrap=True)
    for name, label in SHOWN:
        values = [value for value in metrics.get(name, ()) if value is not None]
        if values:
            recent = values[-WINDOW:]
            table.add_row(label, f"{values[-1]:.4g}", f"{sum(recent) / len(recent):.4g}", bars(values))
    parts: list[Any] = [Text(_headline(run)), table]
    phases = _phases(metrics)
    if phases:
        parts.append(Text(f"last step: {phases}"))
    parts += [Text(f"audit, step {alarm['step']}: {alarm['alarm']}", style="red") for alarm in run["alarms"][-3:]]
    return Panel(Group(*parts), title=Text(f"{directory.name} ({run['stage']})"), title_align="left")


def _headline(run: Mapping[str, Any]) -> str:
    step, total, seconds = run["steps"], run["max_steps"], run["seconds"]
    head = f"step {step}" + (f" of {total}" if total else "") + f", {seconds / 60:.1f} min"
    if run["finished"] is not None:
        return head + (", finished" if run["finished"] else ", ended early")
    if total and step:
        head += f", about {seconds / step * (total - step) / 60:.1f} min left"
    return head


def _phases(metrics: Mapping[str, Sequence[float | None]]) -> str:
    found = {name.removeprefix("time/"): values[-1] for name, values in metrics.items() if name.startswith("time/")}
    return ", ".join(f"{name} {value:.2f} s" for name, value in found.items() if value is not None)


def bars(values: Sequence[float], width: int = POINTS) -> str:
    """A line of bars: the values, or the means of as many neighbours as it takes to be no wider than `width`."""
    size = max(1, -(-len(values) // width))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    least, most = min(means), max(means)
    if most == least:
        return LEVELS[0] * len(means)
    return "".join(LEVELS[round((mean - least) / (most - least) * (len(LEVELS) - 1))] for mean in means)
