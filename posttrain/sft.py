"""Supervised fine-tuning with TRL's SFTTrainer: assistant tokens only, several samples packed per row.

    python -m posttrain.sft recipe.yaml [key.path=value ...] [--dry-run] [--resume]

As for DeepSeek-V3 (section 5.1): samples packed in one row cannot see each other, the learning rate falls along a cosine
from `optimizer.learning_rate` to `optimizer.min_learning_rate`, and the router's correction bias may go on balancing the
experts. The policy is a checkpoint, or a tiny DeepSeek-V3 built with random weights (`model.build`).

What is ours plugs into the trainer through its public doors: the dataset, the collator and callbacks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.checkpoint import evaluate_checkpoint
from eval.report import write_report
from eval.suite import EvalResult
from posttrain import checkpoint
from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.interrupt import StopRequest, graceful_stop
from posttrain.metrics import MetricsLog
from posttrain.progress import Progress, before_after_table, paths_written
from posttrain.recipe import SftRecipe
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import RunDir

if TYPE_CHECKING:
    from trl import SFTTrainer


def run(recipe: SftRecipe, *, resume: bool = False) -> int:
    """Train as the recipe says. Returns the exit code: 0, or 130 when a signal ended the run early."""
    start = time.perf_counter()
    run_dir = RunDir(recipe.run_dir)
    if not resume:
        checkpoint.require_fresh(run_dir.checkpoints)
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    origin = starting_checkpoint(recipe, run_dir, resume=resume)
    before = evaluation(recipe, origin) if not resume else None
    with graceful_stop() as stop:
        trainer = train(recipe, run_dir, origin, stop, resume=resume)
    saved = save(recipe, run_dir, trainer)
    after = None if stop else evaluation(recipe, saved)
    finish(recipe, run_dir, trainer, before, after, time.perf_counter() - start)
    return 130 if stop else 0


def starting_checkpoint(recipe: SftRecipe, run_dir: RunDir, *, resume: bool) -> Path:
    """The checkpoint to start from; a new policy is built and saved first, so that every engine can load it."""
    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, save_policy

    if recipe.model.build is None:
        return Path(str(recipe.model.model_name_or_path))
    built = run_dir.checkpoints / "step-0"
    if resume and built in checkpoint.whole(run_dir.checkpoints):
        return built
    tokenizer = build_tokenizer()
    policy = build_policy(recipe.model.build.model_dump(), tokenizer, recipe.seed)
    # One more than asked for, so that the starting point stays beside the newest.
    return checkpoint.save(
        run_dir.checkpoints, 0, lambda path: save_policy(policy, tokenizer, path), {}, keep=_keep(recipe)
    )


def train(recipe: SftRecipe, run_dir: RunDir, origin: Path, stop: StopRequest, *, resume: bool) -> SFTTrainer:
    """Run the trainer to its end, or until a stop is requested."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from posttrain import sft_parts
    from posttrain.model.load import load_policy, load_tokenizer

    last = sft_parts.last_checkpoint(run_dir.path) if resume else None
    if resume and last is None:
        raise RunStopped(
            f"--resume: no trainer checkpoint in {run_dir.path}; set checkpoint.save_steps, or start without --resume"
        )
    # On resuming, the model itself is loaded from the checkpoint: the trainer alone would lose every routed expert.
    path = str(last or origin)
    tokenizer = load_tokenizer(str(origin), trust_remote_code=recipe.model.trust_remote_code)
    policy = load_policy(
        path,
        dtype="float32",
        attn_implementation=recipe.model.attn_implementation,
        experts_implementation=recipe.model.experts_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    dataset = sft_parts.tokenized_dataset(recipe, tokenizer)
    with Progress("sft", recipe.training.max_steps) as progress:
        log = MetricsLog(run_dir.path, recipe.report_to, resume_step=sft_parts.step_of(last) if last else None)
        trainer = SFTTrainer(
            model=policy,
            processing_class=tokenizer,
            args=sft_parts.trainer_arguments(recipe, run_dir.path),
            train_dataset=dataset,
            data_collator=sft_parts.Rows(tokenizer.pad_token_id),
            callbacks=[
                sft_parts.LogSteps(log, progress),
                sft_parts.StopOnRequest(stop),
                sft_parts.BalanceRouter(recipe.router.bias_update_speed, tokenizer.pad_token_id),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer


def save(recipe: SftRecipe, run_dir: RunDir, trainer: SFTTrainer) -> Path:
    """The trained policy as a checkpoint that transformers, vLLM and the other stages load."""
    from posttrain.model.load import save_policy

    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    return checkpoint.save(
        run_dir.checkpoints,
        trainer.state.global_step,
        lambda path: save_policy(policy, tokenizer, path),
        {},
        keep=_keep(recipe),
    )


def evaluation(recipe: SftRecipe, path: Path) -> EvalResult | None:
    """pass@1 and greedy accuracy of a checkpoint on vLLM; None without an `eval` section."""
    if recipe.eval is None:
        return None
    model = recipe.model.model_copy(update={"model_name_or_path": str(path), "build": None})
    return evaluate_checkpoint(model, recipe.eval, recipe.sampler)


def finish(
    recipe: SftRecipe,
    run_dir: RunDir,
    trainer: Any,
    before: EvalResult | None,
    after: EvalResult | None,
    seconds: float,
) -> None:
    """Write summary and report, and show what came of the run."""
    results = {name: result for name, result in (("before", before), ("after", after)) if result is not None}
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    run_dir.write_summary(
        {
            "stage": "sft",
            "seconds": seconds,
            "steps": trainer.state.global_step,
            "finished": trainer.state.global_step >= trainer.state.max_steps,
            "metrics": {"loss": losses[-1]["loss"]} if losses else {},
            "eval": {name: result.to_dict() for name, result in results.items()},
        }
    )
    for name, result in results.items():
        run_dir.write_eval_samples(name, result)
    report = write_report(run_dir.path)
    if results:
        before_after_table({name: result.to_dict() for name, result in results.items()})
    paths_written(run_dir.path, [run_dir.checkpoints / checkpoint.LATEST, report])


def _keep(recipe: SftRecipe) -> int:
    return recipe.checkpoint.save_total_limit + (recipe.model.build is not None)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("sft", run, argv)


if __name__ == "__main__":
    sys.exit(main())
