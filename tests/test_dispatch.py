"""Groups over samplers, with scripted ones: balance, what is carried, and how old it may get."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from posttrain.dispatch import Dispatcher, Finished, SamplerLost
from posttrain.types import Completion, Prompt, SamplingParams

PARAMS = SamplingParams(8, num_generations=2)


class Engines:
    """Sampler k takes a step each `seconds[k]`; a group is finished after as many steps as its prompt's answer says."""

    def __init__(self, seconds: Sequence[float], failing: int | None = None) -> None:
        self.seconds = seconds
        self.failing = failing
        self.admitted = list(range(len(seconds)))
        self.lost: set[int] = set()
        self._calls: list[list[Future[Finished]]] = [[] for _ in seconds]
        self.left: list[dict[int, int]] = [{} for _ in seconds]
        self.most = [0 for _ in seconds]  # groups that it held at once
        self.begun: list[tuple[int, int]] = []  # sampler, ticket
        self.version = 0
        self._begun_by: dict[int, int] = {}
        self._hurries = [0 for _ in seconds]
        self._threads = ThreadPoolExecutor(len(seconds))
        self._lock = threading.Lock()

    def collect(
        self,
        sampler: int,
        new: Sequence[tuple[int, Prompt]],
        params: SamplingParams,
        tickets: Collection[int],
        count: int,
        due: Collection[int],
    ) -> Future[Finished]:
        assert set(due) <= set(tickets) and 0 < count <= len(tickets) and sampler not in self.lost
        answer: Future[Finished] = Future()
        self._calls[sampler].append(answer)

        def run() -> None:
            try:
                found = self._collect(sampler, list(new), list(tickets), count, set(due))
            except RuntimeError as error:
                answer.set_exception(error)
                return
            if not answer.done():
                answer.set_result(found)

        self._threads.submit(run)
        return answer

    def hurry(self, sampler: int) -> None:
        self._hurries[sampler] += 1

    def serving(self) -> list[int]:
        return [index for index in self.admitted if index not in self.lost]

    def is_lost(self, sampler: int) -> bool:
        return sampler in self.lost

    def lose(self, sampler: int) -> None:
        """With all it had begun; what it is doing comes to nothing."""
        self.lost.add(sampler)
        for call in list(self._calls[sampler]):
            if not call.done():
                call.set_exception(SamplerLost("killed"))

    def _collect(
        self, sampler: int, new: list[tuple[int, Prompt]], tickets: list[int], count: int, due: set[int]
    ) -> Finished:
        if sampler == self.failing:
            raise RuntimeError("this one is broken")
        left, hurries = self.left[sampler], self._hurries[sampler]
        for ticket, prompt in new:
            left[ticket] = int(prompt.answer or 1)
            self._begun_by[ticket] = self.version
            with self._lock:
                self.begun.append((sampler, ticket))
        assert set(tickets) == left.keys(), "groups go on where they were begun"
        self.most[sampler] = max(self.most[sampler], len(left))

        def ready() -> list[int]:
            return [ticket for ticket, steps in left.items() if steps <= 0]

        while len(ready()) < count or not due <= set(ready()):
            if self._hurries[sampler] > hurries or sampler in self.lost:
                break
            time.sleep(self.seconds[sampler])
            for ticket in left:
                left[ticket] -= 1
        found = ready()
        for ticket in found:
            del left[ticket]
        return [(ticket, [Completion((1,), (0.0,), "stop", str(ticket), self._begun_by[ticket])]) for ticket in found]


def prompts(*steps: int) -> list[Prompt]:
    return [Prompt(f"p{number}", (), (1,), str(count)) for number, count in enumerate(steps)]


@pytest.mark.parametrize("samplers", [[0], [0, 1], [1, 2]])
def test_everything_comes_in_order(samplers: list[int]) -> None:
    engines = Engines([0.0005, 0.001, 0.0005])
    engines.admitted = samplers
    groups = Dispatcher(engines, capacity=3).everything(prompts(9, 1, 5, 1, 7, 2, 2, 8, 1, 3), PARAMS, 0)
    assert [group[0].text for group in groups] == [str(ticket) for ticket in range(10)]
    assert {sampler for sampler, _ in engines.begun} == set(samplers)


def test_a_slow_sampler_gets_less() -> None:
    engines = Engines([0.0002, 0.02])
    Dispatcher(engines, capacity=2).everything(prompts(*[3] * 40), PARAMS, 0)
    counts = [sum(sampler == index for sampler, _ in engines.begun) for index in range(2)]
    assert counts[0] > 3 * counts[1] and engines.most == [2, 2]


def test_one_engine_is_given_all_at_once() -> None:
    engines = Engines([0.0002])
    Dispatcher(engines, capacity=2).everything(prompts(*[3] * 9), PARAMS, 0)
    assert engines.most == [9]


def test_what_is_long_is_carried_and_comes_first_next_time() -> None:
    engines = Engines([0.0005])
    dispatcher = Dispatcher(engines, capacity=8)

    def enough(*steps: int, version: int) -> list[str]:
        found = dispatcher.enough(prompts(*steps), PARAMS, version, count=2, max_carries=2)
        return [f"{prompt.answer}/{group[0].text}" for prompt, group in found]

    assert enough(100, 3, 2, version=0) == ["3/1", "2/2"]
    assert [prompt.answer for prompt in dispatcher.carried] == ["100"]
    assert enough(1, 2, version=1) == ["1/3", "2/4"]
    assert enough(1, 2, version=2) == ["100/0", "1/5"]  # its time has come, so it was waited for
    assert [prompt.answer for prompt in dispatcher.carried] == ["2"]  # finished meanwhile, and not needed
    assert enough(50, 60, 4, version=3) == ["2/6", "4/9"]


@pytest.mark.parametrize("num_samplers", [1, 3])
def test_no_group_is_lost_repeated_or_too_old(num_samplers: int) -> None:
    rng = random.Random(num_samplers)
    engines = Engines([0.0001 * (1 + index) for index in range(num_samplers)])
    dispatcher = Dispatcher(engines, capacity=3)
    begun, returned, carried = 0, [], []
    for version in range(30):
        engines.version = version
        wanted = 12 - len(dispatcher.carried)
        new = [Prompt(f"p{begun + number}", (), (1,), str(rng.randint(1, 40))) for number in range(wanted)]
        begun += wanted
        found = dispatcher.enough(new, PARAMS, version, count=8, max_carries=1 + num_samplers % 2)
        assert len(found) == 8
        for prompt, (completion,) in found:
            returned.append(prompt.id)
            assert prompt.id == f"p{completion.text}"
            assert version - completion.policy_version <= 1 + num_samplers % 2
        carried.append(len(dispatcher.carried))
        assert carried[-1] == 4
    rest = {prompt.id for prompt in dispatcher.carried}
    assert len(set(returned)) == len(returned) and {*returned, *rest} == {f"p{number}" for number in range(begun)}


def test_an_engine_that_fails_is_heard_of() -> None:
    with pytest.raises(RuntimeError, match="this one is broken"):
        Dispatcher(Engines([0.001, 0.001], failing=1), capacity=1).everything(prompts(5, 5, 5), PARAMS, 0)


@pytest.mark.parametrize("seed", range(8))
def test_what_a_lost_sampler_had_begun_comes_from_the_others_once(seed: int) -> None:
    rng = random.Random(seed)
    engines = Engines([0.0005, 0.0005, 0.0005])
    dispatcher = Dispatcher(engines, capacity=6)
    killer = threading.Timer(rng.uniform(0.001, 0.02), engines.lose, [rng.randrange(3)])
    killer.start()
    groups = dispatcher.everything(prompts(*[rng.randint(1, 30) for _ in range(40)]), PARAMS, 0)
    killer.join()
    assert [group[0].text for group in groups] == [str(ticket) for ticket in range(40)]
    begun = [ticket for _, ticket in engines.begun]
    assert len(begun) - len(set(begun)) <= dispatcher.requeued <= 6


def test_carried_groups_of_a_sampler_that_is_lost_between_two_rollouts_are_begun_anew() -> None:
    engines = Engines([0.0005, 0.0005])
    dispatcher = Dispatcher(engines, capacity=4)
    dispatcher.enough(prompts(80, 1, 90, 1), PARAMS, 0, count=2, max_carries=1)
    carried = len(dispatcher.carried)
    engines.lose(0)
    engines.version = 1
    found = dispatcher.enough([], PARAMS, 1, count=2, max_carries=1)
    assert carried == len(found) == 2 and {prompt.answer for prompt, _ in found} == {"80", "90"}
    assert dispatcher.requeued >= 1 and not dispatcher.carried
    assert {group[0].policy_version for _, group in found} >= {1}  # by the policy of now


def test_a_newcomer_gets_prompts_of_the_rollout_that_runs() -> None:
    engines = Engines([0.001, 0.001])
    engines.admitted = [0]
    threading.Timer(0.05, engines.admitted.append, [1]).start()
    dispatcher = Dispatcher(engines, capacity=100)
    threading.Timer(0.2, engines.lose, [0]).start()
    groups = dispatcher.everything(prompts(*[300] * 6), PARAMS, 0)
    assert [group[0].text for group in groups] == [str(ticket) for ticket in range(6)]
    assert {sampler for sampler, _ in engines.begun} == {0, 1}
