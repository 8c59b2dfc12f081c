"""Distillation into a dataset: a teacher answers prompts, rewards judge, what is right and well-formed is kept for SFT.

    python -m posttrain.distill recipe.yaml [key.path=value ...] [--dry-run] [--resume]

As in DeepSeek-R1 (section 2.3.3) and DeepSeek-V3 (section 5.1): rejection sampling from a checkpoint, an endpoint or recorded
generations, and rows of the kinds <problem, response>, <system prompt, problem, response> and <problem, original response>.
Every answer and every judgement is on disk before it counts, so a run that was killed goes on without paying twice.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.report import write_report
from posttrain import distill_setup
from posttrain.cli import run_stage
from posttrain.data_card import Counts, make_card, show, write_card
from posttrain.distill_data import load_problems, write_contaminated
from posttrain.distill_output import RowWriter, dataset_rows, dataset_schema, generation_row, generations_schema
from posttrain.distill_pairs import pair_rows, pairs_schema
from posttrain.distill_recipe import DistillRecipe
from posttrain.endpoint_teacher import require_key
from posttrain.errors import RunStopped
from posttrain.interrupt import graceful_stop
from posttrain.progress import Progress, paths_written
from posttrain.recipe import RecipeError
from posttrain.run_dir import RunDir
from posttrain.selection import Selector

if TYPE_CHECKING:
    from posttrain.distill_job import DistillJob


def run(recipe: DistillRecipe, *, resume: bool = False) -> int:
    """Distil as the recipe says. Returns the exit code: 0, or 130 when a signal ended the run early."""
    start = time.perf_counter()
    if recipe.teacher.endpoint is not None:
        require_key(recipe.teacher.endpoint)
    run_dir = RunDir(recipe.run_dir)
    try:
        problems = load_problems(recipe)
    except ValueError as error:
        raise RecipeError(f"datasets: {error}") from error
    write_contaminated(run_dir.path, problems)
    with distill_setup.start(recipe, run_dir, problems, resume=resume) as job:
        with (
            graceful_stop() as stop,
            Progress("distill", job.num_samples) as progress,
            closing(job.answers(lambda: stop.requested)) as answers,
        ):
            for done in answers:
                judged = job.judge(done)
                progress.update(*job.report(done, judged))
        if stop:
            job.run_dir.write_summary(summary(job, start, finished=False))
            return 130
        card, written = write(job)
        funnel, usage = card["funnel"], card["usage"]
        job.run_dir.write_summary({**summary(job, start, finished=True), "funnel": funnel, "usage": usage})
    report = write_report(run_dir.path)
    show(card)
    paths_written(run_dir.path, [*written, report])
    return 0


def write(job: DistillJob) -> tuple[dict[str, Any], list[Path]]:
    """Decide about every answer, prompt by prompt, and write dataset, generations and data card.

    Returns:
        The card, and the files.

    Raises:
        RunStopped: nothing is kept.
    """
    recipe, directory = job.recipe, job.run_dir.path
    other = "jsonl" if recipe.output.format == "parquet" else "parquet"
    suffix, per_prompt = recipe.output.format, recipe.output.pairs_per_prompt
    for name in (f"dataset.{other}", f"pairs.{other}", *(() if per_prompt else (f"pairs.{suffix}",))):
        (directory / name).unlink(missing_ok=True)  # of an earlier recipe of this directory
    labels = [reward.label for reward in recipe.rewards]
    selector = Selector(recipe.rejection, recipe.selection, job.problems.decontaminator)
    counts = Counts()
    dataset = RowWriter(directory / f"dataset.{suffix}", dataset_schema(labels))
    pairs = RowWriter(directory / f"pairs.{suffix}", pairs_schema()) if per_prompt else None
    generations = RowWriter(directory / "samples" / "generations.parquet", generations_schema(labels))
    common = {
        "teacher_kind": job.teacher.kind,
        "sampling": json.dumps(dict(job.teacher.sampling)),
        "system_prompt": recipe.generation.system_prompt,
    }
    with dataset, generations, pairs or nullcontext():
        for problem in job.problems.asked:
            answers = selector.decide(problem, job.judged_answers(problem))
            rows = dataset_rows(problem, answers, recipe)
            counts.add(problem, answers, rows)
            for row in rows:
                dataset.write(row)
            for answer in answers:
                generations.write(generation_row(problem, answer, labels, common))
            if pairs is not None:
                for row in pair_rows(problem, answers, per_prompt):
                    pairs.write(row)
    card = make_card(job, counts, dataset.path, pairs)
    written = [dataset.path, *([pairs.path] if pairs else []), generations.path, *write_card(directory, card)]
    if not dataset.count:
        raise RunStopped(
            f"not one of {counts.funnel.generated} answers is kept: see the reasons in {directory / 'data_card.md'}, change "
            f"rejection or selection, and go on with --resume, which asks the teacher nothing again"
        )
    return card, written


def summary(job: DistillJob, start: float, *, finished: bool) -> dict[str, Any]:
    """What summary.json says of any run."""
    return {
        "stage": "distill",
        "seconds": time.perf_counter() - start,
        "steps": len(job.generations),
        "finished": finished,
        "metrics": {name: metric.value for name, metric in job.metrics.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("distill", run, argv)


if __name__ == "__main__":
    sys.exit(main())
