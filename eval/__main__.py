"""Evaluate one checkpoint, or a model behind an endpoint; or compare two evaluations.

python -m eval recipe.yaml [model.model_name_or_path=...] [--dry-run] [--resume]
python -m eval compare runs/a runs/b

Data and graders are looked at first, then the workers start; every answer is on disk as soon as it is there; each suite's
samples and the summary so far are written when it is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval import compare
from eval.benchmark_task import BenchmarkTask, prepare, run_task
from eval.contamination import judge_suite, training_records
from eval.generations import Generations
from eval.likelihood import check_likelihood, run_likelihood
from eval.published import comparison
from eval.report import write_report
from eval.samplers import Stream, checkpoint_workers, from_endpoint, from_pool
from eval.suite import EvalResult, eval_prompts, evaluate
from eval.tables import show
from posttrain.cli import run_stage
from posttrain.disk import write_atomically
from posttrain.episodes import episodes
from posttrain.progress import paths_written
from posttrain.recipe import EvalRecipe, RecipeError
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import RunDir
from posttrain.types import Prompt

OWN = "eval"  # the suite of the recipe's datasets


def run(recipe: EvalRecipe, *, resume: bool = False) -> int:
    """Evaluate and write summary, samples, comparison and report."""
    start = time.perf_counter()
    tokenizer = _tokenizer(recipe)
    prompts, tasks = _prepare(recipe, tokenizer)
    training = training_records(recipe.eval.contamination, recipe.seed) if recipe.eval.contamination else None
    run_dir = RunDir(recipe.run_dir)
    generations = Generations(run_dir.path, model_id(recipe), resume=resume)
    _write_summary(run_dir, {}, 0.0, finished=False)  # from here on answers are kept until the run has ended
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    results: dict[str, EvalResult] = {}

    def keep(name: str, result: EvalResult, questions: Mapping[str, str]) -> None:
        section = recipe.eval.contamination
        if section is not None and training is not None and questions:
            found = judge_suite(questions, result.rows, training, section.ngram)
            result = replace(result, details={**result.details, "contamination": found.to_dict()})
        results[name] = result
        run_dir.write_evaluation(name, result)
        _write_summary(run_dir, results, time.perf_counter() - start, finished=False)

    if prompts or tasks:
        with _answers(recipe) as (stream, pool):
            if prompts:
                asked = {prompt.id: prompt.messages[-1]["content"] for prompt in prompts}
                keep(OWN, _own(recipe, prompts, tokenizer, generations.keep(OWN, stream), pool), asked)
            for task in tasks:
                name = task.benchmark.name
                answer = generations.keep(name, stream)
                verdicts = generations.verdicts(name)
                keep(name, run_task(task, answer, recipe.eval.max_failed_fraction, verdicts), _questions(task))
    for section in recipe.eval.benchmarks:
        if section.method == "lm_eval":
            assert recipe.model is not None  # the recipe requires it
            keep(f"{section.name}-lm_eval", run_likelihood(section, recipe.eval, recipe.model), {})
    shown = {name: result.to_dict() for name, result in results.items()}
    table = comparison(shown, recipe.run_name or "this model")
    if table:
        write_atomically(run_dir.path / "comparison.md", table)
    _write_summary(run_dir, results, time.perf_counter() - start, finished=True)
    show(shown)
    paths_written(run_dir.path, [write_report(run_dir.path), *([run_dir.path / "comparison.md"] if table else [])])
    return 0


def model_id(recipe: EvalRecipe) -> str:
    """What gives the answers: a checkpoint's real place, so that `latest` means one version, or the endpoint's name."""
    if recipe.endpoint is not None:
        return f"{recipe.endpoint.base_url} {recipe.endpoint.model}"
    assert recipe.model is not None  # the recipe requires one of the two
    path = Path(str(recipe.model.model_name_or_path)).expanduser()
    return str(path.resolve()) if path.exists() else str(recipe.model.model_name_or_path)


def _tokenizer(recipe: EvalRecipe) -> Any:
    """Of the checkpoint; None for an endpoint."""
    if recipe.model is None:
        return None
    from posttrain.model.load import load_tokenizer

    return load_tokenizer(model_id(recipe), trust_remote_code=recipe.model.trust_remote_code)


def _prepare(recipe: EvalRecipe, tokenizer: Any) -> tuple[tuple[Prompt, ...], list[BenchmarkTask]]:
    """Problems of the recipe's datasets, and the benchmarks that are answered; all of them can run.

    Raises:
        RecipeError: one cannot.
    """
    window = recipe.sampler.max_model_len if recipe.model is not None else None
    try:
        prompts = eval_prompts(recipe.eval, tokenizer) if recipe.eval.datasets else ()
        for section in recipe.eval.benchmarks:
            if section.method == "lm_eval":
                check_likelihood(section, recipe.eval)
    except ValueError as error:
        raise RecipeError(f"eval: {error}") from error
    answered = [section for section in recipe.eval.benchmarks if section.method == "generate"]
    return prompts, [prepare(section, recipe.eval, tokenizer, window) for section in answered]


@contextmanager
def _answers(recipe: EvalRecipe) -> Iterator[tuple[Stream, Any]]:
    """Where answers come from, and the workers if they are ours."""
    if recipe.endpoint is not None:
        yield from_endpoint(recipe.endpoint, recipe.eval.seed), None
        return
    assert recipe.model is not None  # the recipe requires one of the two
    with checkpoint_workers(recipe.model, recipe.sampler, recipe.eval.seed) as pool:
        yield from_pool(pool.generate), pool


def _own(
    recipe: EvalRecipe, prompts: Sequence[Prompt], tokenizer: Any, generate: Callable[..., Any], pool: Any
) -> EvalResult:
    """The recipe's datasets, with its own grader or environment."""
    if recipe.eval.environment is None:
        return evaluate(recipe.eval, prompts, generate)
    with episodes(recipe.eval.environment, pool.generate, tokenizer, recipe.sampler.max_model_len) as play:
        return evaluate(recipe.eval, prompts, play)


def _questions(task: BenchmarkTask) -> dict[str, str]:
    return {prompt.id: problem.question for prompt, problem in zip(task.prompts, task.problems, strict=True)}


def _write_summary(run_dir: RunDir, results: Mapping[str, EvalResult], seconds: float, *, finished: bool) -> None:
    shown = {name: result.to_dict() for name, result in results.items()}
    run_dir.write_summary({"stage": "eval", "seconds": seconds, "finished": finished, "eval": shown})


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    return run_stage("eval", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
