"""Metrics: a number that knows how it is reduced, and the one place where a step is logged."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RunStopped
from posttrain.flight_recorder import record
from posttrain.log_file import LogFile

Reduction = Literal["mean", "sum", "max", "min", "last"]

_REDUCE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "sum": math.fsum,
    "max": lambda values: math.nan if any(math.isnan(value) for value in values) else max(values),
    "min": lambda values: math.nan if any(math.isnan(value) for value in values) else min(values),
    "last": lambda values: values[-1],
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A value and how several of its kind become one."""

    value: float
    reduction: Reduction


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Reduce metrics of the same name, from ranks or minibatches, each by its own reduction.

    Raises:
        ValueError: one name comes with two reductions.
    """
    gathered: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            gathered.setdefault(name, []).append(metric)
    merged = {}
    for name, metrics in gathered.items():
        reductions = {metric.reduction for metric in metrics}
        if len(reductions) > 1:
            raise ValueError(f"metric {name!r} is reduced in two ways, {sorted(reductions)}; choose one")
        reduction = metrics[0].reduction
        merged[name] = Metric(_REDUCE[reduction]([metric.value for metric in metrics]), reduction)
    return merged


def lines_until(path: Path, step: int | None) -> list[str]:
    """The lines of a log, one JSON object each with its `step`, that a run which goes on after this step keeps.

    None where a run begins anew (`step` is None) or there is no such file. A crash may have torn the last line: without its
    newline it is not kept.
    """
    if step is None or not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]


class LogReader:
    """Reads logs of JSON lines that grow: each time only what is new. Safe for several threads."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, bytes, list[dict[str, Any]]]] = {}  # bytes read, the last line's, lines
        self._lock = threading.Lock()

    def read(self, path: Path) -> list[dict[str, Any]]:
        """All whole lines of a log so far; of one that was written anew, those that it has now. Empty without a file."""
        with self._lock:
            if not path.exists():
                return []
            done, last, lines = self._known.get(path, (0, b"", []))
            with path.open("rb") as file:
                file.seek(done - len(last))
                if file.read(len(last)) != last:  # a run that went on from an earlier step has written it anew
                    done, last, lines = 0, b"", []
                    file.seek(0)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            found = whole.splitlines(keepends=True)
            lines = [*lines, *map(json.loads, found)]
            self._known[path] = (done + len(whole), found[-1] if found else last, lines)
            return lines


OFFLINE = {"wandb": "set WANDB_MODE=offline to keep the run on disk, or leave wandb out"}


class MetricsLog:
    """metrics.jsonl, one object per step, and the trackers that the recipe names.

    Args:
        run_dir: where metrics.jsonl is.
        report_to: "tensorboard", "wandb", "trackio".
        resume_step: go on after this step, dropping lines of later steps; None starts a new file.

    Raises:
        RunStopped: a tracker's package is not installed, or it does not start, e.g. for want of a key.
    """

    def __init__(self, run_dir: Path, report_to: Sequence[str] = (), resume_step: int | None = None) -> None:
        path = run_dir / "metrics.jsonl"
        kept = lines_until(path, resume_step)
        self._before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self._file = LogFile(path, kept)
        self._start = time.perf_counter()
        self._trackers = [_tracker(name, run_dir) for name in report_to]

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Write one step. A value that is not finite is written as null: JSON has no NaN.

        On a full disk the line waits for the next one.
        """
        values = {name: metric.value for name, metric in sorted(metrics.items())}
        seconds = self._before + time.perf_counter() - self._start
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record("step", step=step, seconds=round(seconds, 3), metrics=values)
        self._file.append(json.dumps({"step": step, "seconds": round(seconds, 3), **finite}))
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Write what waits, and let the trackers write what they still hold."""
        self._file.flush()
        for tracker in self._trackers:
            tracker.close()


@dataclass(frozen=True, slots=True)
class _Tracker:
    """An experiment tracker: what to call with a step and its values, and at the end."""

    log: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


def _tracker(name: str, run_dir: Path) -> _Tracker:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_dir / "tensorboard"))

            def write(step: int, values: dict[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            return _Tracker(write, writer.close)
        tracker = importlib.import_module(name)  # wandb, or trackio, which has the same calls
        place = {"dir": str(run_dir)} if name == "wandb" else {}
        run = tracker.init(project="posttrain", name=run_dir.name, **place)
        return _Tracker(lambda step, values: run.log(values, step=step), run.finish)
    except ModuleNotFoundError as error:
        raise RunStopped(f"report_to: {name} needs the package {error.name}; install it or leave {name} out") from error
    except (
        Exception
    ) as error:  # a service's client: no key, no network, no right to write, each with a class of its own
        raise RunStopped(
            f"report_to: {name} does not start: {error}; {OFFLINE.get(name, f'or leave {name} out')}"
        ) from error
