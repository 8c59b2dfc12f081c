"""How far a pipeline is and how long it will still take: from the times of earlier runs, or from a stage's own steps.

A stage that has neither is named as unknown; nothing is guessed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.disk import write_atomically
from posttrain.pipeline_graph import Stage
from posttrain.recipe import Recipe

TIMINGS = "timings.json"  # in the pipeline's run directory; it outlives what is put aside
LINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """Seconds that are known of, and the stages of which nothing is known."""

    seconds: float
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        if not self.seconds and not self.unknown:
            return "time left: none"
        parts = [f"about {clock(self.seconds)}"] if self.seconds else []
        parts += [f"unknown for {', '.join(self.unknown)}"] if self.unknown else []
        return "time left: " + ", ".join(parts)


class Timings:
    """What stages took when they last ran to their end."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / TIMINGS
        self._known: dict[str, dict[str, float | int | None]] = {}
        if self._file.exists():
            self._known = json.loads(self._file.read_text())

    def remember(self, stage: Stage, seconds: float) -> None:
        """Keep the time of a whole run."""
        self._known[stage.name] = {"seconds": round(seconds, 1), "steps": steps_of(stage.recipe)}
        write_atomically(self._file, json.dumps(self._known, indent=2))

    def expected(self, stage: Stage) -> float | None:
        """Seconds that a whole run will take, in proportion to its steps; None when it has never run."""
        known = self._known.get(stage.name)
        if known is None or known["seconds"] is None:
            return None
        steps, before = steps_of(stage.recipe), known["steps"]
        return float(known["seconds"]) * (steps / before if steps and before else 1.0)


def steps_of(recipe: Recipe) -> int | None:
    """The steps of a stage that has them and knows how many; None otherwise."""
    training = getattr(recipe, "training", None)
    steps = getattr(recipe, "max_steps", None) or getattr(training, "max_steps", None)
    return int(steps) if steps else None


def last_step(directory: Path) -> tuple[int, float] | None:
    """The newest step that a stage has logged, and the seconds since it began to; None before the first."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            found = json.loads(line)
            return int(found["step"]), float(found["seconds"])
        except (ValueError, KeyError, TypeError):
            continue  # half written, or of a stage that does not count steps
    return None


def time_left(stages: Sequence[Stage], timings: Timings, elapsed: Mapping[str, float]) -> TimeLeft:
    """Over the stages that are still to end.

    Args:
        stages: those.
        timings: of earlier runs.
        elapsed: seconds already spent on some of them, by name.
    """
    seconds, unknown = 0.0, []
    for stage in stages:
        whole = timings.expected(stage)
        from_steps = _from_steps(stage) if stage.name in elapsed else None
        if whole is not None and whole > elapsed.get(stage.name, 0.0):
            seconds += whole - elapsed.get(stage.name, 0.0)
        elif from_steps is not None:
            seconds += from_steps
        else:
            unknown.append(stage.name)
    return TimeLeft(seconds, tuple(unknown))


def _from_steps(stage: Stage) -> float | None:
    """What a running stage's remaining steps will take at the speed of those it has done."""
    total, done = steps_of(stage.recipe), last_step(stage.directory)
    if total is None or done is None or not done[0]:
        return None
    return max(0.0, done[1] / done[0] * (total - done[0]))


class Watch:
    """Says now and then how a running stage, and with it the pipeline, gets on.

    Args:
        label: of the stage, e.g. "[2/3] grpo".
        remaining: that stage and those after it that may run.
        before: seconds that earlier attempts took of it.
    """

    def __init__(self, label: str, remaining: Sequence[Stage], timings: Timings, before: float) -> None:
        self._label, self._remaining, self._timings, self._before = label, remaining, timings, before
        self._last = time.monotonic()

    def beat(self, seconds: float) -> None:
        """Called with the seconds of this attempt."""
        if time.monotonic() - self._last < LINE_SECONDS:
            return
        self._last = time.monotonic()
        stage = self._remaining[0]
        done, total = last_step(stage.directory), steps_of(stage.recipe)
        steps = f", step {done[0]} of {total}" if done and total else ""
        spent = self._before + seconds
        left = time_left(self._remaining, self._timings, {stage.name: spent})
        start = "\r\x1b[2K" if sys.stdout.isatty() else ""  # over the bar that the stage draws
        print(f"{start}{self._label}: {clock(spent)}{steps}; {left}", flush=True)


def clock(seconds: float) -> str:
    """12s, 3m05s or 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
