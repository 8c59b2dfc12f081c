"""Prompts through sampler and rewards: a stream of scored rollouts, one per step, ahead of the learner if it may be."""

from __future__ import annotations

import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.advantages import has_signal
from posttrain.metrics import Metric, merge
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Group, Prompt, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]
Score = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scored]

_POLL_SECONDS = 0.005
_CLOSE_SECONDS = 30.0  # a thread that samples longer is left alone: what it waits for is about to be shut down


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's groups and what they cost."""

    groups: tuple[Group, ...]  # [P], to be trained on
    sampled: tuple[Group, ...]  # all that were sampled for it
    reward_metrics: dict[str, Metric]
    complaints: tuple[str, ...]  # of rewards that failed somewhere
    seconds_generate: float
    carried: int = 0  # groups that were begun and are left for the next one
    cursor: Mapping[str, Any] = field(default_factory=dict)  # of the prompts, after those of this step

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
        lags = [policy_version - version for c in completions for version in c.sampled(c.versions)]
        metrics["lag/max"] = Metric(max(lags), "max")
        metrics["lag/mean"] = Metric(statistics.fmean(lags), "mean")
        metrics["rollout/carried"] = Metric(self.carried, "mean")
        return {**metrics, **self.reward_metrics}


@dataclass(frozen=True)
class Carrying:
    """Groups that are gone on with.

    Attributes:
        enough: begins prompts and returns so many groups, e.g. `SamplerPool.generate_enough`.
        carried: the prompts of which it has not returned the groups.
        oversampling: groups in the samplers for each one that is waited for, above 1.
    """

    enough: Callable[[Sequence[Prompt], SamplingParams, int], Sequence[tuple[Prompt, list[Completion]]]]
    carried: Callable[[], Sequence[Prompt]]
    oversampling: float


@dataclass(frozen=True)
class Source:
    """Where rollouts come from.

    Attributes:
        take: gives the next n prompts.
        generate: draws completions, e.g. `SamplerPool.generate`.
        score: gives them rewards, e.g. `RewardPool.score`.
        num_prompts: P.
        params: G and how to draw.
        max_batches: above 1, groups without signal are replaced by others (DAPO's dynamic sampling), for which up to so many
            batches are sampled; each is about as large as the last one's share of groups with signal makes necessary.
        cursor: the state of `take`, after what it gave last.
        carrying: with it, more groups are begun than are waited for, and the others gone on with for the next rollout.
    """

    take: Callable[[int], Sequence[Prompt]]
    generate: Generate
    score: Score
    num_prompts: int
    params: SamplingParams
    max_batches: int = 1
    cursor: Callable[[], Mapping[str, Any]] = dict
    carrying: Carrying | None = None

    def rollout(self) -> Rollout:
        """The next one, sampled now."""
        start = time.perf_counter()
        sampled: list[Group] = []
        complaints: list[str] = []
        metrics: list[dict[str, Metric]] = []
        seconds_scoring = 0.0
        wanted = self.num_prompts
        for _ in range(self.max_batches):
            prompts, completions = self._sample(wanted)
            scoring = time.perf_counter()
            scored = self.score(prompts, completions)
            seconds_scoring += time.perf_counter() - scoring
            sampled += scored.groups
            complaints += scored.complaints
            metrics.append(scored.metrics)
            useful = sum(has_signal(group.judged_rewards) for group in sampled)
            if useful >= self.num_prompts or self.max_batches == 1:
                break
            share = max(useful, 1) / len(sampled)
            wanted = min(self.num_prompts, math.ceil((self.num_prompts - useful) / share))
        seconds = time.perf_counter() - start - seconds_scoring
        groups = chosen(sampled, self.num_prompts)
        carried = len(self.carrying.carried()) if self.carrying else 0
        return Rollout(groups, tuple(sampled), merge(metrics), tuple(complaints), seconds, carried, self.cursor())

    def _sample(self, count: int) -> tuple[Sequence[Prompt], Sequence[list[Completion]]]:
        """Groups for `count` prompts; which, and maybe some more, with what is carried."""
        if self.carrying is None:
            prompts = self.take(count)
            return prompts, self.generate(prompts, self.params)
        begin = math.ceil(count * self.carrying.oversampling) - len(self.carrying.carried())
        groups = self.carrying.enough(self.take(max(0, begin)), self.params, count)
        return [prompt for prompt, _ in groups], [completions for _, completions in groups]


def stream(
    source: Source, steps: range, version: Callable[[], int], *, max_lag: int = 0
) -> Generator[Rollout, None, None]:
    """A rollout for each step, sampled by the policy of that step or by one at most `max_lag` publications older.

    With a lag of 0 each is sampled when it is asked for, by the policy that will train on it. Otherwise a thread samples
    ahead: the rollout of step s is begun as soon as version s - max_lag is published, while the learner is still busy with
    earlier ones. That is both the bound on staleness and the back-pressure: the thread waits when it is max_lag steps ahead.

    Closing the generator ends the thread after the rollout that it is at.

    Args:
        source: where rollouts come from; used by one thread at a time.
        steps: the numbers of the steps to come; step s trains version s and makes version s + 1 of it.
        version: the number of the version that the samplers hold.
        max_lag: versions.

    Raises:
        Whatever the source raises, where the rollout is asked for.
    """
    if max_lag == 0:
        for _ in steps:
            yield source.rollout()
        return
    done: queue.SimpleQueue[Rollout | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def sample_ahead() -> None:
        try:
            for step in steps:
                while version() < step - max_lag:
                    if stop.wait(_POLL_SECONDS):
                        return
                if stop.is_set():
                    return
                done.put(source.rollout())
        except BaseException as error:  # handed to whoever asks for the rollout
            done.put(error)

    thread = threading.Thread(target=sample_ahead, name="rollouts", daemon=True)
    thread.start()
    try:
        for _ in steps:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        thread.join(_CLOSE_SECONDS)


def chosen(groups: Sequence[Group], count: int) -> tuple[Group, ...]:
    """The first `count` groups with signal; where there are fewer, others fill up. In the order they came in."""
    order = sorted(range(len(groups)), key=lambda place: (not has_signal(groups[place].judged_rewards), place))
    return tuple(groups[place] for place in sorted(order[:count]))
