"""Supervised fine-tuning with TRL's SFTTrainer, for MoE policies.

    python -m posttrain.sft recipe.yaml [key.path=value ...] [--dry-run] [--preflight] [--resume]
    accelerate launch --num_processes 8 -m posttrain.sft recipe.yaml

As for DeepSeek-V3 (section 5.1): samples packed in one row cannot see each other, and the learning rate falls along a
cosine from `optimizer.learning_rate` to `optimizer.min_learning_rate`. The policy is a checkpoint, or a tiny DeepSeek-V3
built with random weights (`model.build`). Optional: the router's correction bias goes on balancing the experts
(section 2.1.2), a multi-token-prediction module is trained along (section 2.2), or only LoRA adapters are.

What is ours plugs into the trainer: the rows (sft_data.py), the losses and checkpoints (sft_trainer.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.checkpoint import evaluate_checkpoint
from eval.report import write_report
from posttrain import checkpoint
from posttrain import resume as resuming
from posttrain.cli import run_stage
from posttrain.interrupt import StopRequest, graceful_stop
from posttrain.metrics import MetricsLog
from posttrain.progress import Progress, before_after_table, paths_written
from posttrain.recipe import SftRecipe
from posttrain.recipe_file import dump_recipe
from posttrain.router_log import RouterLog
from posttrain.run_dir import RunDir

if TYPE_CHECKING:
    from accelerate import PartialState

    from posttrain.sft_parts import SftJob
    from posttrain.sft_trainer import PolicyTrainer


def run(recipe: SftRecipe, *, resume: bool = False, preflight: bool = False, allow_change: Sequence[str] = ()) -> int:
    """Train as the recipe says. Returns the exit code: 0, or 130 when a signal ended the run early."""
    from posttrain.ranks import join_ranks

    start = time.perf_counter()
    ranks = join_ranks()
    run_dir = RunDir(recipe.run_dir)
    if not resume and not preflight:
        checkpoint.require_fresh(run_dir.checkpoints)
    made_with = resuming.made_with_on(recipe, ranks)
    last = resuming.last_checkpoint(recipe, run_dir, made_with, allow_change, ranks) if resume else None
    if ranks.is_main_process:
        run_dir.write_recipe(dump_recipe(recipe))
        run_dir.write_environment(recipe.seed)
    origin = starting_checkpoint(recipe, run_dir, ranks)
    job = prepare(recipe, run_dir, origin, last, ranks)
    if preflight:
        return 0
    before = run_dir.read_evaluation("before") if resume else evaluation(recipe, origin, run_dir, "before", ranks)
    with graceful_stop() as stop:
        trainer = train(recipe, run_dir, job, made_with, stop)
    trainer.require_progress(run_dir.checkpoints)
    saved = trainer.save_last(finished=not stop)
    after = None if stop else evaluation(recipe, saved, run_dir, "after", ranks)
    if ranks.is_main_process:
        finish(recipe, run_dir, trainer, before, after, finished=not stop, seconds=time.perf_counter() - start)
    return 130 if stop else 0


def starting_checkpoint(recipe: SftRecipe, run_dir: RunDir, ranks: PartialState) -> Path:
    """The checkpoint to start from; a new policy is built and saved first, so that every engine can load it."""
    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, save_policy

    if recipe.model.build is None:
        origin = Path(str(recipe.model.model_name_or_path))
        if ranks.is_main_process:
            checkpoint.require_sound(origin)
        return origin
    built = run_dir.checkpoints / "step-0"
    if ranks.is_main_process and built.exists() and checkpoint.problems(built):
        checkpoint.put_aside(built)  # the seed makes the same again
    if ranks.is_main_process and not built.exists():
        tokenizer = build_tokenizer(recipe.model.extra_characters)
        policy = build_policy(recipe.model.build.model_dump(), tokenizer, recipe.seed)
        checkpoint.save(run_dir.checkpoints, 0, lambda path: save_policy(policy, tokenizer, path), {}, keep=1)
    ranks.wait_for_everyone()
    return built


def prepare(recipe: SftRecipe, run_dir: RunDir, origin: Path, last: Path | None, ranks: PartialState) -> SftJob:
    """Load policy and data, and show what is about to be trained; stops here when that cannot be right."""
    from posttrain import sft_parts

    job = sft_parts.load_job(recipe, origin, last, ranks)
    if ranks.is_main_process:
        sft_parts.show_preflight(job, recipe, run_dir)
    ranks.wait_for_everyone()
    return job


def train(
    recipe: SftRecipe, run_dir: RunDir, job: SftJob, made_with: Mapping[str, Any], stop: StopRequest
) -> PolicyTrainer:
    """Run the trainer to its end, or until a stop is requested."""
    from posttrain import sft_callbacks, sft_parts

    with Progress("sft", recipe.training.max_steps) as progress:
        log = MetricsLog(run_dir.path, recipe.report_to, resume_step=job.resume_step) if job.is_main else None
        trainer = sft_parts.build_trainer(recipe, run_dir, job, made_with)
        trainer.add_callback(sft_callbacks.LogSteps(log, progress))
        if job.is_main:
            router_log = RouterLog(run_dir.path, resume_step=job.resume_step)
            trainer.add_callback(sft_callbacks.LogLoads(router_log, trainer.take_expert_loads))
        trainer.add_callback(sft_callbacks.StopOnRequest(stop))
        trainer.train(resume_from_checkpoint=str(job.resumed_from) if job.resumed_from else None)
    return trainer


def evaluation(recipe: SftRecipe, path: Path, run_dir: RunDir, name: str, ranks: PartialState) -> dict[str, Any] | None:
    """pass@1 and greedy accuracy of a checkpoint on vLLM; None without an `eval` section, and on ranks but the first."""
    found = None
    if recipe.eval is not None and ranks.is_main_process:
        model = recipe.model.model_copy(update={"model_name_or_path": str(path), "build": None})
        found = run_dir.write_evaluation(name, evaluate_checkpoint(model, recipe.eval, recipe.sampler))
    ranks.wait_for_everyone()
    return found


def finish(
    recipe: SftRecipe,
    run_dir: RunDir,
    trainer: PolicyTrainer,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    *,
    finished: bool,
    seconds: float,
) -> None:
    """Write summary and report, and show what came of the run."""
    results = {name: result for name, result in (("before", before), ("after", after)) if result is not None}
    run_dir.write_summary(
        {
            "stage": "sft",
            "seconds": seconds,
            "steps": trainer.state.global_step,
            "finished": finished,
            "metrics": trainer.last_metrics(),
            "eval": results,
        }
    )
    report = write_report(run_dir.path)
    if results:
        before_after_table(results)
    paths_written(run_dir.path, [run_dir.checkpoints / checkpoint.LATEST, report])


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("sft", run, argv)


if __name__ == "__main__":
    sys.exit(main())
