"""Sandboxes kept ready: starting one takes longer than most programs run, so it happens ahead.

A sandbox is used for one program and thrown away, so nothing passes from one program to the next.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from rewards.sandbox import launch
from rewards.sandbox.limits import Limits, Mode
from rewards.sandbox.process import Sandbox
from rewards.sandbox.toolchain import find_toolchain


class Pool:
    """At most `workers` sandboxes in use, whoever asks for more waits; up to `warm` more stand ready.

    For any number of threads. Sandboxes are started by one thread of the pool's own, because bubblewrap's
    --die-with-parent means the thread that started it.

    Args:
        mode: "bubblewrap" or "landlock".
        python: the interpreter of the programs; see `launch.find_interpreter`.
        workers: programs that run at a time.
        warm: sandboxes started ahead; 0 starts each when it is asked for.
        language: of the programs; see `languages.LANGUAGES`.

    Raises:
        SandboxUnavailableError: bubblewrap, Landlock, a usable Python or a tool of the language is missing.
        ValueError: unknown mode or language, no worker, or a negative number of warm ones.
    """

    def __init__(
        self, mode: Mode, python: str | None = None, workers: int = 1, warm: int = 1, language: str = "python"
    ) -> None:
        if workers < 1 or warm < 0:
            raise ValueError(f"a pool needs at least 1 worker and 0 warm ones, got workers={workers}, warm={warm}")
        self._interpreter = launch.find_interpreter(python)
        toolchain = find_toolchain(language)
        # Says now what is missing.
        launch.command(mode, self._interpreter, info=0, tools=None if toolchain is None else toolchain.readable)
        self._start: Callable[[], Sandbox] = partial(Sandbox, mode, self._interpreter, toolchain)
        self._warm = warm
        self._slots = threading.BoundedSemaphore(workers)
        self._changed = threading.Condition()
        self._ready: deque[Sandbox | OSError] = deque()
        self._waiting = 0  # callers without a sandbox
        self._in_use = 0
        self._closed = False
        self._starter = threading.Thread(target=self._keep_warm, name="sandbox-starter", daemon=True)
        self._starter.start()

    @contextlib.contextmanager
    def sandbox(self, program: str | Mapping[str, str], limits: Limits) -> Iterator[Sandbox]:
        """A sandbox with the program loaded, see `Sandbox.load`; on leaving, everything in it is killed and gone.

        Raises:
            OSError: no process can be started.
            RuntimeError: the pool is closed.
        """
        with self._slots:
            sandbox = self._take()
            try:
                sandbox.load(program, limits)
                yield sandbox
            finally:
                sandbox.close()
                with self._changed:
                    self._in_use -= 1
                    self._changed.notify_all()

    def close(self) -> None:
        """Take no more callers, wait for the sandboxes in use, end those that stand ready."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._starter.join()

    def _take(self) -> Sandbox:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._closed)
            self._waiting -= 1
            if self._closed:
                raise RuntimeError("the pool of sandboxes is closed")
            taken = self._ready.popleft()
            self._changed.notify_all()
            if isinstance(taken, OSError):
                raise taken
            self._in_use += 1
            return taken

    def _keep_warm(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._warm + self._waiting)
                if self._closed:
                    break
            started: Sandbox | OSError
            try:
                started = self._start()
            except OSError as error:  # no process, no memory: for a caller to know
                started = error
            with self._changed:
                self._ready.append(started)
                self._changed.notify_all()
        # With the end of this thread the sandboxes that it started die, bubblewrap first, which then reaps nobody.
        with self._changed:
            self._changed.wait_for(lambda: not self._in_use)
        for sandbox in self._ready:
            if isinstance(sandbox, Sandbox):
                sandbox.close()
        self._ready.clear()


_pools: dict[tuple[int, Mode, str | None, str], Pool] = {}
_lock = threading.Lock()


def shared_pool(mode: Mode, python: str | None = None, language: str = "python") -> Pool:
    """This process's pool: one worker per usable core. Made at the first call. A forked child gets its own.

    As many sandboxes stand ready for Python; for other languages none, since compiling takes longer than a start.

    Raises what `Pool` raises.
    """
    key = (os.getpid(), mode, python, language)
    with _lock:
        if key not in _pools:
            cores = len(os.sched_getaffinity(0))
            warm = cores if language == "python" else 0
            _pools[key] = Pool(mode, python, workers=cores, warm=warm, language=language)
        return _pools[key]


@atexit.register
def close_shared_pools() -> None:
    """Close this process's pools; the next `shared_pool` makes a new one."""
    with _lock:
        own = [key for key in _pools if key[0] == os.getpid()]
        pools = [_pools.pop(key) for key in own]
    for pool in pools:
        pool.close()
