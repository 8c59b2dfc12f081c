"""One benchmark in an evaluation: made ready before anything heavy starts, then asked, graded and counted."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.chat import render_prompt
from eval.benchmarks import get_benchmark
from eval.benchmarks.base import Benchmark, Problem
from eval.benchmarks.loading import check, load
from eval.grading import grade
from eval.statistics import Estimate, bootstrap, cons_at_k, estimate, pass_at_k, stratified
from eval.suite import EvalResult, completion_rows
from posttrain.recipe import BenchmarkSection, EvalSuiteSection, RecipeError, RewardSection
from posttrain.types import Message, Prompt, RewardResult, SamplingParams

MOST_JUDGES = 8  # processes that compare pairs
GRADER_TIMEOUT = 180.0  # seconds of one call: all tests of a program, or a judge's votes with retries


@dataclass(frozen=True, slots=True)
class BenchmarkTask:
    """A benchmark with the recipe's changes, its problems rendered."""

    benchmark: Benchmark
    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    reward: RewardSection
    num_fewshot: int
    left_out: int  # rows that do not count
    shortened: int  # prompts that lost their middle


def prepare(
    section: BenchmarkSection, suite: EvalSuiteSection, tokenizer: Any, max_model_len: int | None
) -> BenchmarkTask:
    """Load a benchmark and find out that it can run.

    Args:
        section: which, and what the recipe changes.
        suite: the recipe's `eval`.
        tokenizer: of the checkpoint; None for an endpoint.
        max_model_len: tokens of prompt and completion; None where it is not known.

    Raises:
        RecipeError: it lacks something, or its prompts and answers do not fit.
    """
    benchmark, options = get_benchmark(section.name), suite.options(section)
    changes = {
        name: options[name] for name in ("num_samples", "temperature", "max_completion_length") if name in options
    }
    benchmark = replace(benchmark, **changes)
    try:
        check(
            benchmark,
            section.path,
            has_judge=suite.judge is not None,
            sandbox=suite.sandbox,
            languages=section.languages,
        )
        loaded = load(
            benchmark,
            path=section.path,
            size=options.get("size"),
            num_fewshot=options.get("num_fewshot"),
            seed=suite.seed,
            languages=section.languages,
        )
    except ValueError as error:
        raise RecipeError(f"eval.benchmarks: {error}") from error
    if benchmark.temperature == 0 and benchmark.num_samples > 1:
        raise RecipeError(
            f"eval.benchmarks: {benchmark.name} with num_samples={benchmark.num_samples} at temperature 0 gives the same "
            f"answer each time; raise the temperature (0.6 for reasoning models), or set num_samples: 1"
        )
    room = None if max_model_len is None else max_model_len - benchmark.max_completion_length
    if room is not None and room < 1:
        raise RecipeError(
            f"eval.benchmarks: {benchmark.name} lets answers be {benchmark.max_completion_length} tokens long and "
            f"sampler.max_model_len={max_model_len} has no room for them; raise that, or lower its max_completion_length"
        )
    prompts, shortened = _prompts(benchmark, loaded.problems, loaded.messages, tokenizer, room)
    shots = options.get("num_fewshot", benchmark.num_fewshot)
    params = SamplingParams(
        benchmark.max_completion_length,
        benchmark.temperature,
        top_p=benchmark.top_p if benchmark.temperature else 1.0,
        num_generations=benchmark.num_samples,
    )
    reward = _reward(benchmark, suite)
    return BenchmarkTask(benchmark, loaded.problems, prompts, params, reward, shots, loaded.left_out, shortened)


def _reward(benchmark: Benchmark, suite: EvalSuiteSection) -> RewardSection:
    kwargs = dict(benchmark.reward_kwargs)
    if "judge" in benchmark.needs and suite.judge is not None:
        judge = suite.judge
        kwargs |= {"model": judge.model, "base_url": judge.base_url, "api_key_env": judge.api_key_env}
        kwargs |= {"timeout_seconds": min(judge.timeout_seconds, GRADER_TIMEOUT / 3), "max_retries": judge.max_retries}
    if "sandbox" in benchmark.needs:
        kwargs["sandbox"] = suite.sandbox
    concurrency = suite.judge.max_concurrency if suite.judge is not None else 32
    workers = 1
    if "sandbox" in benchmark.needs:
        workers = os.cpu_count() or 1
    elif benchmark.is_pairwise:
        workers = min(concurrency, MOST_JUDGES)  # a grouped grader asks about one pair at a time
    return RewardSection(
        func=benchmark.reward,
        name="accuracy",
        kwargs=kwargs,
        timeout_seconds=GRADER_TIMEOUT,
        max_concurrency=concurrency,
        num_workers=workers,
    )


def _prompts(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    chats: Sequence[tuple[Message, ...]],
    tokenizer: Any,
    room: int | None,
) -> tuple[tuple[Prompt, ...], int]:
    """The problems rendered, and how many lost their middle to fit into `room` tokens."""
    prompts, shortened, longest = [], 0, 0
    for place, (problem, messages) in enumerate(zip(problems, chats, strict=True)):
        ids: tuple[int, ...] = ()
        if tokenizer is not None:
            ids = render_prompt(tokenizer, messages)
            if room is not None and len(ids) > room and benchmark.shortens:
                messages, ids = _without_middle(tokenizer, messages, ids, room)
                shortened += 1
            longest = max(longest, len(ids))
        identity = f"{benchmark.name}/{problem.id if problem.id is not None else place}"
        prompts.append(Prompt(identity, messages, ids, problem.answer, problem.metadata))
    if room is not None and longest > room:
        too_long = sum(len(prompt.token_ids) > room for prompt in prompts)
        raise RecipeError(
            f"eval.benchmarks: {too_long} of {len(prompts)} prompts of {benchmark.name} do not fit: the longest is {longest} "
            f"tokens, answers take {benchmark.max_completion_length}; set sampler.max_model_len to at least "
            f"{longest + benchmark.max_completion_length}"
        )
    return tuple(prompts), shortened


def _without_middle(
    tokenizer: Any, messages: tuple[Message, ...], ids: Sequence[int], room: int
) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """The chat with as much of the last message's two ends as fits."""
    text = messages[-1]["content"]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    keep = room - max(0, len(ids) - len(tokens))
    while keep > 1:
        ends = tokenizer.decode(tokens[: keep - keep // 2]) + tokenizer.decode(tokens[len(tokens) - keep // 2 :])
        shorter: tuple[Message, ...] = (*messages[:-1], {**messages[-1], "content": ends})
        rendered = render_prompt(tokenizer, shorter)
        if len(rendered) <= room:
            return shorter, rendered
        keep -= max(1, len(rendered) - room)  # joined ends and template may tokenize to a few more
    return messages, tuple(ids)


# --- asking and counting ----------------------------------------------------------------------------------------------


def run_task(
    task: BenchmarkTask,
    generate: Callable[..., Any],
    max_failed_fraction: float,
    verdicts: MutableMapping[str, RewardResult] | None = None,
) -> EvalResult:
    """Ask, grade and count.

    Args:
        task: what.
        generate: gives the answers, as `SamplerPool.generate` does.
        max_failed_fraction: of the completions, that may lack an answer or a verdict.
        verdicts: of a judge, that are known; see `eval.grading.grade`.

    Raises:
        RunStopped: too many completions without an answer or a verdict.
    """
    benchmark = task.benchmark
    groups = generate(task.prompts, task.params)
    baselines = [problem.baseline or "" for problem in task.problems] if benchmark.is_pairwise else None
    graded = grade(
        task.reward,
        task.prompts,
        groups,
        baselines=baselines,
        max_failed_fraction=max_failed_fraction,
        known=verdicts if "judge" in benchmark.needs else None,
    )
    scores_PN = graded.scores_PN
    kinds = [problem.kind or benchmark.name for problem in task.problems]
    of_kind: dict[str, list[list[float]]] = defaultdict(list)
    for kind, scores in zip(kinds, scores_PN, strict=True):
        of_kind[kind].append(scores)
    answers = None
    if benchmark.final_answer is not None:
        answers = [[benchmark.final_answer(completion.text) for completion in group] for group in groups]
    completions = [completion for group in groups for completion in group]
    clusters = _clusters(task.problems)
    rows = completion_rows(
        task.prompts, groups, graded.results_PN, "sampled" if task.params.temperature else "greedy", kinds
    )
    if clusters is not None:  # for `eval compare`
        cluster_of = dict(zip((prompt.id for prompt in task.prompts), clusters, strict=True))
        rows = [{**row, "cluster": cluster_of[row["prompt_id"]]} for row in rows]
    return EvalResult(
        pass_at_1=headline(benchmark.macro, of_kind, scores_PN, clusters),
        greedy=None,
        by_level={kind: estimate(scores) for kind, scores in of_kind.items()},
        completion_length_mean=statistics.fmean(len(completion.sampled_ids) for completion in completions),
        truncated_fraction=graded.counts["truncated"] / graded.counts["completions"],
        rows=rows,
        counts={**graded.counts, "rows_left_out": task.left_out, "prompts_shortened": task.shortened},
        metrics=further_metrics(scores_PN, answers, clusters),
        title=benchmark.title,
        details=describe(task),
    )


def headline(
    macro: Mapping[str, tuple[tuple[str, ...], ...]],
    of_kind: Mapping[str, Sequence[Sequence[float]]],
    scores_PN: Sequence[Sequence[float]],
    clusters: Sequence[str] | None,
) -> Estimate:
    """The number that is quoted: over problems, or over the parts of `Benchmark.macro` that have any."""
    if not macro:
        return estimate(scores_PN, clusters=clusters)
    parts = {}
    for name, groups in macro.items():
        present = [[scores for kind in kinds for scores in of_kind.get(kind, ())] for kinds in groups]
        parts[name] = [group for group in present if group]
    parts = {name: groups for name, groups in parts.items() if groups}
    return stratified([(1 / len(parts) / len(groups), group) for groups in parts.values() for group in groups])


def further_metrics(
    scores_PN: Sequence[Sequence[float]],
    answers: Sequence[Sequence[str | None]] | None,
    clusters: Sequence[str] | None,
) -> dict[str, Estimate]:
    """pass@k and cons@k of problems with several samples, and the bootstrap's interval.

    pass@k is given for right-or-wrong scores, k doubling up to the number of samples; cons@k for all samples.
    """
    samples = min(map(len, scores_PN))
    found = {"bootstrap": bootstrap(scores_PN, clusters=clusters)}
    if samples == 1:
        return found
    if all(score in (0, 1) for scores in scores_PN for score in scores):
        for k in sorted({*(2**power for power in range(1, samples.bit_length()) if 2**power <= samples), samples}):
            passed = [[pass_at_k(len(scores), round(sum(scores)), k)] for scores in scores_PN]
            found[f"pass@{k}"] = estimate(passed, clusters=clusters)
        if answers is not None:
            votes = [[cons_at_k(given, scores)] for given, scores in zip(answers, scores_PN, strict=True)]
            found[f"cons@{samples}"] = estimate(votes, clusters=clusters)
    return found


def describe(task: BenchmarkTask) -> dict[str, Any]:
    """How the number was measured, for summary.json."""
    benchmark, hub = task.benchmark, task.benchmark.hub
    return {
        "metric": benchmark.metric,
        "num_samples": benchmark.num_samples,
        "num_fewshot": task.num_fewshot,
        "temperature": benchmark.temperature,
        "top_p": task.params.top_p,
        "max_completion_length": benchmark.max_completion_length,
        "dataset": None if hub is None else {"path": hub.path, "revision": hub.revision, "split": hub.split},
        "protocol": benchmark.source,
        "departs": benchmark.departs,
        **({"languages": sorted({str(problem.kind) for problem in task.problems})} if benchmark.languages else {}),
        "published": benchmark.published,
    }


def _clusters(problems: Sequence[Problem]) -> list[str] | None:
    if all(problem.cluster is None for problem in problems):
        return None
    return [problem.cluster or f"problem {place}" for place, problem in enumerate(problems)]
