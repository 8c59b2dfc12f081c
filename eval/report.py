"""report.html: one self-contained page with the curves, the evaluation table and samples to browse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

# What is drawn, if it was logged: metric, title, logarithmic.
CURVES = (
    ("reward/mean", "reward", False),
    ("eval/pass_at_1", "pass@1 on held-out problems", False),
    ("train/loss", "loss", False),
    ("completion/length_mean", "completion length (tokens)", False),
    ("policy/entropy", "entropy (nats)", False),
    ("policy/kl_ref", "KL to the reference (nats)", False),
    ("policy/clip_fraction", "clipped tokens (share)", False),
    ("parity/logprob_abs_max", "sampler/learner gap (nats, log scale)", True),
    ("router/max_violation", "MaxVio of the experts' load", False),
    ("throughput/tokens_per_second", "generated tokens per second", False),
)
WIDTH, HEIGHT = 320, 110
ROWS_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps, ready to draw."""

    title: str
    points: str  # of an SVG polyline
    first: str
    last: str
    lowest: str
    highest: str


def write_report(run_dir: Path) -> Path:
    """Write report.html of a stage's run directory, or of a pipeline's with its stages' directories in it."""
    summary = json.loads((run_dir / "summary.json").read_text())
    directories = [run_dir / name for name in summary["stages"]] if "stages" in summary else [run_dir]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=run_dir.name, width=WIDTH, height=HEIGHT, stages=[_stage(directory) for directory in directories]
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def curve(title: str, steps: Sequence[float], values: Sequence[float], *, logarithmic: bool) -> Curve | None:
    """Scale a series into the drawing; None when fewer than two finite points are left."""
    kept = [
        (step, math.log10(value) if logarithmic else value, value)
        for step, value in zip(steps, values, strict=True)
        if value is not None and math.isfinite(value) and (value > 0 or not logarithmic)
    ]
    if len(kept) < 2:
        return None
    low, high = min(y for _, y, _ in kept), max(y for _, y, _ in kept)
    start, end = kept[0][0], kept[-1][0]
    points = " ".join(
        f"{(step - start) / (end - start) * WIDTH:.1f},{HEIGHT - (y - low) / ((high - low) or 1) * HEIGHT:.1f}"
        for step, y, _ in kept
    )
    raw = [value for *_, value in kept]
    return Curve(title, points, *(f"{value:.3g}" for value in (raw[0], raw[-1], min(raw), max(raw))))


def _stage(directory: Path) -> dict[str, Any]:
    metrics_file = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()] if metrics_file.exists() else []
    curves = []
    for name, title, logarithmic in CURVES:
        logged = [line for line in lines if name in line]
        drawn = curve(
            title, [line["step"] for line in logged], [line[name] for line in logged], logarithmic=logarithmic
        )
        if drawn is not None:
            curves.append(drawn)
    return {
        "name": directory.name,
        "summary": json.loads((directory / "summary.json").read_text()),
        "recipe": (directory / "recipe.yaml").read_text(),
        "curves": curves,
        "samples": _samples(directory / "samples"),
    }


def _samples(directory: Path) -> list[dict[str, Any]]:
    """Some completions of the first and the last step, or of the evaluations or a teacher where nothing was rolled out."""
    kinds = ("step-*.parquet", "eval-*.parquet", "generations.parquet")
    files = next((found for kind in kinds if (found := sorted(directory.glob(kind)))), [])
    chosen = files[:1] + files[1:][-1:]
    return [{"title": file.stem, "rows": _first_rows(file)} for file in chosen]


def _first_rows(file: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        batch = next(parquet.iter_batches(batch_size=ROWS_SHOWN), None)
        return [] if batch is None else batch.to_pylist()
