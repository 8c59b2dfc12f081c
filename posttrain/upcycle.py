"""Sparse upcycling: a dense model becomes a mixture of experts with the same outputs, to be fine-tuned as one.

    python -m posttrain.upcycle recipe.yaml [key=value ...] [--dry-run]

Writes a checkpoint in Hugging Face format after comparing its logits with the dense model's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from posttrain import checkpoint
from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.progress import paths_written
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import RunDir
from posttrain.upcycle_recipe import UpcycleRecipe

PROBE = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42, and 3 * 4 = 12.\nIs that right? Yes, because "
LARGEST_GAP = 1e-4  # of a logit, float32


def run(recipe: UpcycleRecipe) -> None:
    """Load, upcycle, compare, save."""
    import torch

    from posttrain.model.load import save_policy
    from posttrain.model.upcycle import largest_gap, load_dense, upcycle

    start = time.perf_counter()
    run_dir = RunDir(recipe.run_dir)
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    dense, tokenizer = load_dense(recipe.source)
    mixture = upcycle(
        dense,
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        noise=recipe.noise,
        router_std=recipe.router_std,
        seed=recipe.seed,
    )
    gap = largest_gap(dense, mixture, torch.tensor([tokenizer(PROBE)["input_ids"]]))
    if not recipe.noise and gap > LARGEST_GAP:
        raise RunStopped(
            f"the mixture's logits differ from the dense model's by {gap:.1e}, more than {LARGEST_GAP:.0e}: this source is "
            f"not represented exactly; give another"
        )
    checkpoint.save(run_dir.checkpoints, 0, lambda path: save_policy(mixture, tokenizer, path), {}, keep=1)
    parameters = {
        "dense": sum(p.numel() for p in dense.parameters()),
        "mixture": sum(p.numel() for p in mixture.parameters()),
    }
    run_dir.write_summary(
        {
            "stage": "upcycle",
            "seconds": time.perf_counter() - start,
            "finished": True,
            "metrics": {"logit_gap_max": gap, "parameters": parameters},
        }
    )
    print(f"largest logit gap {gap:.1e}; {parameters['dense']:,} -> {parameters['mixture']:,} parameters")
    paths_written(run_dir.path, [run_dir.checkpoints / checkpoint.LATEST])


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("upcycle", run, argv)


if __name__ == "__main__":
    sys.exit(main())
