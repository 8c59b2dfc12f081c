"""Prompts through sampler and rewards: a stream of scored rollouts, one per step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posttrain.advantages import has_signal
from posttrain.metrics import Metric
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Group, Prompt, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]
Score = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scored]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's groups and what they cost."""

    groups: tuple[Group, ...]  # [P]
    reward_metrics: dict[str, Metric]
    complaints: tuple[str, ...]  # of rewards that failed somewhere
    seconds_generate: float

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    def metrics(self, policy_version: int) -> dict[str, Metric]:
        """What the samples are like. `policy_version` is the learner's when it trains on them."""
        completions = self.completions
        rewards = [reward for group in self.groups for reward in group.judged_rewards] or [0.0]
        values = {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "groups/with_signal": statistics.fmean(has_signal(group.judged_rewards) for group in self.groups),
            "completion/length_mean": statistics.fmean(len(c.token_ids) for c in completions),
            "completion/truncated_fraction": statistics.fmean(c.finish_reason == "length" for c in completions),
            "time/rollout": self.seconds_generate,
        }
        metrics = {name: Metric(value, "mean") for name, value in values.items()}
        metrics["lag/max"] = Metric(max(policy_version - c.policy_version for c in completions), "max")
        return {**metrics, **self.reward_metrics}


def stream(
    take: Callable[[int], Sequence[Prompt]],
    generate: Generate,
    score: Score,
    *,
    num_prompts: int,
    params: SamplingParams,
) -> Iterator[Rollout]:
    """Rollouts without end. Each is generated when it is asked for, so it is as fresh as the last publication.

    Args:
        take: gives the next n prompts.
        generate: draws completions, e.g. `SamplerPool.generate`.
        score: gives them rewards, e.g. `RewardPool.score`.
        num_prompts: P.
        params: G and how to draw.
    """
    while True:
        start = time.perf_counter()
        prompts = take(num_prompts)
        completions = generate(prompts, params)
        generated = time.perf_counter()
        scored = score(prompts, completions)
        yield Rollout(scored.groups, scored.metrics, scored.complaints, generated - start)
