"""pass@1 and greedy accuracy on held-out problems, graded by the same function that rewards the training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.prompts import to_prompts
from data.records import Record
from eval.grading import count, grade
from eval.statistics import Estimate, estimate
from posttrain.episode_reward import is_success, require_working
from posttrain.recipe import EnvironmentSection, EvalSection
from posttrain.records import data_errors, evaluation_records
from posttrain.run_dir import transcript
from posttrain.types import Completion, Prompt, RewardResult, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found."""

    pass_at_1: Estimate  # sampled at the recipe's temperature
    greedy: Estimate | None
    by_level: dict[str, Estimate]  # "task/level" -> sampled pass@1
    completion_length_mean: float  # tokens, sampled
    truncated_fraction: float  # of the sampled completions
    rows: list[dict[str, Any]]  # every completion
    counts: Mapping[str, int] = field(default_factory=dict)  # of the sampled completions, see `eval.grading.count`
    metrics: Mapping[str, Estimate] = field(default_factory=dict)  # others, such as pass@8 and cons@8
    title: str = ""  # of a benchmark, in tables
    details: Mapping[str, Any] = field(default_factory=dict)  # of a benchmark: how it was measured, JSON-able

    def to_dict(self) -> dict[str, Any]:
        """For summary.json; the completions are left out."""
        return {
            "pass_at_1": self.pass_at_1.to_dict(),
            "greedy": self.greedy.to_dict() if self.greedy else None,
            "by_level": {name: found.to_dict() for name, found in self.by_level.items()},
            "completion_length_mean": self.completion_length_mean,
            "truncated_fraction": self.truncated_fraction,
            "counts": dict(self.counts),
            "metrics": {name: found.to_dict() for name, found in self.metrics.items()},
            **({"title": self.title} if self.title else {}),
            **self.details,
        }


def eval_prompts(section: EvalSection, tokenizer: Any) -> tuple[Prompt, ...]:
    """The held-out problems, in the order of the recipe. Without a tokenizer they have no tokens, for an endpoint."""
    with data_errors("eval.datasets"):
        return as_prompts(evaluation_records(section.datasets, section.seed), tokenizer)


def as_prompts(records: Sequence[Record], tokenizer: Any) -> tuple[Prompt, ...]:
    """Problems as prompts; rendered to tokens, or without them where there is no tokenizer."""
    if tokenizer is not None:
        return to_prompts(records, tokenizer)
    return tuple(Prompt(record.id, record.messages, (), record.answer, record.metadata) for record in records)


def evaluate(section: EvalSection, prompts: Sequence[Prompt], generate: Generate) -> EvalResult:
    """Generate, grade and count.

    Args:
        section: how many samples, the grader, lengths and temperature.
        prompts: the problems.
        generate: draws completions, e.g. `SamplerPool.generate`; with `section.environment` episodes, as
            `EpisodeSampler.generate` does.
    """
    sampled = generate(
        prompts, SamplingParams(section.max_completion_length, section.temperature, num_generations=section.num_samples)
    )
    greedy = generate(prompts, SamplingParams(section.max_completion_length, 0.0)) if section.greedy else None
    allowed = getattr(section, "max_failed_fraction", 0.0)  # the recipe of an evaluation has it
    results = _results(section, prompts, sampled, allowed)
    scores = [[result.score for result in row] for row in results]
    greedy_results = None if greedy is None else _results(section, prompts, greedy, allowed)
    greedy_scores = None if greedy_results is None else [[result.score for result in row] for row in greedy_results]
    kinds: dict[str, list[list[float]]] = {}
    for prompt, scores_N in zip(prompts, scores, strict=True):
        kinds.setdefault(_kind(prompt), []).append(scores_N)
    rows = completion_rows(prompts, sampled, results, "sampled", [_kind(prompt) for prompt in prompts])
    if greedy is not None and greedy_results is not None:
        rows += completion_rows(prompts, greedy, greedy_results, "greedy", [_kind(prompt) for prompt in prompts])
    completions = [completion for group in sampled for completion in group]
    return EvalResult(
        pass_at_1=estimate(scores),
        greedy=estimate(greedy_scores) if greedy_scores is not None else None,
        by_level={kind: estimate(of_kind) for kind, of_kind in kinds.items()},
        completion_length_mean=statistics.fmean(len(c.sampled_ids) for c in completions),
        truncated_fraction=statistics.fmean(c.finish_reason == "length" for c in completions),
        rows=rows,
        counts=count(sampled, results),
    )


def _kind(prompt: Prompt) -> str:
    task, level = prompt.metadata.get("task", "problems"), prompt.metadata.get("level")
    return f"{task}/{level}" if level is not None else str(task)


def _results(
    section: EvalSection, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], allowed: float
) -> Sequence[Sequence[RewardResult]]:
    """[P][N] of the grader; of an environment 1 for episodes that reached `success_reward`, and 0 for one that failed.

    Raises:
        RunStopped: more completions or environments failed than is allowed.
    """
    if section.environment is None:
        return grade(section.reward, prompts, groups, max_failed_fraction=allowed).results_PN
    require_working(section.environment, groups)
    return [[_success(section.environment, completion) for completion in group] for group in groups]


def _success(section: EnvironmentSection, completion: Completion) -> RewardResult:
    return RewardResult(float(is_success(section, completion)))


def completion_rows(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    results_PN: Sequence[Sequence[RewardResult]],
    mode: str,
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each completion, as samples/eval-*.parquet holds them.

    Args:
        prompts: [P].
        groups: [P][N] completions.
        results_PN: of the grader.
        mode: "sampled" or "greedy".
        kinds: [P] the part of the evaluation that a problem belongs to.
    """
    return [
        {
            "mode": mode,
            "prompt_id": prompt.id,
            "sample": sample,
            "kind": kind,
            "prompt": prompt.messages[-1]["content"],
            "completion": completion.text,
            "answer": prompt.answer,
            "score": result.score,
            "status": result.status,
            "detail": result.detail,
            "finish_reason": completion.finish_reason,
            "length": len(completion.sampled_ids),
            **transcript(completion),
        }
        for prompt, group, results, kind in zip(prompts, groups, results_PN, kinds, strict=True)
        for sample, (completion, result) in enumerate(zip(group, results, strict=True))
    ]
