"""The page's drawings: what RL does over its steps, and how large the differences at the end are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduction.runs import Curve, curve, funnel

BLUE, ORANGE, GREEN, RED = "#1f5fa8", "#d9822b", "#3a8f4d", "#b23a48"


def draw_all(run_dir: Path, folder: Path) -> dict[str, Path]:
    """Write the SVG files of a finished run. Returns them by the letter of the table they stand under."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = {"R1-Zero": ("zero", BLUE), "cold start + RL": ("reasoning_rl", ORANGE)}
    language = {
        "from the base, off": ("zero", BLUE),
        "from the base, on": ("zero_language", GREEN),
        "from the cold start, off": ("reasoning_rl_no_language", ORANGE),
        "from the cold start, on": ("reasoning_rl", RED),
    }
    student = {"smaller base + RL": ("student_rl", BLUE), "larger base + RL": ("zero", ORANGE)}
    return {
        "a": lines(
            folder / "reproduction_zero.svg",
            {"answer length (tokens)": "completion/length_mean", "share of right answers": "reward/accuracy/mean"},
            starts,
            run_dir,
        ),
        "b": lines(
            folder / "reproduction_student.svg",
            {"answer length (tokens)": "completion/length_mean", "share of right answers": "reward/accuracy/mean"},
            student,
            run_dir,
        ),
        "d": bars(folder / "reproduction_rejection.svg", funnel(run_dir / "rejection").stages),
        "e": lines(
            folder / "reproduction_language.svg",
            {
                "share of the question's language (0 without words)": "reward/language/mean",
                "share of right answers": "reward/accuracy/mean",
            },
            language,
            run_dir,
        ),
    }


def lines(path: Path, panels: Mapping[str, str], runs: Mapping[str, tuple[str, str]], run_dir: Path) -> Path:
    """A panel for each metric, in it a line for each run.

    Args:
        path: the SVG file.
        panels: title -> metric of metrics.jsonl.
        runs: label -> (stage, colour).
        run_dir: the pipeline's.
    """
    figure, axes = _figure(len(panels))
    for axis, (title, metric) in zip(axes, panels.items(), strict=True):
        for label, (stage, colour) in runs.items():
            found = curve(run_dir / stage, metric)
            axis.plot(found.steps, _smooth(found), color=colour, label=label, linewidth=1.6)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step of RL", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return _save(figure, path)


def bars(path: Path, amounts: Sequence[tuple[str, int]]) -> Path:
    """One bar for each amount, the first on top."""
    figure, (axis,) = _figure(1)
    names = [name for name, _ in amounts]
    axis.barh(range(len(amounts)), [count for _, count in amounts], color=BLUE)
    axis.set_yticks(range(len(amounts)), names, fontsize=8)
    axis.invert_yaxis()
    for place, (_, count) in enumerate(amounts):
        axis.text(count, place, f" {count:,}", va="center", fontsize=7)
    return _save(figure, path)


def _smooth(found: Curve, window: int = 3) -> list[float]:
    """Means over the last few steps: a step's prompts are a small sample."""
    return [
        sum(found.values[max(0, place - window + 1) : place + 1])
        / len(found.values[max(0, place - window + 1) : place + 1])
        for place in range(len(found.values))
    ]


def _figure(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reproduction"  # the same figures give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.2 * count if count > 1 else 6.4, 2.9), squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
