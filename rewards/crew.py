"""The processes that judge: a zygote with the reward's module imported, and the workers that are forked from it.

Each worker has a pipe of tickets beside its socket. The numbers of the calls that it was sent lie in the pipe, it draws one
before each call, and what it has not drawn can be drawn here: the kernel gives each ticket to one reader, so a call that was
taken back is never made. Orders to the zygote (fork, kill) are not waited for; its answers are read when they are needed.

Nothing here knows what an answer means; that is `rewards.warden`'s.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from rewards.errors import RewardError
from rewards.scoring import RewardFunction
from rewards.worker import CHUNK, Call
from rewards.zygote import Bounds, order

START_SECONDS = 180.0  # for the reward's imports
BOOT = "import sys; sys.path[:] = {path!r}; from rewards.zygote import main; main({number})"

T = TypeVar("T")


class Worker(Generic[T]):
    """One process, and what it owes an answer to.

    Attributes:
        waiting: number of a call in what was sent -> whose call it is, in the order of the calls.
        since: when the call that it is at was started.
        look_at: when it is to be looked at next.
        is_late: it has been silent for so long that others go on without it.
        answers: how many it has given.
        pid: 0 as long as the zygote has not said it.
    """

    def __init__(self, number: int, connection: Connection, tickets: tuple[int, int]) -> None:
        self.number = number
        self.connection = connection
        self.waiting: dict[int, T] = {}
        self.since = self.look_at = 0.0
        self.is_late = self.is_busy = False
        self.answers = 0
        self.pid = 0
        self._tickets, self._counter = tickets  # the pipe's ends for reading and writing

    def send(self, calls: Sequence[Call], owners: Sequence[T], one_by_one: bool) -> None:
        """Have calls made; of those to be made one by one at most `CHUNK`. It must be idle.

        Raises:
            OSError: it is gone.
        """
        self.waiting = dict(enumerate(owners))
        self.is_busy, self.is_late = True, False
        if one_by_one:
            os.write(self._counter, bytes(self.waiting))
        self.connection.send_bytes(pickle.dumps(calls))
        self.since = time.monotonic()

    def take_back(self) -> list[T]:
        """The calls that it has not begun with; it never will."""
        with contextlib.suppress(BlockingIOError):
            return [self.waiting.pop(number) for number in os.read(self._tickets, CHUNK) if number in self.waiting]
        return []

    def give_up(self) -> list[T]:
        """All that it owes; no answer is expected any more."""
        owed = list(self.waiting.values())
        self.waiting = {}
        return owed

    def close(self) -> None:
        """Let go of it."""
        self.connection.close()
        os.close(self._tickets)
        os.close(self._counter)


class Crew(Generic[T]):
    """The workers of one reward.

    Args:
        function: what they run.
        bounds: what each may use.

    Attributes:
        workers: those in use.
        hired: how many there have been, the spare ones left out.
        strays: how many processes they left behind, as far as the zygote's answers have been read.
    """

    def __init__(self, function: RewardFunction, bounds: Bounds) -> None:
        self.workers: list[Worker[T]] = []
        self.hired = self.strays = 0
        self._function = function
        self._bounds = bounds
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._spare: Worker[T] | None = None  # forked ahead: whoever takes the place of a worker does not wait for it
        self._forks = 0
        self._asked: deque[Worker[T] | None] = deque()  # what the zygote has yet to answer; a worker where it forks one
        self._text = b""  # of its answers, not read to the end of a line
        self._poll = select.poll()
        self._listening: dict[int, Worker[T]] = {}

    def busy(self) -> list[Worker[T]]:
        """The workers that are at something."""
        return [worker for worker in self.workers if worker.is_busy]

    def hire(self) -> Worker[T]:
        """A worker that has done nothing yet.

        Raises:
            RewardError: the zygote does not start.
            ConnectionError: it was lost.
        """
        if self._zygote is None or self._zygote.poll() is not None:
            self._start()
        worker, self._spare = self._spare or self._fork(), None
        self.workers.append(worker)
        while not worker.pid:
            self._read_answer()
        self._listening[worker.connection.fileno()] = worker
        self._poll.register(worker.connection.fileno(), select.POLLIN)
        self.hired += 1
        return worker

    def prepare(self) -> None:
        """Have a spare worker forked. Raises ConnectionError."""
        if self._spare is None:
            self._spare = self._fork()

    def wait(self, seconds: float) -> list[Worker[T]]:
        """Those that have something to say, which is waited for."""
        found = self._poll.poll(max(0, math.ceil(seconds * 1000)))
        return [self._listening[number] for number, _ in found]

    def kill(self, worker: Worker[T]) -> None:
        """End a worker with all that it started. Raises ConnectionError."""
        self.workers.remove(worker)
        self._poll.unregister(worker.connection.fileno())
        del self._listening[worker.connection.fileno()]
        worker.close()
        self._ask(order(b"k", worker.number))
        if not self.busy():  # an orphan may be at work for any of those that are
            self._ask(order(b"s"))

    def learn(self, modules: Sequence[str]) -> None:
        """Let all later workers have modules. Raises ConnectionError."""
        names = json.dumps(list(modules)).encode()
        self._ask(order(b"i", len(names)) + names)
        if self._spare is not None:
            self._spare.close()
            self._ask(order(b"k", self._spare.number))
            self._spare = None

    def tidy(self) -> None:
        """Keep the worker that knows most, and end what was left behind. All must be idle. Raises ConnectionError."""
        for worker in sorted(self.workers, key=lambda worker: worker.answers)[:-1]:
            self.kill(worker)
        if self._zygote is not None:
            self._ask(order(b"s"))
        while self._asked:
            self._read_answer()

    def close(self) -> None:
        """End all processes."""
        for worker in [*self.workers, *([self._spare] if self._spare else [])]:
            worker.close()
        if self._control is not None:
            self._control.close()  # the zygote kills what is left, and ends
        if self._zygote is not None:
            try:
                self._zygote.wait(20)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        self._zygote = self._control = self._spare = None
        self.workers, self._listening, self._poll = [], {}, select.poll()
        self._asked.clear()
        self._text = b""

    # --- the zygote ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
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
        payload = pickle.dumps((self._function, self._bounds))
        named = f"reward {self._function.name!r}"
        try:
            ours.sendall(len(payload).to_bytes(8, "big") + payload)
            answer = json.loads(self._line())
        except ConnectionError:
            raise RewardError(f"the process of {named} ended; see its output above") from None
        if "error" in answer:
            raise RewardError(f"{named} ({self._function.function}): {answer['error']}")

    def _fork(self) -> Worker[T]:
        assert self._control is not None
        ours, theirs = socket.socketpair()
        drawn, written = os.pipe()
        os.set_blocking(drawn, False)  # for both sides: no ticket is the end of a chunk
        self._forks += 1
        worker: Worker[T] = Worker(self._forks, Connection(ours.detach()), (drawn, written))
        try:
            socket.send_fds(self._control, [order(b"f", worker.number)], [theirs.fileno(), drawn])
        except OSError:
            worker.close()
            raise
        finally:
            theirs.close()
        self._asked.append(worker)
        return worker

    def _ask(self, words: bytes) -> None:
        assert self._control is not None
        self._control.sendall(words)
        self._asked.append(None)

    def _read_answer(self) -> None:
        answer = json.loads(self._line())
        worker = self._asked.popleft()
        if worker is not None:
            worker.pid = answer["pid"]
        self.strays += answer.get("strays", 0)

    def _line(self) -> bytes:
        """The zygote's next line. Raises ConnectionError when it is gone."""
        assert self._control is not None
        deadline = time.monotonic() + START_SECONDS
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RewardError(f"the process of reward {self._function.name!r} said nothing for {START_SECONDS:g} s")
            part = self._control.recv(65536)
            if not part:
                raise ConnectionError("the process that workers are forked from ended")
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return line
