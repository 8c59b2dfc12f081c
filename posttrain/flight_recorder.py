"""The last events of a process, kept in memory and written when the run ends badly; and its log in the run directory.

    logs/<stage>[-rank<n>].log       a line for each event and warning of the stage's own process; secrets are taken out
    logs/<stage>.fatal               the stack of every thread where the interpreter itself died (not there otherwise)
    crash/<stage>-<time>-<pid>.json  the flight record: error, traceback, last events, what ran on what

What other processes of a run said lies beside it, see posttrain/process_logs.py.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from posttrain.disk import write_atomically
from posttrain.redaction import redact

LOGS = "logs"
CRASH = "crash"
KEPT = 200  # events
LONGEST = 2000  # characters of a text in an event


class FlightRecorder:
    """Keeps the last events. Safe for several threads."""

    def __init__(self, size: int = KEPT) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=size)
        self._log: _StageLog | None = None

    def record(self, event: str, **fields: Any) -> None:
        """Keep an event, and write it to the stage's log.

        Args:
            event: a word or two, e.g. "step".
            fields: JSON-able; other things are kept as their text.
        """
        self._events.append({"time": time.time(), "thread": threading.current_thread().name, "event": event, **fields})
        if self._log is not None:
            shown = "".join(f"  {name}={_brief(value)}" for name, value in fields.items())
            self._log.line(f"{event}{shown}")

    def events(self) -> list[dict[str, Any]]:
        """The events, the oldest first."""
        return list(self._events)

    def write(self, path: Path, error: BaseException) -> None:
        """Write the flight record, whole or not at all. Secrets are taken out."""
        record = {
            "error": type(error).__name__,
            "message": str(error)[: 10 * LONGEST],
            "traceback": "".join(traceback.format_exception(error))[-20 * LONGEST :],
            "time": time.time(),
            "pid": os.getpid(),
            "arguments": sys.argv,
            "python": sys.version.split()[0],
            "events": self.events(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, redact(json.dumps(record, indent=1, default=lambda value: str(value)[:LONGEST])))


_recorder = FlightRecorder()
record = _recorder.record


class _StageLog:
    """A file that is opened once the run directory is there: making that directory is the stage's own business."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._fatal: TextIO | None = None

    def line(self, text: str) -> None:
        """Write a line with the time."""
        self._waiting.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {' '.join(redact(text).splitlines())}\n")
        if not self._path.parent.parent.is_dir():
            return
        waiting, self._waiting = self._waiting, []
        try:
            self._path.parent.mkdir(exist_ok=True)
            if self._fatal is None and not faulthandler.is_enabled():
                self._fatal = self._path.with_suffix(".fatal").open("w")
                faulthandler.enable(self._fatal)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(waiting)
        except OSError as error:  # a full disk must not end a run because of a line
            print(f"warning: {self._path} cannot be written ({error.strerror})", file=sys.stderr)

    def close(self) -> None:
        """The interpreter lived: nothing is left of the file for its death."""
        if self._fatal is not None:
            faulthandler.disable()
            self._fatal.close()
            self._path.with_suffix(".fatal").unlink(missing_ok=True)


class _ToLog(logging.Handler):
    """Warnings of libraries into the stage's log."""

    def __init__(self, log: _StageLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.line(f"{record.levelname.lower()}  {record.name}: {record.getMessage()}"[:LONGEST])


@contextmanager
def recording(stage: str, run_dir: Path) -> Iterator[None]:
    """Keep a stage's log for the length of the block, and write the flight record if it ends with an error.

    Args:
        stage: names the files.
        run_dir: of the stage; nothing is written before it is there.
    """
    rank = os.environ.get("RANK", "0")
    log = _StageLog(run_dir / LOGS / f"{stage}{'' if rank == '0' else f'-rank{rank}'}.log")
    handler = _ToLog(log)
    logging.getLogger().addHandler(handler)
    _recorder._log = log
    record("start", arguments=sys.argv[1:], pid=os.getpid())
    try:
        yield
        record("end")
    except BaseException as error:
        record("end", error=f"{type(error).__name__}: {error}")
        if isinstance(error, Exception) and run_dir.is_dir():
            _write_record(run_dir / CRASH / f"{stage}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.json", error)
        raise
    finally:
        _recorder._log = None
        log.close()
        logging.getLogger().removeHandler(handler)


def _write_record(path: Path, error: Exception) -> None:
    try:
        _recorder.write(path, error)
    except OSError as problem:  # the error itself is what its user must see
        print(f"warning: no flight record ({problem.strerror}: {path})", file=sys.stderr)
        return
    print(f"flight record: {path}", file=sys.stderr)


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
