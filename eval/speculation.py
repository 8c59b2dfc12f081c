"""How many drafts of a checkpoint's multi-token prediction module are accepted, and what that does to the speed.

    python -m eval.speculation recipe.yaml [model.model_name_or_path=...] [--dry-run]

The recipe is one of `python -m eval`: its held-out problems are answered greedily twice, with one token drafted per step
and without, each time by an engine in a process of its own. Answers are not graded. Written to `<output_dir>/speculation/`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from eval.statistics import Estimate, estimate
from eval.suite import eval_prompts
from posttrain.cli import run_stage
from posttrain.recipe import EvalRecipe, ModelSection, RecipeError, SamplerSection
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import RunDir
from posttrain.sampler import Sampler, SpeculationCount, engine_environment
from posttrain.types import Completion, Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class Answers:
    """What one engine made of the prompts."""

    completions: list[Completion]  # one per prompt
    counts: list[SpeculationCount]  # one per prompt
    seconds: float  # of generation, start and warm-up left out

    @property
    def tokens_per_second(self) -> float:
        return sum(len(completion.token_ids) for completion in self.completions) / self.seconds


@dataclass(frozen=True, slots=True)
class SpeculationResult:
    """What speculation did."""

    drafted: int  # tokens, verified by the policy
    accepted: int
    acceptance: Estimate  # accepted / drafted; its n is the number of prompts
    tokens_per_second: float  # with speculation
    tokens_per_second_without: float
    same_answers: int  # prompts whose greedy answer is the same, token by token, with and without
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def acceptance_rate(
    model: ModelSection, sampler: SamplerSection, prompts: Sequence[Prompt], max_completion_length: int
) -> SpeculationResult:
    """Answer prompts greedily with and without speculation.

    Args:
        model: a checkpoint with a multi-token prediction module.
        sampler: the engine's sizes.
        prompts: held-out ones.
        max_completion_length: tokens.

    Raises:
        ValueError: the checkpoint has no such module.
    """
    from posttrain.model.mtp import require_mtp

    require_mtp(str(model.model_name_or_path))
    params = SamplingParams(max_completion_length, temperature=0.0)
    with_drafts = answer(model, sampler, prompts, params, speculative_tokens=1)
    without = answer(model, sampler, prompts, params, speculative_tokens=0)
    return compare(with_drafts, without)


def answer(
    model: ModelSection,
    sampler: SamplerSection,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    speculative_tokens: int,
) -> Answers:
    """Start an engine in a process of its own, generate one completion per prompt, stop it."""
    environment = engine_environment(sampler.num_threads, sampler.kv_cache_gib, sampler.tensor_parallel_size)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_enter, initargs=(environment,)) as process:
        return process.submit(_answer, model, sampler, prompts, params, speculative_tokens).result()


def _enter(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # before anything imports torch or vLLM
    if os.environ["VLLM_LOGGING_LEVEL"] == "WARNING":
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # its hints would bury the result; DEBUG and INFO are wishes


def _answer(
    model: ModelSection,
    section: SamplerSection,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    speculative_tokens: int,
) -> Answers:
    sampler = Sampler(
        str(model.model_name_or_path),
        dtype=model.dtype,
        max_model_len=section.max_model_len,
        max_num_seqs=section.max_num_seqs,
        gpu_memory_utilization=section.gpu_memory_utilization,
        trust_remote_code=model.trust_remote_code,
        seed=0,
        speculative_tokens=speculative_tokens,
        tensor_parallel_size=section.tensor_parallel_size,
        enable_expert_parallel=section.enable_expert_parallel,
    )
    sampler.generate(prompts[:1], SamplingParams(4, temperature=0.0))  # the first steps of an engine are slow
    start = time.perf_counter()
    groups = sampler.generate(prompts, params)
    seconds = time.perf_counter() - start
    return Answers([completion for (completion,) in groups], sampler.speculation_counts(), seconds)


def compare(with_drafts: Answers, without: Answers) -> SpeculationResult:
    """The numbers of two engines that answered the same prompts."""
    same = [
        ours.token_ids == plain.token_ids
        for ours, plain in zip(with_drafts.completions, without.completions, strict=True)
    ]
    return SpeculationResult(
        drafted=sum(count.drafted for count in with_drafts.counts),
        accepted=sum(count.accepted for count in with_drafts.counts),
        acceptance=pooled_rate(with_drafts.counts),
        tokens_per_second=with_drafts.tokens_per_second,
        tokens_per_second_without=without.tokens_per_second,
        same_answers=sum(same),
        prompts=len(same),
    )


def pooled_rate(counts: Sequence[SpeculationCount], confidence: float = 0.95) -> Estimate:
    """Accepted over drafted tokens of all completions, with its confidence interval.

    The drafts of one completion are not independent, so the interval is that of a ratio of two sums over completions
    (linearised, cluster-robust). Where it is narrower than Wilson's interval for independent drafts, as near 0 and 1 or
    for very few completions, Wilson's bound holds.

    Raises:
        ValueError: nothing was drafted.
    """
    from scipy.stats import norm

    drafted, accepted = sum(count.drafted for count in counts), sum(count.accepted for count in counts)
    if not drafted:
        raise ValueError("no token was drafted: the answers are a single token long, or there are no prompts")
    wilson = estimate([[1.0]] * accepted + [[0.0]] * (drafted - accepted), confidence)
    rate, n = accepted / drafted, len(counts)
    if n == 1:
        return Estimate(rate, 0.0, 1.0, n)
    residuals = [count.accepted - rate * count.drafted for count in counts]  # their mean is 0
    error = statistics.stdev(residuals) * math.sqrt(n) / drafted
    half = float(norm.ppf(0.5 + confidence / 2)) * error
    return Estimate(rate, max(0.0, min(rate - half, wilson.low)), min(1.0, max(rate + half, wilson.high)), n)


def run(recipe: EvalRecipe, *, resume: bool = False) -> int:
    """Measure, write and print."""
    from posttrain.model.load import load_tokenizer
    from posttrain.model.mtp import require_mtp

    if resume:
        raise RecipeError("command line: '--resume': drafting has nothing to go on from; leave --resume out")
    if recipe.model is None or not recipe.eval.datasets:
        raise RecipeError("drafting is measured with a checkpoint on eval.datasets; give model and eval.datasets")
    start = time.perf_counter()
    path = str(recipe.model.model_name_or_path)
    try:
        require_mtp(path)
    except ValueError as error:
        raise RecipeError(f"model.model_name_or_path: {error}") from None
    run_dir = RunDir(recipe.run_dir / "speculation")
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    tokenizer = load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
    prompts = eval_prompts(recipe.eval, tokenizer)
    result = acceptance_rate(recipe.model, recipe.sampler, prompts, recipe.eval.max_completion_length)
    run_dir.write_summary(
        {"stage": "eval.speculation", "seconds": time.perf_counter() - start, "finished": True, **result.to_dict()}
    )
    print(describe(result))
    print(f"written: {run_dir.path.resolve()}")
    return 0


def describe(result: SpeculationResult) -> str:
    """The result in four lines."""
    rate = result.acceptance
    speedup = result.tokens_per_second / result.tokens_per_second_without
    return "\n".join(
        (
            f"acceptance   {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] of {result.drafted} drafts, {rate.n} prompts",
            f"per step     {1 + rate.value:.2f} tokens",
            f"speed        {result.tokens_per_second:,.0f} tokens/s with, {result.tokens_per_second_without:,.0f} without "
            f"({speedup:.2f}x)",
            f"same answer  {result.same_answers} of {result.prompts} prompts",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("eval", run, argv)


if __name__ == "__main__":
    sys.exit(main())
