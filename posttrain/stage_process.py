"""A pipeline's stage as a process: it gets the signals that should stop it, and does not outlive the pipeline.

One pipeline at a time works in a run directory. Its lock is passed on to the stage's process, so a directory whose stage
still runs, for whatever reason, is not taken for free.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from posttrain.errors import RunStopped

LOCK = ".lock"
LOCK_SECONDS = 20.0  # a process that was just killed may take a moment to be gone
BEAT_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Hold a run directory's lock.

    Yields:
        The lock's file descriptor, to be passed on to processes.

    Raises:
        RunStopped: somebody else holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise RunStopped(
                    f"another pipeline, or a stage that one started, is at work in {run_dir}; wait for it, end it, or give "
                    f"another output_dir"
                )
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_process(module: str, arguments: Sequence[str], lock: int, beat: Callable[[float], None]) -> int:
    """Run `python -m module arguments`, passing on the signals that should stop it.

    Args:
        lock: a file descriptor that the process holds open too.
        beat: called every few seconds, and at the end, with the seconds since the start.

    Returns:
        Its exit code; 128 + n where signal n ended it.
    """
    start = time.monotonic()
    # A session of its own, so that a Ctrl-C reaches the stage once, through us, and not twice.
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        start_new_session=True,
        pass_fds=(lock,),
        preexec_fn=_die_with_parent(),
    )

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            try:
                code = process.wait(timeout=BEAT_SECONDS)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                beat(time.monotonic() - start)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        beat(time.monotonic() - start)


def _die_with_parent() -> Callable[[], None] | None:
    """What a new process does first so that the kernel kills it when this one is gone; None where there is no such thing."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return die
