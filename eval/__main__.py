"""Evaluate one checkpoint.

python -m eval recipe.yaml [model.model_name_or_path=...] [--dry-run]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from eval.checkpoint import evaluate_checkpoint
from eval.report import write_report
from posttrain.cli import run_stage
from posttrain.progress import before_after_table, paths_written
from posttrain.recipe import EvalRecipe
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import RunDir


def run(recipe: EvalRecipe) -> int:
    """Evaluate and write summary, samples and report."""
    start = time.perf_counter()
    run_dir = RunDir(recipe.run_dir)
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    result = evaluate_checkpoint(recipe.model, recipe.eval, recipe.sampler)
    run_dir.write_eval_samples("eval", result)
    summary = {
        "stage": "eval",
        "seconds": time.perf_counter() - start,
        "finished": True,
        "eval": {"eval": result.to_dict()},
    }
    run_dir.write_summary(summary)
    before_after_table({recipe.run_name or "eval": result.to_dict()})
    paths_written(run_dir.path, [write_report(run_dir.path)])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("eval", run, argv)


if __name__ == "__main__":
    sys.exit(main())
