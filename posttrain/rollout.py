"""Prompts through sampler and rewards: a stream of scored rollouts, one per step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posttrain.advantages import has_signal
from posttrain.metrics import Metric, merge
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Group, Prompt, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]
Score = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scored]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's groups and what they cost."""

    groups: tuple[Group, ...]  # [P], to be trained on
    sampled: tuple[Group, ...]  # all that were sampled for it
    reward_metrics: dict[str, Metric]
    complaints: tuple[str, ...]  # of rewards that failed somewhere
    seconds_generate: float

    @property
    def completions(self) -> list[Completion]:
        """Of all groups that were sampled."""
        return [completion for group in self.sampled for completion in group.completions]

    def metrics(self, policy_version: int) -> dict[str, Metric]:
        """What the samples are like. `policy_version` is the learner's when it trains on them."""
        completions = self.completions
        rewards = [reward for group in self.sampled for reward in group.judged_rewards] or [0.0]
        values = {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "groups/sampled": len(self.sampled),
            "groups/with_signal": statistics.fmean(has_signal(group.judged_rewards) for group in self.sampled),
            "completion/length_mean": statistics.fmean(len(c.sampled_ids) for c in completions),
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
    max_batches: int = 1,
) -> Iterator[Rollout]:
    """Rollouts without end. Each is generated when it is asked for, so it is as fresh as the last publication.

    Args:
        take: gives the next n prompts.
        generate: draws completions, e.g. `SamplerPool.generate`.
        score: gives them rewards, e.g. `RewardPool.score`.
        num_prompts: P.
        params: G and how to draw.
        max_batches: above 1, groups without signal are replaced by others (DAPO's dynamic sampling), for which up to so many
            batches are sampled; each is about as large as the last one's share of groups with signal makes necessary.
    """
    while True:
        start = time.perf_counter()
        sampled: list[Group] = []
        complaints: list[str] = []
        metrics: list[dict[str, Metric]] = []
        seconds_scoring = 0.0
        wanted = num_prompts
        for _ in range(max_batches):
            prompts = take(wanted)
            completions = generate(prompts, params)
            scoring = time.perf_counter()
            scored = score(prompts, completions)
            seconds_scoring += time.perf_counter() - scoring
            sampled += scored.groups
            complaints += scored.complaints
            metrics.append(scored.metrics)
            useful = sum(has_signal(group.judged_rewards) for group in sampled)
            if useful >= num_prompts or max_batches == 1:
                break
            share = max(useful, 1) / len(sampled)
            wanted = min(num_prompts, math.ceil((num_prompts - useful) / share))
        seconds = time.perf_counter() - start - seconds_scoring
        yield Rollout(chosen(sampled, num_prompts), tuple(sampled), merge(metrics), tuple(complaints), seconds)


def chosen(groups: Sequence[Group], count: int) -> tuple[Group, ...]:
    """The first `count` groups with signal; where there are fewer, others fill up. In the order they came in."""
    order = sorted(range(len(groups)), key=lambda place: (not has_signal(groups[place].judged_rewards), place))
    return tuple(groups[place] for place in sorted(order[:count]))
