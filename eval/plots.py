"""Figures for papers: the report's curves and router map as files.

    python -m eval.plots runs/a [runs/b ...] --out figures/ [--format png|svg|pdf ...] [--smoothing 0.6] [--only reward,router]

A file for each figure. Several runs are lines of the same figure; of a pipeline, its stages.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report import labels
from eval.report_run import read_run, stage_directories

FORMATS = ("png", "svg", "pdf")
WIDTH, HEIGHT = 4.2, 2.8  # inches: a column of a paper with two
DPI = 200


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: what it is called, its vertical axis, and the metrics in it."""

    name: str
    axis: str
    metrics: tuple[str, ...]  # patterns of whole names; a group in brackets is the line's label
    logarithmic: bool = False


FIGURES = (
    Figure("reward", "reward", (r"reward/(mean)", r"reward/(.+)/mean")),
    Figure("pass_at_1", "pass@1", (r"eval/pass_at_1",)),
    Figure("loss", "loss", (r"train/loss", r"validation/loss")),
    Figure("length", "completion length (tokens)", (r"completion/length_mean",)),
    Figure("entropy", "entropy (nats)", (r"policy/entropy", r"train/entropy")),
    Figure("kl", "KL to the reference (nats)", (r"policy/kl_ref",)),
    Figure("parity", "sampler/learner gap (nats)", (r"parity/logprob_abs_(max)", r"parity/logprob_abs_(mean)"), True),
    Figure("max_violation", "MaxVio", (r"router/(max_violation)", r"router/(layer_\d+)/max_violation")),
    Figure("lag", "lag (versions)", (r"lag/(max)", r"lag/(mean)")),
    Figure("phases", "seconds per step", (r"time/(.+)",)),
    Figure("throughput", "tokens per second", (r"throughput/tokens_per_second",)),
)
ROUTER = "router"


def smooth(values: Sequence[float | None], factor: float) -> list[float]:
    """Exponential moving average without a bias towards zero; nan where there is no value.

    Args:
        values: of a metric.
        factor: 0 leaves them as they are, nearly 1 flattens them.
    """
    total = weight = 0.0
    found = []
    for value in values:
        if value is None:
            found.append(math.nan)
            continue
        total, weight = factor * total + (1 - factor) * value, factor * weight + 1 - factor
        found.append(total / weight)
    return found


def lines_of(figure: Figure, runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float], list[float | None]]]:
    """Label, steps and values of each line of a figure: metrics that were logged at two steps at least."""
    found = []
    for run in runs:
        metrics: Mapping[str, list[float | None]] = run["metrics"]
        for pattern in figure.metrics:
            for name, values in metrics.items():
                match = re.fullmatch(pattern, name)
                drawable = [v for v in values if v is not None and (v > 0 or not figure.logarithmic)]
                if match and len(drawable) > 1:
                    label = " ".join(
                        [run["name"]] * (len(runs) > 1) + [group.replace("_", " ") for group in match.groups()]
                    )
                    found.append((label, [float(step or 0) for step in metrics["step"]], values))
    return found


def draw_all(
    directories: Sequence[Path],
    out: Path,
    *,
    formats: Sequence[str] = ("png", "svg"),
    smoothing: float = 0.0,
    only: Sequence[str] = (),
) -> list[Path]:
    """Write the figures of runs that there are data for.

    Args:
        directories: of stages.
        out: directory of the files; made if need be.
        formats: of each figure.
        smoothing: see `smooth`; what is smoothed is drawn faintly beneath.
        only: names of figures; none are all.

    Returns:
        The files.

    Raises:
        ValueError: an unknown figure, format or smoothing.
    """
    known = [figure.name for figure in FIGURES] + [ROUTER]
    for given, allowed, what in ((only, known, "figure"), (formats, FORMATS, "format")):
        wrong = [name for name in given if name not in allowed]
        if wrong:
            raise ValueError(f"unknown {what} {wrong[0]!r}; choose from {', '.join(allowed)}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing:g}: give 0 to 0.99")
    names = labels(directories)
    runs = [{**read_run(directory), "name": name} for directory, name in zip(directories, names, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in FIGURES:
        lines = lines_of(figure, runs)
        if lines and (not only or figure.name in only):
            written += _save(_curves(figure, lines, smoothing), out / figure.name, formats)
    for run in runs:
        if run["router"] and (not only or ROUTER in only):
            suffix = f"_{run['name'].replace('/', '_')}" if len(runs) > 1 else ""
            written += _save(_router_map(run["router"]), out / f"{ROUTER}{suffix}", formats)
    return written


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
    return canvas, canvas.add_subplot()


def _curves(figure: Figure, lines: Sequence[tuple[str, list[float], list[float | None]]], smoothing: float) -> Any:
    canvas, axes = _axes()
    for label, steps, values in lines:
        (line,) = axes.plot(steps, smooth(values, smoothing), label=label, linewidth=1.3)
        if smoothing:
            axes.plot(steps, smooth(values, 0.0), color=line.get_color(), alpha=0.25, linewidth=0.8)
    if figure.logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=figure.axis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    return canvas


def _router_map(router: Mapping[str, Any]) -> Any:
    """The last step: layers down, experts along."""
    import numpy as np

    load = np.array(router["load"][-router["layers"] * router["experts"] :]).reshape(
        router["layers"], router["experts"]
    )
    canvas, axes = _axes()
    picture = axes.imshow(load, cmap="coolwarm", vmin=0, vmax=200, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"step {router['steps'][-1]}")
    axes.set_yticks(range(0, router["layers"], max(1, router["layers"] // 8)))
    canvas.colorbar(picture, label="load, % of an even share", extend="max")
    return canvas


def _save(canvas: Any, stem: Path, formats: Sequence[str]) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in formats]
    for path in paths:
        canvas.savefig(path, dpi=DPI)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what cannot be drawn."""
    parser = argparse.ArgumentParser(prog="python -m eval.plots", description="curves and router map of runs as files")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="directory of the files (default %(default)s)"
    )
    parser.add_argument("--format", nargs="+", default=["png", "svg"], help=f"some of {', '.join(FORMATS)}")
    parser.add_argument("--smoothing", type=float, default=0.0, help="0 (none) to 0.99")
    parser.add_argument("--only", default="", help="names of figures, with commas between")
    options = parser.parse_args(argv)
    try:
        directories = [directory for run in options.runs for directory in stage_directories(run)]
        only = [name for name in options.only.split(",") if name]
        paths = draw_all(directories, options.out, formats=options.format, smoothing=options.smoothing, only=only)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"written: {options.out.absolute()}: {', '.join(path.name for path in paths) or 'nothing, no metric was logged twice'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
