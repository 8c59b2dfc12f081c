"""Runs a reward function in a process of its own, with a time limit for each call, bounded memory, and no mercy.

    driver or Ray actor: Warden -> zygote (module imported) -> worker (calls the function)

A worker that hangs, dies, or starts too many processes is killed with everything it started, and forked anew; the call that
did it is known by what the worker said before. Nothing here trusts the function to come back.
"""

from __future__ import annotations

import json
import pickle
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from posttrain.types import RewardResult, RewardStatus
from rewards.errors import RewardError
from rewards.processes import descendants
from rewards.scoring import Item, RewardFunction
from rewards.worker import Call
from rewards.zygote import Bounds

START_SECONDS = 180.0  # for the reward's imports
CHUNK = 64  # calls sent to a plain worker at once
GRACE = 1.0  # seconds that an async worker has, after a time limit of its own, to say so
WARM_UP = 20.0  # seconds more for the very first call, which may have to import what all others then share
LOOK = 0.2  # seconds between two looks at what the worker has started
CRASHES = 2  # deaths of a worker at the same call before the call is to blame
BOOT = "import sys; sys.path[:] = {path!r}; from rewards.zygote import main; main({number})"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reward may use, and what is made of its failures."""

    timeout_seconds: float = 10.0  # of one call
    max_memory_gib: float | None = 4.0  # of its process, beyond what importing takes; None is no limit
    max_processes: int = 32  # that it may have running
    max_concurrency: int = 32  # calls of an async reward at a time
    batch_size: int = 64  # completions in a call of a batched reward
    retries: int = 2  # after a failure of the infrastructure
    on_timeout: float = 0.0  # score of a completion for which judging took too long
    on_crash: float = 0.0  # score of a completion that brings the judge down


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
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._worker: Connection | None = None
        self._worker_pid = 0
        self._forks = 0
        self._has_answered = False

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
        forks = self._forks
        while work.queue:
            chunk = self._next_chunk(work.queue)
            try:
                self._ensure_worker()
                unfinished, cause = self._run(chunk, work)
            except (BrokenPipeError, ConnectionError) as error:
                unfinished, cause = chunk, f"infrastructure: {error}"
                self._restart()
            self._judge_unfinished(unfinished, cause, work)
        work.counts["strays"] += self._command(b"s").get("strays", 0) if self._zygote else 0
        work.counts["restarts"] = max(0, self._forks - max(forks, 1))
        results = tuple(result for result in work.results if result is not None)
        assert len(results) == len(work.results)
        return Report(results, {name: work.counts[name] for name in EVENTS}, work.seconds, work.complaint)

    def close(self) -> None:
        """End all processes."""
        if self._worker is not None:
            self._worker.close()
        if self._control is not None:
            self._control.close()  # the zygote kills what is left, and ends
        if self._zygote is not None:
            try:
                self._zygote.wait(20)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        self._worker = self._control = self._zygote = None
        self._worker_pid = 0

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
        size = self._limits.max_concurrency if self._function.form == "async" else CHUNK
        chunk: list[_Attempt] = []
        while queue and len(chunk) < size and not queue[0].alone:
            chunk.append(queue.popleft())
        return chunk

    def _run(self, chunk: list[_Attempt], work: _Work) -> tuple[list[_Attempt], str]:
        """Send a chunk and take in what comes back. Returns the attempts without an answer, and why there is none."""
        assert self._worker is not None
        waiting = dict(enumerate(chunk))
        self._worker.send_bytes(pickle.dumps([attempt.call for attempt in chunk]))
        is_async = self._function.form == "async"
        limit = self._limits.timeout_seconds + (GRACE if is_async else 0.0)
        deadline = time.monotonic() + limit + (0.0 if self._has_answered else WARM_UP)
        while True:
            left = deadline - time.monotonic()
            if not self._worker.poll(max(0.0, min(LOOK, left))):
                if left <= 0:
                    self._kill_worker(work)
                    return list(waiting.values()), "timeout"
                if len(descendants(self._worker_pid)) > 8 * self._limits.max_processes:
                    self._kill_worker(work)
                    return list(waiting.values()), f"death: more than {8 * self._limits.max_processes} processes"
                continue
            try:
                answer = json.loads(self._worker.recv_bytes())
            except (EOFError, OSError, ValueError):
                self._kill_worker(work)
                return list(waiting.values()), "death: its process ended"
            self._has_answered = True
            if answer.get("imported"):
                names = json.dumps(answer["imported"]).encode()
                self._command(b"i", len(names).to_bytes(8, "big") + names)
            if "resident" in answer:
                self._look_after(answer["resident"], work)
                return [], ""
            if answer.get("error") == "memory":  # perhaps the fault of the calls before; they are not to spoil the next
                self._kill_worker(work)
                return [waiting.pop(answer["call"]), *waiting.values()], "memory: out of memory"
            self._take(waiting.pop(answer["call"]), answer, work)
            if not is_async:  # calls of an async reward run side by side and started together
                deadline = time.monotonic() + limit

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
        if self._function.form == "async" and len(unfinished) > 1:
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

    def _ensure_worker(self) -> None:
        if self._zygote is None or self._zygote.poll() is not None:
            self._restart()
        if self._worker is None:
            ours, theirs = socket.socketpair()
            assert self._control is not None
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            theirs.close()
            self._worker_pid = self._answer()["pid"]
            self._worker = Connection(ours.detach())
            self._forks += 1

    def _restart(self) -> None:
        """A new zygote."""
        self.close()
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        boot = BOOT.format(path=sys.path, number=theirs.fileno())
        # Output of a reward goes where ours goes, but not to standard output, which may carry data.
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", boot],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        limits = self._limits
        memory = None if limits.max_memory_gib is None else int(limits.max_memory_gib * 2**30)
        bounds = Bounds(limits.timeout_seconds, memory)
        payload = pickle.dumps((self._function, bounds))
        ours.sendall(len(payload).to_bytes(8, "big") + payload)
        answer = self._answer()
        if "error" in answer:
            raise RewardError(f"reward {self._function.name!r} ({self._function.function}): {answer['error']}")

    def _answer(self) -> dict[str, Any]:
        """The zygote's next line."""
        assert self._control is not None
        line = b""
        deadline = time.monotonic() + START_SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RewardError(f"the process of reward {self._function.name!r} did not start in {START_SECONDS:g} s")
            part = self._control.recv(65536)
            if not part:
                raise RewardError(f"the process of reward {self._function.name!r} ended; see its output above")
            line += part
        found: dict[str, Any] = json.loads(line)
        return found

    def _command(self, command: bytes, argument: bytes = b"") -> dict[str, Any]:
        assert self._control is not None
        self._control.sendall(command)
        self._control.sendall(argument)
        return self._answer()

    def _kill_worker(self, work: _Work) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker, self._worker_pid = None, 0
            work.counts["strays"] += self._command(b"k")["strays"]

    def _look_after(self, resident: int, work: _Work) -> None:
        """Replace a worker that has grown, before it fails somebody's call."""
        limit = self._limits.max_memory_gib
        if (limit and resident > limit * 2**30 / 2) or len(descendants(self._worker_pid)) > self._limits.max_processes:
            work.counts["recycled"] += 1
            self._kill_worker(work)
