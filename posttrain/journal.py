"""Rows that are on disk as soon as they exist: one JSON object a line, and an index of where each is.

A line is written by one call and synced before anybody hears of it, so what a crash can leave behind is a torn last line.
Opening the file again cuts that off. A prefix of a JSON object is no JSON, so a line that can be parsed is a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.disk import write_atomically
from posttrain.errors import RunStopped


class Journal:
    """Rows by key; of several with one key the last counts. Texts stay on disk, the index is in memory.

    Args:
        path: the file; it is made, or gone on with.
        key: the column that names a row.
        header: what all rows have in common, kept in the first line.

    Raises:
        RunStopped: another process has it open, its header is another one, or a line before the last is damaged.
    """

    def __init__(self, path: Path, key: str, header: Mapping[str, Any]) -> None:
        self.path = path
        self._key = key
        self._index: dict[str, tuple[int, int]] = {}  # key -> offset and length of its line
        self._end = 0  # of the last whole line
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _line(header).decode())
            _sync_directory(path.parent)
        self._file = path.open("r+b", buffering=0)
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """The keys, in the order in which they first came."""
        return iter(self._index)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows; they are on disk when this returns."""
        lines = [(str(row[self._key]), _line(row)) for row in rows]
        if not lines:
            return
        start = self._end
        data = memoryview(b"".join(line for _, line in lines))
        while data:
            data = data[os.pwrite(self._file.fileno(), data, self._end) :]
            self._end = start + sum(len(line) for _, line in lines) - len(data)
        os.fsync(self._file.fileno())
        for name, line in lines:
            self._index[name] = (start, len(line))
            start += len(line)

    def read(self, key: str) -> dict[str, Any]:
        """The row of that key.

        Raises:
            KeyError: there is none.
        """
        offset, length = self._index[key]
        row: dict[str, Any] = json.loads(os.pread(self._file.fileno(), length, offset))
        return row

    def close(self) -> None:
        """Let others open it."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunStopped(
                f"{self.path} is being written by another process; wait for it, or give another output_dir"
            ) from None

    def _read(self, header: Mapping[str, Any]) -> None:
        offset, is_ended = 0, True
        for number, line in enumerate(self._file_lines(), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    break  # torn by a crash
                raise RunStopped(
                    f"{self.path}, line {number} is damaged; move the file away, or delete that line if you can spare it"
                ) from None
            if not isinstance(row, dict) or (number > 1 and self._key not in row):
                raise RunStopped(
                    f"{self.path}, line {number} is no row with a {self._key}; move the file away, or delete that line if "
                    f"you can spare it"
                )
            if number == 1:
                _require_equal(row, header, self.path)
            else:
                self._index[str(row[self._key])] = (offset, len(line))
            offset += len(line)
            is_ended = line.endswith(b"\n")
        if offset and not is_ended:  # after the loop, which would read it as a line
            offset += os.pwrite(self._file.fileno(), b"\n", offset)
        if not offset:  # made, and then lost its content
            offset = os.pwrite(self._file.fileno(), _line(header), 0)
        self._end = offset
        os.ftruncate(self._file.fileno(), offset)
        os.fsync(self._file.fileno())

    def _file_lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            yield from stream


def _line(row: Mapping[str, Any]) -> bytes:
    # A text may hold half of a surrogate pair, which UTF-8 cannot write and an escape can.
    return json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    found, wanted = json.loads(json.dumps(found)), json.loads(json.dumps(wanted))
    for key in dict.fromkeys((*wanted, *found)):
        if found.get(key) != wanted.get(key):
            raise RunStopped(
                f"{path} was made with {key}={found.get(key)!r}, and now it is {wanted.get(key)!r}: its rows would be "
                f"mixed with others; restore that, or give another output_dir"
            )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
