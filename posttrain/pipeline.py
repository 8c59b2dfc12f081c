"""Stages in order, each in a process of its own; what is finished is not run again.

    python -m posttrain.pipeline recipe.yaml [key.path=value ...] [--dry-run]

A stage runs in `<run directory>/<stage name>`. It counts as finished when its summary says so and its recipe is the same
as before; a stage that was cut short goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from eval.report import write_report
from posttrain import checkpoint
from posttrain.cli import run_stage
from posttrain.progress import before_after_table, paths_written
from posttrain.recipe import PipelineRecipe, Recipe
from posttrain.recipe_file import dump_recipe, module_of, stage_overrides, stage_recipe
from posttrain.run_dir import RunDir


def run(recipe: PipelineRecipe) -> int:
    """Run the stages. Returns 0, or the exit code of the first stage that did not end well."""
    run_dir = RunDir(recipe.run_dir)
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    start = time.perf_counter()
    summaries: dict[str, Any] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        directory = run_dir.path / stage.name
        stage_of_run = stage_recipe(stage, run_dir.path)
        state = progress_of(directory, stage_of_run)
        print(f"[{number}/{len(recipe.stages)}] {stage.name}: {state}", flush=True)
        if state != "finished":
            words = [stage.recipe, *stage_overrides(stage, run_dir.path), *(["--resume"] if state == "resumed" else [])]
            code = run_process(module_of(stage_of_run.stage), words)
            if code:
                return code
        summaries[stage.name] = read_summary(directory)
    run_dir.write_summary(
        {"stage": "pipeline", "seconds": time.perf_counter() - start, "finished": True, "stages": summaries}
    )
    report = write_report(run_dir.path)
    show(summaries)
    paths_written(run_dir.path, [run_dir.path / recipe.stages[-1].name / "checkpoints" / checkpoint.LATEST, report])
    return 0


def progress_of(directory: Path, recipe: Recipe) -> str:
    """What to do about a stage: "finished" (nothing), "resumed" or "started"."""
    recipe_file = directory / "recipe.yaml"
    if not recipe_file.exists() or recipe_file.read_text() != dump_recipe(recipe):
        return "started"
    if (directory / "summary.json").exists() and read_summary(directory)["finished"]:
        return "finished"
    return "resumed" if checkpoint.newest_trained(directory / "checkpoints") else "started"


def run_process(module: str, arguments: Sequence[str]) -> int:
    """Run a stage as `python -m module arguments`, passing on the signals that should stop it."""
    # A session of its own, so that a Ctrl-C reaches the stage once, through us, and not twice.
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], start_new_session=True)

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def show(summaries: dict[str, Any]) -> None:
    """The evaluations of all stages in one table."""
    before_after_table(
        {
            f"{name}, {moment}": result
            for name, summary in summaries.items()
            for moment, result in summary.get("eval", {}).items()
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("pipeline", run, argv)


if __name__ == "__main__":
    sys.exit(main())
