"""A learned reward model: a policy with a head that gives one number, trained on pairs of a better and a worse answer.

    python -m posttrain.reward_model recipe.yaml [key.path=value ...] [--dry-run] [--resume]
    accelerate launch --num_processes 8 -m posttrain.reward_model recipe.yaml

As DeepSeek-V3's model-based reward model (section 5.2.1) it starts from an SFT checkpoint, and it reads the reasoning that
leads to an answer, not the answer alone. The loss is Bradley-Terry's with a margin, by TRL's RewardTrainer. At the end the
scores of held-out pairs are measured, and their mean and standard deviation saved with the weights, for `rewards.learned`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.report import write_report
from posttrain import checkpoint
from posttrain import resume as resuming
from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.interrupt import StopRequest, graceful_stop
from posttrain.metrics import MetricsLog
from posttrain.progress import Progress, paths_written
from posttrain.recipe_file import dump_recipe
from posttrain.reward_model_recipe import RewardModelRecipe
from posttrain.run_dir import RunDir

if TYPE_CHECKING:
    from posttrain.reward_parts import RewardJob
    from posttrain.reward_trainer import RewardModelTrainer


def run(recipe: RewardModelRecipe, *, resume: bool = False, allow_change: Sequence[str] = ()) -> int:
    """Train as the recipe says. Returns the exit code: 0, or 130 when a signal ended the run early."""
    from posttrain import reward_parts, reward_view
    from posttrain.ranks import join_ranks

    start = time.perf_counter()
    ranks = join_ranks()
    run_dir = RunDir(recipe.run_dir)
    if not resume:
        checkpoint.require_fresh(run_dir.checkpoints)
    made_with = resuming.made_with_on(recipe, ranks)
    last = resuming.last_checkpoint(recipe, run_dir, made_with, allow_change, ranks) if resume else None
    if ranks.is_main_process:
        run_dir.write_recipe(dump_recipe(recipe))
        run_dir.write_environment(recipe.seed)
        checkpoint.require_sound(str(recipe.model.model_name_or_path))
    job = reward_parts.load_job(recipe, last, ranks)
    if job.is_main:
        reward_view.show_pairs(job.pairs)
    with graceful_stop() as stop:
        trainer = train(recipe, run_dir, job, made_with, last, stop)
    trainer.require_progress(run_dir.checkpoints)
    measured = None if stop else measure(recipe, run_dir, job, trainer)
    if stop:
        trainer.save_last(None)
    if job.is_main:
        finish(run_dir, job, trainer, measured, seconds=time.perf_counter() - start)
    return 130 if stop else 0


def train(
    recipe: RewardModelRecipe,
    run_dir: RunDir,
    job: RewardJob,
    made_with: Mapping[str, Any],
    last: Path | None,
    stop: StopRequest,
) -> RewardModelTrainer:
    """Run the trainer to its end, or until a stop is requested."""
    from posttrain import reward_parts, sft_callbacks

    resume_step = checkpoint.load_progress(last)["step"] if last else None
    with Progress("reward_model", recipe.training.max_steps) as progress:
        log = MetricsLog(run_dir.path, recipe.report_to, resume_step=resume_step) if job.is_main else None
        trainer = reward_parts.build_trainer(recipe, run_dir, job, made_with)
        trainer.add_callback(sft_callbacks.LogSteps(log, progress))
        trainer.add_callback(sft_callbacks.StopOnRequest(stop))
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer


def measure(
    recipe: RewardModelRecipe, run_dir: RunDir, job: RewardJob, trainer: RewardModelTrainer
) -> dict[str, Any] | None:
    """Score the held-out pairs, save the reward model with its normalisation, and prove that the files score alike.

    Returns:
        What `reward_metrics.measure` says, and `reload_gap`; None on ranks but the first.

    Raises:
        RunStopped: all scores are equal, or weights were lost on the way to the files.
    """
    from posttrain import reward_metrics, reward_parts
    from posttrain.reward_trainer import sample_rows

    scored = trainer.score_held_out()
    found = reward_metrics.measure(scored)
    if not found["normalization"]["std"] > 0:
        raise RunStopped(
            "the reward model gives all held-out answers the same score and has learnt nothing: raise training.max_steps or "
            "optimizer.learning_rate"
        )
    saved = trainer.save_last(found["normalization"])
    if not job.is_main:
        return None
    run_dir.write_rows("held-out", sample_rows(job.pairs.held_out, scored))
    return {**found, "reload_gap": reward_parts.reload_gap(saved, scored, job, recipe)}


def finish(
    run_dir: RunDir, job: RewardJob, trainer: RewardModelTrainer, measured: dict[str, Any] | None, *, seconds: float
) -> None:
    """Write summary and report, and show what came of the run."""
    from posttrain import reward_view

    run_dir.write_summary(
        {
            "stage": "reward_model",
            "seconds": seconds,
            "steps": trainer.state.global_step,
            "finished": measured is not None,
            "metrics": trainer.last_metrics(),
            "pairs": {name: counts.to_dict() for name, counts in job.pairs.counts.items()},
            "held_out": measured,
        }
    )
    report = write_report(run_dir.path)
    if measured is not None:
        reward_view.show_measured(measured)
    paths_written(run_dir.path, [run_dir.checkpoints / checkpoint.LATEST, report])


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("reward_model", run, argv)


if __name__ == "__main__":
    sys.exit(main())
