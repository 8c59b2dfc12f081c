"""Logs of JSON lines that a run appends to: no line is torn, and a full disk only delays them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain import disk


class LogFile:
    """One log. Lines that do not fit on the disk wait in memory and come, in order, with the next ones.

    Args:
        path: the file.
        kept: the lines, each with its newline, that it begins with.
    """

    def __init__(self, path: Path, kept: Sequence[str] = ()) -> None:
        self._path = path
        self._waiting: list[str] = []
        disk.write_atomically(path, "".join(kept))

    def append(self, line: str) -> None:
        """Write a line, given without its newline."""
        self._waiting.append(line)
        self.flush()

    def flush(self) -> bool:
        """Write what waits. Returns whether nothing waits any more."""
        if self._waiting and append_lines(self._path, self._waiting, "; its lines are kept and written later"):
            self._waiting = []
        return not self._waiting


def append_lines(path: Path, lines: Iterable[str], consequence: str = "") -> bool:
    """Append whole lines, all or none. Returns False, with a warning, where the disk has no room for them."""
    data = memoryview("".join(f"{line}\n" for line in lines).encode())
    with path.open("ab", buffering=0) as file:
        start = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            os.ftruncate(file.fileno(), start)
            if not disk.is_full(error):
                raise
            disk.warn(f"{path}: {error.strerror}{consequence}: make room")
            return False
    return True
