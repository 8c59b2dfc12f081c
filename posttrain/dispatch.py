"""Prompts to samplers and groups back: who samples what, and what is gone on with later.

The algorithm alone, on futures: `posttrain.cluster.SamplerPool` makes the calls.

Every sampler that is free gets prompts from one backlog, no more than it can decode together, so that none runs dry while
another has prompts waiting. `enough` ends before all groups are finished: the longest are left in the engines, with what they
have so far, and are gone on with when the next ones are asked for (partial rollouts; Kimi k1.5, 2501.12599, section 2.6.2).

What a sampler had begun when it was lost is begun again by the others, once: a group counts when it comes from the sampler
that it was last given to.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Protocol

from posttrain.types import Completion, Prompt, SamplingParams

Finished = list[tuple[int, list[Completion]]]  # groups by their tickets

_REPORTS = 2  # a sampler that has others beside it reports when such a part of its share is finished
_LOOK_SECONDS = 0.5  # newcomers are looked for so often


class SamplerLost(Exception):
    """A sampler is gone, with all that it had begun."""


class Samplers(Protocol):
    """What the dispatcher calls."""

    def collect(
        self,
        sampler: int,
        new: Sequence[tuple[int, Prompt]],
        params: SamplingParams,
        tickets: Collection[int],
        count: int,
        due: Collection[int],
    ) -> Future[Finished]:
        """`posttrain.sampler.Sampler.collect`, of one sampler. Raises SamplerLost in the future when that is lost."""

    def hurry(self, sampler: int) -> None:
        """Let a `collect` that runs return with what it has."""

    def serving(self) -> Sequence[int]:
        """Those that may be given prompts now. Waits while there is none, and raises when none will come."""

    def is_lost(self, sampler: int) -> bool:
        """Whether a sampler was given up. Its number does not come again."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A group that was begun."""

    prompt: Prompt
    sampler: int
    version: int  # of the policy then


class Dispatcher:
    """Groups over samplers.

    Args:
        samplers: the calls.
        capacity: groups that one sampler decodes together; with several samplers none gets more at a time.
    """

    def __init__(self, samplers: Samplers, capacity: int) -> None:
        self._samplers = samplers
        self._capacity = max(1, capacity)
        self.requeued = 0  # groups that were begun again because their sampler was lost
        self._tickets = itertools.count()
        # What `enough` leaves for the next time: prompts not begun, groups begun, groups finished that were not needed.
        self._waiting: dict[int, Prompt] = {}
        self._unfinished: dict[int, Unfinished] = {}
        self._surplus: dict[int, tuple[Unfinished, list[Completion]]] = {}

    @property
    def carried(self) -> list[Prompt]:
        """Of groups that `enough` has left for the next time, the oldest first."""
        begun = {**self._unfinished, **{ticket: group for ticket, (group, _) in self._surplus.items()}}
        prompts = {**self._waiting, **{ticket: group.prompt for ticket, group in begun.items()}}
        return [prompt for _, prompt in sorted(prompts.items())]

    def everything(self, prompts: Sequence[Prompt], params: SamplingParams, version: int) -> list[list[Completion]]:
        """All groups, in the order of the prompts."""
        new = {next(self._tickets): prompt for prompt in prompts}
        found = self._gather(deque(new.items()), {}, params, version, len(new), due=set())
        return [found[ticket][1] for ticket in new]

    def enough(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        version: int,
        *,
        count: int,
        max_carries: int,
    ) -> list[tuple[Prompt, list[Completion]]]:
        """Begin these prompts, and return as soon as `count` groups are finished, those carried included.

        Args:
            prompts: to begin.
            params: the same for all calls, or groups would be of two kinds.
            version: of the policy that the samplers hold.
            count: of groups; at most as many as are carried and begun.
            max_carries: versions that a group may be older than this one when it is returned. What has reached that is
                finished and returned, whatever the count.

        Returns:
            The groups that were begun first.
        """
        self._waiting |= {next(self._tickets): prompt for prompt in prompts}
        backlog = deque(sorted(self._waiting.items()))
        self._take_back(backlog, self._unfinished)
        due = {ticket for ticket, group in self._unfinished.items() if version - group.version >= max_carries}
        wanted = count - len(self._surplus)
        self._surplus |= self._gather(backlog, self._unfinished, params, version, wanted, due)
        self._waiting = dict(backlog)
        order = sorted(self._surplus)
        least = sum(version - self._surplus[ticket][0].version >= max_carries for ticket in order)
        groups = [self._surplus.pop(ticket) for ticket in order[: max(count, least)]]
        return [(group.prompt, completions) for group, completions in groups]

    def _gather(
        self,
        backlog: deque[tuple[int, Prompt]],
        running: dict[int, Unfinished],
        params: SamplingParams,
        version: int,
        count: int,
        due: Set[int],
    ) -> dict[int, tuple[Unfinished, list[Completion]]]:
        """Finished groups by ticket: at least `count` and all that are due. The others stay in `backlog` and `running`."""
        done: dict[int, tuple[Unfinished, list[Completion]]] = {}
        calls: dict[Future[Finished], int] = {}

        def take(call: Future[Finished]) -> None:
            sampler = calls.pop(call)
            try:
                finished = call.result()
            except SamplerLost:
                for index in calls.values():  # else what was lost would wait until they are through with theirs
                    self._samplers.hurry(index)
                return
            for ticket, completions in finished:
                # A group that was taken back meanwhile is somebody else's.
                if ticket in running and running[ticket].sampler == sampler:
                    done[ticket] = (running.pop(ticket), completions)

        while len(done) < count or not due <= done.keys():
            serving = self._samplers.serving()
            self._take_back(backlog, running)
            idle = sorted({*serving, *(group.sampler for group in running.values())} - set(calls.values()))
            shares = self._shares(backlog, running, [index for index in idle if index in serving], len(serving))
            for index, share in shares.items():
                running |= {ticket: Unfinished(prompt, index, version) for ticket, prompt in share}
            for index in idle:
                tickets = [ticket for ticket, group in running.items() if group.sampler == index]
                if tickets:
                    enough = self._report_after(count - len(done), tickets, running, bool(backlog))
                    late = due & set(tickets)
                    call = self._samplers.collect(index, shares.get(index, ()), params, tickets, enough, late)
                    calls[call] = index
            for call in wait(calls, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED).done:
                take(call)
        for index in calls.values():
            self._samplers.hurry(index)
        for call in list(calls):
            take(call)
        return done

    def _take_back(self, backlog: deque[tuple[int, Prompt]], running: dict[int, Unfinished]) -> None:
        """Groups whose sampler is lost come first in the backlog, the oldest before the others."""
        lost = [ticket for ticket, group in running.items() if self._samplers.is_lost(group.sampler)]
        for ticket in sorted(lost, reverse=True):
            backlog.appendleft((ticket, running.pop(ticket).prompt))
        self.requeued += len(lost)

    def _report_after(
        self, needed: int, tickets: Sequence[int], running: dict[int, Unfinished], has_backlog: bool
    ) -> int:
        """Groups that a sampler finishes before it reports: all, unless others' may come sooner or more is to come."""
        busy = len({group.sampler for group in running.values()})
        if not has_backlog and needed >= len(running):
            return len(tickets)
        return max(1, min(math.ceil(needed / (_REPORTS * busy if busy > 1 else 1)), len(tickets)))

    def _shares(
        self,
        backlog: deque[tuple[int, Prompt]],
        running: dict[int, Unfinished],
        idle: Sequence[int],
        num_samplers: int,
    ) -> dict[int, list[tuple[int, Prompt]]]:
        """Prompts for the samplers that are idle, one after the other to the one that has least."""
        shares: dict[int, list[tuple[int, Prompt]]] = {index: [] for index in idle}
        load = {index: sum(group.sampler == index for group in running.values()) for index in idle}
        # A single engine queues better than we do.
        room = self._capacity if num_samplers > 1 else math.inf
        while backlog and load and min(load.values()) < room:
            index = min(load, key=lambda index: load[index])
            shares[index].append(backlog.popleft())
            load[index] += 1
        return shares
