"""Episodes' environments, each in a process of its own that may hang, die or fork: only its own episode fails.

EnvironmentPool -> a process with the class imported -> one process per episode, forked in milliseconds
"""

from __future__ import annotations

import json
import pickle
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from posttrain.environments import EnvironmentLimits, EnvironmentSpec, Step
from posttrain.errors import RunStopped
from posttrain.types import Prompt, RewardStatus

START_SECONDS = 180.0  # for the environment's imports
BOOT = "import sys; sys.path[:] = {path!r}; from posttrain.environment_process import main; main({number})"


@dataclass(frozen=True, slots=True)
class Failure:
    """An environment that did not answer."""

    status: RewardStatus
    detail: str


Answer = Step | Failure


@dataclass(slots=True)
class _Process:
    pid: int
    connection: Connection


class EnvironmentPool:
    """Runs a recipe's environment on this machine. Several threads may hold sessions.

    Args:
        spec: the class and its options.
        limits: see there.
    """

    def __init__(self, spec: EnvironmentSpec, limits: EnvironmentLimits | None = None) -> None:
        self._spec = spec
        self._limits = limits or EnvironmentLimits()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()  # of the control socket

    @contextmanager
    def session(self, prompts: Sequence[Prompt]) -> Iterator[Session]:
        """One environment for each prompt (a prompt may come several times), reset; all gone at the end of the block.

        Raises:
            RunStopped: the class cannot be imported.
        """
        session = Session(self, prompts, self._limits)
        try:
            yield session
        finally:
            session.close()

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            if self._control is not None:
                self._control.close()  # the process then kills what is left, and ends
            if self._zygote is not None:
                try:
                    self._zygote.wait(20)
                except subprocess.TimeoutExpired:
                    self._zygote.kill()
                    self._zygote.wait()
            self._control = self._zygote = None

    def fork(self) -> _Process:
        """A process for one episode."""
        ours, theirs = socket.socketpair()
        with self._lock:
            control = self._started()
            socket.send_fds(control, [b"f"], [theirs.fileno()])
            pid = self._answer()["pid"]
        theirs.close()
        return _Process(pid, Connection(ours.detach()))

    def kill(self, processes: Sequence[_Process]) -> None:
        """End processes of episodes with everything they started."""
        for process in processes:
            process.connection.close()
        names = json.dumps([process.pid for process in processes]).encode()
        with self._lock:
            if self._zygote is None or self._zygote.poll() is not None:
                return  # and with it all episodes
            control = self._started()
            control.sendall(b"k")
            control.sendall(len(names).to_bytes(8, "big") + names)
            self._answer()

    def _started(self) -> socket.socket:
        if self._control is not None and self._zygote is not None and self._zygote.poll() is None:
            return self._control
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        # Output of an environment goes where ours goes, but not to standard output, which may carry data.
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", BOOT.format(path=sys.path, number=theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        gib = self._limits.max_memory_gib
        payload = pickle.dumps((self._spec, None if gib is None else int(gib * 2**30)))
        ours.sendall(len(payload).to_bytes(8, "big") + payload)
        answer = self._answer()
        if "error" in answer:
            raise RunStopped(f"environment {self._spec.func!r} cannot be imported: {answer['error']}")
        return ours

    def _answer(self) -> dict[str, Any]:
        assert self._control is not None
        line, deadline = b"", time.monotonic() + START_SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))
            part = self._control.recv(65536) if ready else b""
            if not part:
                state = "ended; see its output above" if ready else f"did not start in {START_SECONDS:g} s"
                raise RunStopped(f"the process of environment {self._spec.func!r} {state}")
            line += part
        found: dict[str, Any] = json.loads(line)
        return found


class Session:
    """Some episodes' environments.

    Attributes:
        resets: [episodes], what came of each reset: an empty `Step`, or a `Failure`.
    """

    def __init__(self, pool: EnvironmentPool, prompts: Sequence[Prompt], limits: EnvironmentLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._processes: dict[int, _Process] = {}
        self.resets: list[Answer] = []
        try:
            self.resets = self._ask(range(len(prompts)), [pickle.dumps(prompt) for prompt in prompts])
        except BaseException:
            self.close()
            raise

    def step(self, episodes: Sequence[int], texts: Sequence[str]) -> list[Answer]:
        """Give environments a message of the policy, several at the same time.

        Args:
            episodes: places among the prompts; not one that has failed.
            texts: a message for each.

        Returns:
            For each what it answers. One that failed has no process any more.
        """
        return self._ask(episodes, [json.dumps(text).encode() for text in texts])

    def close(self) -> None:
        """End the episodes' processes."""
        self._end(list(self._processes))

    def _ask(self, episodes: Sequence[int], messages: Sequence[bytes]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        queue = deque(zip(episodes, messages, strict=True))
        deadlines: dict[Connection, tuple[float, int]] = {}
        failed: list[int] = []
        while queue or deadlines:
            while queue and len(deadlines) < self._limits.max_concurrency:
                episode, message = queue.popleft()
                if episode not in self._processes:
                    self._processes[episode] = self._pool.fork()
                connection = self._processes[episode].connection
                try:
                    connection.send_bytes(message)
                except OSError:
                    answers[episode] = Failure("crash", "its process ended")
                    failed.append(episode)
                    continue
                deadlines[connection] = (time.monotonic() + self._limits.timeout_seconds, episode)
            if not deadlines:
                continue
            first = min(deadline for deadline, _ in deadlines.values())
            for ready in wait(list(deadlines), max(0.0, first - time.monotonic())):
                assert isinstance(ready, Connection)
                _, episode = deadlines.pop(ready)
                answers[episode] = _receive(ready)
                if isinstance(answers[episode], Failure):
                    failed.append(episode)
            for connection, (deadline, episode) in list(deadlines.items()):
                if deadline <= time.monotonic():
                    del deadlines[connection]
                    answers[episode] = Failure("timeout", f"no answer within {self._limits.timeout_seconds:g} s")
                    failed.append(episode)
        self._end(failed)
        return [answers[episode] for episode in episodes]

    def _end(self, episodes: Sequence[int]) -> None:
        processes = [self._processes.pop(episode) for episode in episodes if episode in self._processes]
        if processes:
            self._pool.kill(processes)


def _receive(connection: Connection) -> Answer:
    try:
        found = json.loads(connection.recv_bytes())
    except (EOFError, OSError, ValueError):
        return Failure("crash", "its process ended")
    if "error" in found:
        return Failure(found["error"], found["detail"])
    return Step(tuple(found["messages"]), found["reward"], found["done"]) if found else Step()
