"""report.html: one self-contained page of a run, or of several side by side.

    python -m eval.report runs/a [runs/b ...] [--out FILE] [--max-samples N]

The page needs nothing but itself: curves, evaluations, samples and the code that shows them are all in the file, and it never
asks the network for anything. What a model wrote is only ever put into it as data (see eval/report_page.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report_page import render
from eval.report_run import read_run, stage_directories
from eval.report_samples import Budget, SampleBlock, other_files, read_samples, sample_files
from posttrain.disk import write_atomically


def write_report(run_dir: Path, budget: Budget | None = None) -> Path:
    """Write report.html of a stage's run directory, or of a pipeline's with its stages' directories in it."""
    path = run_dir / "report.html"
    directories = stage_directories(run_dir)
    kind = "run" if directories == [run_dir] else "pipeline"
    write_atomically(path, page_of(run_dir.name, kind, directories, budget or Budget()))
    return path


def write_comparison(run_dirs: Sequence[Path], path: Path, budget: Budget | None = None) -> Path:
    """Write one page with several runs in it; of a pipeline, its stages."""
    directories = [directory for run_dir in run_dirs for directory in stage_directories(run_dir)]
    title = " and ".join(labels(run_dirs))
    write_atomically(path, page_of(title, "comparison", directories, budget or Budget()))
    return path


def page_of(title: str, kind: str, directories: Sequence[Path], budget: Budget, *, is_live: bool = False) -> str:
    """The page as HTML.

    Args:
        title: what it is called.
        kind: "run", "pipeline" (stages one after the other) or "comparison" (runs side by side).
        directories: run directories of stages.
        budget: what is embedded at most, shared by them.
        is_live: whether the page asks its server for what is new (see posttrain/watch.py).
    """
    share = budget.among(sum(bool(sample_files(directory / "samples")) for directory in directories))
    names = labels(directories)
    runs: list[dict[str, Any]] = []
    chunks: dict[str, object] = {}
    for number, (directory, name) in enumerate(zip(directories, names, strict=True)):
        samples = read_samples(directory / "samples", share)
        run = {
            **read_run(directory),
            "name": name,
            "samples": samples.total,
            "others": other_files(directory / "samples"),
        }
        run["blocks"] = add_blocks(chunks, number, samples.blocks)
        runs.append(run)
    return render(title, {"index": {"title": title, "kind": kind, "runs": runs}, **chunks}, is_live=is_live)


def add_blocks(chunks: dict[str, object], run: int, blocks: Sequence[SampleBlock], first: int = 0) -> list[str]:
    """Put sample blocks among the chunks of a page. Returns their names."""
    names = []
    for number, block in enumerate(blocks, start=first):
        name = f"{run}-{number}"
        chunks |= {f"rows-{name}": block.rows, f"texts-{name}": block.texts, f"tokens-{name}": block.tokens}
        names.append(name)
    return names


def labels(directories: Sequence[Path]) -> list[str]:
    """The shortest names that tell the directories apart: their last parts, and as many before as it takes."""
    for length in range(1, 8):
        names = ["/".join(directory.absolute().parts[-length:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what is no run directory."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description="write report.html of one run or several"
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="the file; default: report.html in the run, or comparison.html here")
    parser.add_argument("--max-samples", type=int, default=Budget().samples, help="completions embedded (%(default)s)")
    options = parser.parse_args(argv)
    if options.max_samples < 0:
        parser.error(f"--max-samples {options.max_samples}: give 0 or more")
    budget = Budget(samples=options.max_samples)
    try:
        if len(options.runs) == 1 and options.out is None:
            path = write_report(options.runs[0], budget)
        else:
            path = write_comparison(options.runs, options.out or Path("comparison.html"), budget)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {path.absolute()} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
