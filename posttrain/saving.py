"""Saving a run's checkpoints: off the critical path where that is safe, and without ending the run when the disk is full.

The files of a checkpoint are written while the run waits, because the next step changes what is in them. All that follows
(checksums, fsync, rename, deleting old ones) is done by a thread, which is waited for before the next save and at the end.
Until the rename nothing sees the new checkpoint, and `latest` is the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain import checkpoint, disk
from posttrain.errors import RunStopped


class Saver:
    """The checkpoints of one run, for the process that writes them.

    Args:
        directory: the run's `checkpoints`.
        keep: how many to keep, see `checkpoint.save`.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Path, Future[Path]] | None = None
        self.trouble = ""  # why the newest save failed

    def save(
        self, step: int, write: Callable[[str], None], progress: Mapping[str, Any], *, best: int | None = None
    ) -> bool:
        """Write a checkpoint, see `checkpoint.save`. Returns whether its files were written: the disk may be full."""
        self.settle()
        partial = self.directory / f"step-{step}.partial"
        try:
            partial = checkpoint.begin(self.directory, step)
            write(str(partial.resolve()))
        except Exception as error:
            if not disk.is_full(error):
                raise
            self.give_up(step, partial, error)
            return False
        self.adopt(partial, step, progress, best=best)
        return True

    def adopt(self, written: Path, step: int, progress: Mapping[str, Any], *, best: int | None = None) -> None:
        """Make written files the newest checkpoint, beside the run."""
        self.settle()
        call = self._thread.submit(
            checkpoint.adopt, written, self.directory, step, progress, keep=self._keep, best=best
        )
        self._pending = (step, written, call)

    def settle(self) -> bool:
        """Wait for what is being saved. Returns whether the newest save has come to its end."""
        if self._pending is None:
            return not self.trouble
        (step, written, call), self._pending = self._pending, None
        try:
            call.result()
            self.trouble = ""
        except Exception as error:
            if not disk.is_full(error):
                raise
            self.give_up(step, written, error)
        return not self.trouble

    def give_up(self, step: int, written: Path, error: BaseException) -> None:
        """Remove what a full disk has let through, say so, and go on."""
        shutil.rmtree(written, ignore_errors=True)
        self.trouble = f"the checkpoint of step {step} was not written: {_one_line(error)}"
        newest = checkpoint.newest_trained(self.directory)
        disk.warn(
            f"the disk is full: the checkpoint of step {step} could not be written to {self.directory} ({_one_line(error)}); "
            f"the run goes on, the newest whole one is {newest.name if newest else 'none'}, and the next save tries again: "
            f"make room"
        )

    def require(self) -> None:
        """Wait for what is being saved, and insist on it.

        Raises:
            RunStopped: it could not be written.
        """
        if not self.settle():
            raise RunStopped(
                f"the disk of {self.directory} is full ({self.trouble}): nothing torn was left behind; make room, and start "
                f"again, with --resume where there is a checkpoint"
            )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__).strip()[:200]
