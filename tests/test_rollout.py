"""The stream of rollouts, with scripted sampler and rewards: dynamic sampling, what is counted, what is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import pytest

from posttrain.metrics import Metric
from posttrain.reward_pool import Scored
from posttrain.rollout import Rollout, Source, chosen, stream
from posttrain.types import Completion, Group, Prompt, SamplingParams

PARAMS = SamplingParams(8, num_generations=2)


def prompts() -> Iterator[Prompt]:
    for number in count():
        yield Prompt(f"p{number}", ({"role": "user", "content": str(number)},), (1,), str(number))


def generate(asked: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
    text = Completion((5, 6), (-1.0, -1.0), "stop", "x", policy_version=3)
    return [[text] * params.num_generations for _ in asked]


class Rewards:
    """Every `every`-th prompt has signal."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.calls: list[int] = []

    def __call__(self, asked: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scored:
        self.calls.append(len(asked))
        groups = []
        for prompt, row in zip(asked, completions, strict=True):
            rewards = (0.0, 1.0) if int(prompt.answer or 0) % self.every == 0 else (0.5, 0.5)
            groups.append(Group(prompt, tuple(row), rewards, {"r": rewards}))
        return Scored(tuple(groups), {"reward/r/retried": Metric(1, "sum")}, ("hm",))


def rollouts(rewards: Rewards, num_prompts: int, max_batches: int) -> Iterator[Rollout]:
    source = prompts()
    made = Source(
        lambda number: list(islice(source, number)),
        generate,
        rewards,
        num_prompts=num_prompts,
        params=PARAMS,
        max_batches=max_batches,
    )
    return stream(made, range(9), lambda: 0)


class Policy:
    """A source whose completions carry the version that is published when their sampling begins."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.version = 0
        self.begun: list[int] = []
        self.seconds = seconds
        numbers = count()
        self.source = Source(
            lambda number: [Prompt(f"p{next(numbers)}", (), (1,)) for _ in range(number)],
            self.generate,
            Rewards(every=1),
            num_prompts=2,
            params=PARAMS,
            cursor=lambda: {"position": 2 * len(self.begun)},
        )

    def generate(self, asked: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        self.begun.append(self.version)
        time.sleep(self.seconds)
        text = Completion((5,), (-1.0,), "stop", "x", policy_version=self.begun[-1])
        return [[text] * params.num_generations for _ in asked]


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_no_sample_is_older_than_the_lag_and_none_is_begun_too_soon(max_lag: int) -> None:
    policy = Policy()
    lags, ahead = [], []
    for step, batch in enumerate(stream(policy.source, range(8), lambda: policy.version, max_lag=max_lag)):
        time.sleep(0.05)  # the learner; whoever may sample ahead does so now
        lags.append(step - batch.completions[0].policy_version)
        ahead.append(len(policy.begun) - step - 1)
        assert batch.cursor == {"position": 2 * (step + 1)}  # of this batch, not of what was sampled ahead
        policy.version += 1
    assert lags == [min(step, max_lag) for step in range(8)]
    assert max(ahead) == max_lag and len(policy.begun) == 8


def test_sampling_goes_on_while_the_learner_learns() -> None:
    policy = Policy(seconds=0.1)
    start = time.monotonic()
    for _ in stream(policy.source, range(10), lambda: policy.version, max_lag=1):
        time.sleep(0.1)
        policy.version += 1
    assert time.monotonic() - start < 1.6  # one after the other it would be 2


def test_an_error_comes_to_whoever_asks_and_closing_ends_the_thread() -> None:
    policy = Policy()

    def fail(asked: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        raise RuntimeError("no sampler")

    broken = replace(policy.source, generate=fail)
    with pytest.raises(RuntimeError, match="no sampler"):
        next(stream(broken, range(3), lambda: 0, max_lag=1))
    before = threading.active_count()
    rollouts = stream(policy.source, range(99), lambda: policy.version, max_lag=1)
    next(rollouts)
    assert threading.active_count() == before + 1
    rollouts.close()
    assert threading.active_count() == before


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def test_without_dynamic_sampling_a_batch_is_what_was_sampled() -> None:
    rewards = Rewards(every=4)
    first, second = islice(rollouts(rewards, 4, 1), 2)
    assert ids(first.groups) == ids(first.sampled) == ["p0", "p1", "p2", "p3"]
    assert ids(second.groups) == ["p4", "p5", "p6", "p7"]
    assert rewards.calls == [4, 4]


def test_groups_without_signal_are_replaced_and_no_more_is_sampled_than_needed() -> None:
    rewards = Rewards(every=2)
    (batch,) = islice(rollouts(rewards, 8, 5), 1)
    assert rewards.calls == [8, 8]  # four of eight have signal, so eight more for the other four
    assert ids(batch.groups) == [f"p{number}" for number in range(0, 16, 2)]
    values = {name: metric.value for name, metric in batch.metrics(3).items()}
    assert values["groups/sampled"] == 16 and values["groups/with_signal"] == 0.5
    assert values["reward/mean"] == pytest.approx(0.5)  # of all that was sampled
    assert values["reward/r/retried"] == 2
    assert batch.complaints == ("hm", "hm")


def test_the_last_batch_is_smaller_and_the_number_of_batches_is_bounded() -> None:
    rewards = Rewards(every=1)
    next(rollouts(rewards, 8, 5))
    assert rewards.calls == [8]
    rewards = Rewards(every=8)
    (batch,) = islice(rollouts(rewards, 8, 3), 1)
    assert rewards.calls == [8, 8, 8]
    assert ids(batch.groups)[:3] == ["p0", "p1", "p2"]  # the first without signal fill up
    assert {"p0", "p8", "p16"} <= set(ids(batch.groups)) and len(batch.groups) == 8


def test_chosen_keeps_the_order() -> None:
    scored = Rewards(every=3)(list(islice(prompts(), 7)), generate(list(islice(prompts(), 7)), PARAMS))
    assert ids(chosen(scored.groups, 4)) == ["p0", "p1", "p3", "p6"]
