"""Prompts through sampler and rewards: a stream of scored rollouts, one per step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.advantages import has_signal
from posttrain.metrics import Metric
from posttrain.types import Completion, Group, Prompt, SamplingParams
from rewards import RewardFunction, score_group

if TYPE_CHECKING:
    from posttrain.cluster import SamplerPool


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's groups and what they cost."""

    groups: tuple[Group, ...]  # [P]
    seconds_generate: float
    seconds_reward: float

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    def metrics(self, policy_version: int) -> dict[str, Metric]:
        """What the samples are like. `policy_version` is the learner's when it trains on them."""
        completions = self.completions
        rewards = [reward for group in self.groups for reward in group.rewards]
        values = {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "groups/with_signal": statistics.fmean(has_signal(group.rewards) for group in self.groups),
            "completion/length_mean": statistics.fmean(len(c.token_ids) for c in completions),
            "completion/truncated_fraction": statistics.fmean(c.finish_reason == "length" for c in completions),
            "time/rollout": self.seconds_generate,
            "time/reward": self.seconds_reward,
        }
        for name in self.groups[0].components:
            scores = [score for group in self.groups for score in group.components[name]]
            values[f"reward/{name}/mean"] = statistics.fmean(scores)
        metrics = {name: Metric(value, "mean") for name, value in values.items()}
        metrics["lag/max"] = Metric(max(policy_version - c.policy_version for c in completions), "max")
        return metrics


def stream(
    take: Callable[[int], Sequence[Prompt]],
    samplers: SamplerPool,
    functions: Sequence[RewardFunction],
    *,
    num_prompts: int,
    params: SamplingParams,
) -> Iterator[Rollout]:
    """Rollouts without end. Each is generated when it is asked for, so it is as fresh as the last publication.

    Args:
        take: gives the next n prompts.
        samplers: where completions come from.
        functions: what scores them.
        num_prompts: P.
        params: G and how to draw.
    """
    while True:
        start = time.perf_counter()
        prompts = take(num_prompts)
        completions = samplers.generate(prompts, params)
        generated = time.perf_counter()
        groups = tuple(
            score_group(functions, prompt, group) for prompt, group in zip(prompts, completions, strict=True)
        )
        yield Rollout(groups, generated - start, time.perf_counter() - generated)
