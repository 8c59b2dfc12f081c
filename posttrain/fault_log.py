"""faults.jsonl: what was lost while a run went on, and what came in its place, as it happens."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class FaultLog:
    """Says what happened on the screen and, in a run directory, adds a line to a file. Any thread may call.

    Args:
        path: of the run; None writes no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path / "faults.jsonl" if path else None
        self._lock = threading.Lock()

    def __call__(self, event: str, text: str, **facts: Any) -> None:
        """
        Args:
            event: what kind, e.g. "sampler_lost".
            text: for people.
            facts: JSON-able, kept beside.
        """
        line = json.dumps({"time": time.time(), "event": event, "text": text, **facts})
        with self._lock:
            print(text, file=sys.stderr, flush=True)
            if self._path is not None:
                # A full disk must not keep a sampler from being replaced; the screen has it.
                with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
