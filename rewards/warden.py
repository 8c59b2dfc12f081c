"""Runs a reward function in a process of its own, with a time limit for each call, bounded memory, and no mercy.

    driver or Ray actor: Warden -> zygote (module imported) -> worker (calls the function)

A worker that hangs, dies, or starts too many processes is killed with everything it started, and forked anew; the call that
did it is known by what the worker said before. Nothing here trusts the function to come back: when a call is silent for long,
another worker goes on with those behind it. The processes themselves are `rewards.crew`'s.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from posttrain.types import RewardResult, RewardStatus
from rewards.crew import Crew, Worker
from rewards.processes import descendants, is_working
from rewards.scoring import Item, RewardFunction
from rewards.worker import CHUNK, Call
from rewards.zygote import Bounds

GRACE = 1.0  # seconds that an async worker has, after a time limit of its own, to say so
WARM_UP = 20.0  # seconds more for the very first call, which may have to import what all others then share
LOOK = 0.1  # seconds of silence before a worker is looked at, and between two looks
LATE = 4.0  # times what a call usually takes: then another worker goes on, unless this one computes ...
LATE_SHARE = 0.25  # ... and has this share of its time limit left behind
CRASHES = 2  # deaths of a worker at the same call before the call is to blame


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reward may use, and what is made of its failures."""

    timeout_seconds: float = 10.0  # of one call
    max_memory_gib: float | None = 4.0  # of its process, beyond what importing takes; None is no limit
    max_processes: int = 32  # that it may have running
    max_workers: int = 4  # processes that judge at the same time, while calls hang in the others; 1 waits for each call
    max_concurrency: int = 32  # calls of an async reward at a time
    batch_size: int = 64  # completions in a call of a batched reward
    retries: int = 2  # after a failure of the infrastructure
    on_timeout: float = 0.0  # score of a completion for which judging took too long
    on_crash: float = 0.0  # score of a completion that brings the judge down

    def __post_init__(self) -> None:
        if isinstance(self.max_workers, bool) or not isinstance(self.max_workers, int) or self.max_workers < 1:
            raise ValueError(
                f"max_workers must be a whole number of at least 1, got {self.max_workers!r}; 1 is one call after the other"
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What came of scoring some items."""

    results: tuple[RewardResult, ...]  # one for each item
    counts: dict[str, int]  # event -> how often, see `EVENTS`
    seconds: float  # spent in the function
    complaint: str = ""  # of the last call that failed


# Calls that failed, by how; attempts made again; workers started after the first; processes left behind; workers replaced
# because they had grown.
EVENTS = ("timeout", "crash", "infrastructure", "retried", "restarts", "strays", "recycled")


@dataclass(slots=True)
class _Attempt:
    call: Call
    deaths: int = 0
    outages: int = 0
    alone: bool = False  # sent by itself, to know who is to blame


@dataclass(slots=True)
class _Work:
    """The state of one `Warden.score`."""

    results: list[RewardResult | None]
    queue: deque[_Attempt]
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    complaint: str = ""


class Warden:
    """Scores items with a reward function that it does not trust.

    Args:
        function: what to run.
        limits: see there.

    Raises:
        RewardError: on first use, when the reward's process does not start.
    """

    def __init__(self, function: RewardFunction, limits: Limits | None = None) -> None:
        self._function = function
        self._limits = limits or Limits()
        memory = self._limits.max_memory_gib
        bounds = Bounds(self._limits.timeout_seconds, None if memory is None else int(memory * 2**30))
        self._crew: Crew[_Attempt] = Crew(function, bounds)
        self._is_async = function.form == "async"
        self._has_answered = False
        self._usual = 0.0  # seconds of a call, a running mean of those that were answered

    def __enter__(self) -> Warden:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, groups: Sequence[Sequence[Item]]) -> Report:
        """Judge everything, whatever the function does.

        Args:
            groups: items, those of one prompt together (only a grouped reward cares).

        Returns:
            A report with the results of all items in their order.
        """
        calls = list(self._calls(groups))
        work = _Work([None] * sum(len(group) for group in groups), deque(_Attempt(call) for call in calls))
        hired, strays = self._crew.hired, self._crew.strays
        try:
            while work.queue or self._crew.busy():
                self._step(work)
            self._crew.tidy()
        except ConnectionError:
            self._crew.close()  # everything is judged; the next use starts a new one
        except BaseException:  # answers to these calls are not to be taken for answers to later ones
            self._crew.close()
            raise
        work.counts["strays"] = self._crew.strays - strays
        work.counts["restarts"] = max(0, self._crew.hired - max(hired, 1))
        results = tuple(result for result in work.results if result is not None)
        assert len(results) == len(work.results)
        return Report(results, {name: work.counts[name] for name in EVENTS}, work.seconds, work.complaint)

    def close(self) -> None:
        """End all processes."""
        self._crew.close()

    # --- calls ---------------------------------------------------------------------------------------------------------

    def _calls(self, groups: Sequence[Sequence[Item]]) -> list[Call]:
        size = self._limits.batch_size
        flat = [item for group in groups for item in group]
        if self._function.form == "batch":
            starts = range(0, len(flat), size)
            return [Call(tuple(range(s, min(s + size, len(flat)))), tuple(flat[s : s + size])) for s in starts]
        if self._function.form == "group":
            calls, start = [], 0
            for group in groups:
                calls.append(Call(tuple(range(start, start + len(group))), tuple(group)))
                start += len(group)
            return calls
        return [Call((place,), (item,)) for place, item in enumerate(flat)]

    def _next_chunk(self, queue: deque[_Attempt]) -> list[_Attempt]:
        if queue[0].alone:
            return [queue.popleft()]
        size = self._limits.max_concurrency if self._is_async else CHUNK
        chunk: list[_Attempt] = []
        while queue and len(chunk) < size and not queue[0].alone:
            chunk.append(queue.popleft())
        return chunk

    def _step(self, work: _Work) -> None:
        """Give out calls, and take in what there is or see to those who are silent."""
        try:
            self._hand_out(work)
            for worker in self._crew.wait(self._until_next_look()):
                self._hear(worker, work)
            self._look(work)
        except ConnectionError as error:  # the zygote is lost, and with it all workers
            unfinished = [attempt for worker in self._crew.busy() for attempt in worker.give_up()]
            self._crew.close()
            self._judge_unfinished(unfinished, f"infrastructure: {error}", work)

    def _hand_out(self, work: _Work) -> None:
        """Give calls to a worker, if none is at work but such as are late."""
        workers = self._crew.workers
        if not work.queue or any(worker.is_busy and not worker.is_late for worker in workers):
            return
        idle = [worker for worker in workers if not worker.is_busy]
        if work.queue[0].deaths:  # what others used up is not to be held against it again
            for worker in [worker for worker in idle if worker.answers]:
                self._crew.kill(worker)
            idle = [worker for worker in idle if not worker.answers]
        if not idle and len(workers) >= self._limits.max_workers:
            return
        worker = idle[0] if idle else self._crew.hire()
        chunk = self._next_chunk(work.queue)
        try:
            worker.send([attempt.call for attempt in chunk], chunk, one_by_one=not self._is_async)
        except OSError as error:
            self._end(worker, f"infrastructure: {error}", work)
            return
        worker.look_at = worker.since + LOOK
        if self._crew.hired > 1:  # a reward that has needed another one may do so again
            self._crew.prepare()

    def _hear(self, worker: Worker[_Attempt], work: _Work) -> None:
        """Take in one message of a worker."""
        try:
            answer = json.loads(worker.connection.recv_bytes())
            attempt = None if "resident" in answer else worker.waiting[answer["call"]]
        except (EOFError, OSError, ValueError, KeyError):
            self._end(worker, "death: its process ended", work)
            return
        if "results" in answer:  # one that failed may not have come to what takes long the first time
            self._has_answered = True
        if answer.get("imported"):
            self._crew.learn(answer["imported"])
        if attempt is None:
            worker.is_busy = worker.is_late = False
            if worker.waiting:
                self._end(worker, "death: it lost what it was to judge", work)
            else:
                self._look_after(worker, answer["resident"], work)
            return
        del worker.waiting[answer["call"]]
        if answer.get("error") == "memory":  # perhaps the fault of the calls before; they are not to spoil the next
            worker.waiting = {answer["call"]: attempt, **worker.waiting}
            self._end(worker, "memory: out of memory", work)
            return
        if not self._is_async:  # calls of an async reward run side by side and started together
            worker.since = time.monotonic()
            worker.is_late = False
        worker.look_at = time.monotonic() + LOOK
        if worker.answers:  # the first one may have to load something
            self._usual += (answer.get("seconds", 0.0) - self._usual) / 16
        worker.answers += 1
        self._take(attempt, answer, work)

    def _until_next_look(self) -> float:
        """Seconds."""
        next_one = min((min(w.look_at, w.since + self._limit) for w in self._crew.busy()), default=0.0)
        return next_one - time.monotonic()

    @property
    def _limit(self) -> float:
        """Seconds that a worker may be silent."""
        spare = (GRACE if self._is_async else 0.0) + (0.0 if self._has_answered else WARM_UP)
        return self._limits.timeout_seconds + spare

    def _look(self, work: _Work) -> None:
        """End workers that have been silent for too long or started too much, and let others go on where one is late."""
        now = time.monotonic()
        for worker in self._crew.busy():
            silent = now - worker.since
            if silent >= self._limit and not worker.connection.poll(0):
                self._end(worker, "timeout", work)
            elif now >= worker.look_at:
                worker.look_at = now + LOOK
                tree = [worker.pid, *descendants(worker.pid)]
                if len(tree) > 8 * self._limits.max_processes:
                    self._end(worker, f"death: more than {8 * self._limits.max_processes} processes", work)
                elif self._is_late(worker, silent, tree):
                    worker.is_late = True
                    work.queue.extendleft(reversed(worker.take_back()))

    def _is_late(self, worker: Worker[_Attempt], silent: float, tree: Sequence[int]) -> bool:
        """Whether others are to go on. What is only slow is waited for, lest it takes more processors than it was given."""
        if self._is_async or self._limits.max_workers == 1 or not self._has_answered or worker.is_late:
            return worker.is_late
        if silent < max(LOOK, LATE * self._usual):
            return False
        return silent >= LATE_SHARE * self._limit or not any(map(is_working, tree))

    def _take(self, attempt: _Attempt, answer: dict[str, Any], work: _Work) -> None:
        work.seconds += answer.get("seconds", 0.0)
        if "error" in answer:
            self._failed(attempt, answer["error"], answer["detail"], work)
            return
        results = [RewardResult(*result) for result in answer["results"]]
        if any(result.status == "infrastructure" for result in results) and attempt.outages < self._limits.retries:
            self._again(attempt, [result.status == "infrastructure" for result in results], work)
        for place, result in zip(attempt.call.places, results, strict=True):
            work.results[place] = self._scored(result)
            if result.status != "ok":
                work.counts[result.status] += 1

    def _again(self, attempt: _Attempt, which: Sequence[bool], work: _Work) -> None:
        """Queue what the function itself could not judge once more. What it says then replaces what it said now."""
        call = attempt.call
        if self._function.form == "batch":
            kept = [index for index, again in enumerate(which) if again]
            call = Call(tuple(call.places[i] for i in kept), tuple(call.items[i] for i in kept))
        work.counts["retried"] += 1
        work.counts["infrastructure"] -= sum(which)
        time.sleep(0.1 * 2**attempt.outages)
        work.queue.append(_Attempt(call, attempt.deaths, attempt.outages + 1, attempt.alone))

    # --- failures ------------------------------------------------------------------------------------------------------

    def _judge_unfinished(self, unfinished: list[_Attempt], cause: str, work: _Work) -> None:
        if not unfinished:
            return
        kind, _, detail = cause.partition(": ")
        if self._is_async and len(unfinished) > 1:
            # Which of those that ran side by side is to blame shows when each runs alone.
            work.queue.extendleft(_Attempt(a.call, a.deaths, a.outages, alone=True) for a in reversed(unfinished))
            return
        guilty, *innocent = unfinished
        work.queue.extendleft(reversed(innocent))
        self._failed(guilty, kind, detail, work)

    def _failed(self, attempt: _Attempt, kind: str, detail: str, work: _Work) -> None:
        """A call without results: try again, find out who is to blame, or settle what it counts as."""
        work.complaint = f"reward {self._function.name!r}: {kind}{f', {detail}' if detail else ''}"
        if kind in ("death", "memory") and attempt.deaths + 1 < CRASHES:
            # Memory or processes may have been used up by the calls before.
            attempt.deaths += 1
            attempt.alone = True
            work.counts["retried"] += 1
            work.queue.appendleft(attempt)
            return
        if kind == "infrastructure" and attempt.outages < self._limits.retries:
            attempt.outages += 1
            work.counts["retried"] += 1
            time.sleep(0.1 * 2**attempt.outages)
            work.queue.append(attempt)
            return
        if self._function.form == "batch" and len(attempt.call.places) > 1 and kind != "infrastructure":
            halves = (slice(None, len(attempt.call.places) // 2), slice(len(attempt.call.places) // 2, None))
            parts = [Call(attempt.call.places[half], attempt.call.items[half]) for half in halves]
            work.counts["retried"] += 1
            work.queue.extendleft(_Attempt(part, alone=True) for part in reversed(parts))
            return
        status: RewardStatus = {"timeout": "timeout", "infrastructure": "infrastructure"}.get(kind, "crash")  # type: ignore[assignment]
        if status == "timeout" and not detail:
            detail = f"no answer within {self._limits.timeout_seconds:g} s"
        for place in attempt.call.places:
            work.results[place] = self._scored(RewardResult(0.0, status, detail))
            work.counts[status] += 1

    def _scored(self, result: RewardResult) -> RewardResult:
        """The result with the score that the recipe gives to failures."""
        if result.status == "timeout":
            return RewardResult(self._limits.on_timeout, result.status, result.detail)
        if result.status == "crash":
            return RewardResult(self._limits.on_crash, result.status, result.detail)
        return result

    # --- processes -----------------------------------------------------------------------------------------------------

    def _end(self, worker: Worker[_Attempt], cause: str, work: _Work) -> None:
        """Kill a worker, and judge what it owes."""
        self._judge_unfinished(worker.give_up(), cause, work)
        self._crew.kill(worker)

    def _look_after(self, worker: Worker[_Attempt], resident: int, work: _Work) -> None:
        """Replace a worker that has grown, before it fails somebody's call."""
        limit = self._limits.max_memory_gib
        if (limit and resident > limit * 2**30 / 2) or len(descendants(worker.pid)) > self._limits.max_processes:
            work.counts["recycled"] += 1
            self._crew.kill(worker)
