"""pass@1 and greedy accuracy on held-out problems, graded by the same function that rewards the training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.prompts import to_prompts
from eval.statistics import Estimate, estimate
from posttrain.episode_reward import is_success, require_working
from posttrain.errors import RunStopped
from posttrain.recipe import EnvironmentSection, EvalSection
from posttrain.records import evaluation_records
from posttrain.reward_setup import build_limits, build_reward
from posttrain.run_dir import transcript
from posttrain.types import Completion, Prompt, SamplingParams
from rewards import to_item
from rewards.warden import Warden

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

    def to_dict(self) -> dict[str, Any]:
        """For summary.json; the completions are left out."""
        return {
            "pass_at_1": self.pass_at_1.to_dict(),
            "greedy": self.greedy.to_dict() if self.greedy else None,
            "by_level": {name: found.to_dict() for name, found in self.by_level.items()},
            "completion_length_mean": self.completion_length_mean,
            "truncated_fraction": self.truncated_fraction,
        }


def eval_prompts(section: EvalSection, tokenizer: Any) -> tuple[Prompt, ...]:
    """The held-out problems, in the order of the recipe."""
    return to_prompts(evaluation_records(section.datasets, section.seed), tokenizer)


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
    if section.environment is not None:
        scores = _successes(section.environment, sampled)
        greedy_scores = None if greedy is None else _successes(section.environment, greedy)
    else:
        grader = build_reward(section.reward)
        with Warden(grader, build_limits(section.reward, grader.form)) as warden:
            scores = _grade(warden, prompts, sampled)
            greedy_scores = None if greedy is None else _grade(warden, prompts, greedy)
    kinds: dict[str, list[list[float]]] = {}
    for prompt, scores_N in zip(prompts, scores, strict=True):
        kinds.setdefault(_kind(prompt), []).append(scores_N)
    rows = _rows(prompts, sampled, scores, "sampled")
    if greedy is not None and greedy_scores is not None:
        rows += _rows(prompts, greedy, greedy_scores, "greedy")
    completions = [completion for group in sampled for completion in group]
    return EvalResult(
        pass_at_1=estimate(scores),
        greedy=estimate(greedy_scores) if greedy_scores is not None else None,
        by_level={kind: estimate(of_kind) for kind, of_kind in kinds.items()},
        completion_length_mean=statistics.fmean(len(c.sampled_ids) for c in completions),
        truncated_fraction=statistics.fmean(c.finish_reason == "length" for c in completions),
        rows=rows,
    )


def _kind(prompt: Prompt) -> str:
    task, level = prompt.metadata.get("task", "problems"), prompt.metadata.get("level")
    return f"{task}/{level}" if level is not None else str(task)


def _grade(warden: Warden, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> list[list[float]]:
    """[P][N] scores.

    Raises:
        RunStopped: the grader could not judge a completion, so the figures would say nothing.
    """
    items = [
        [to_item(prompt, completion) for completion in group] for prompt, group in zip(prompts, groups, strict=True)
    ]
    report = warden.score(items)
    if report.counts["infrastructure"]:
        raise RunStopped(f"the evaluation's grader could not judge every completion: {report.complaint}")
    flat = iter(report.results)
    return [[next(flat).score for _ in group] for group in groups]


def _successes(section: EnvironmentSection, groups: Sequence[Sequence[Completion]]) -> list[list[float]]:
    """[P][N] 1 for episodes that reached `success_reward`; one whose environment failed did not.

    Raises:
        RunStopped: more failed than `max_failed_fraction` allows.
    """
    require_working(section, groups)
    return [[float(is_success(section, completion)) for completion in group] for group in groups]


def _rows(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], scores: Sequence[Sequence[float]], mode: str
) -> list[dict[str, Any]]:
    return [
        {
            "mode": mode,
            "prompt_id": prompt.id,
            "kind": _kind(prompt),
            "prompt": prompt.messages[-1]["content"],
            "completion": completion.text,
            "answer": prompt.answer,
            "score": score,
            "finish_reason": completion.finish_reason,
            "length": len(completion.sampled_ids),
            **transcript(completion),
        }
        for prompt, group, scores_N in zip(prompts, groups, scores, strict=True)
        for completion, score in zip(group, scores_N, strict=True)
    ]
