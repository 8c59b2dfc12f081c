"""router.jsonl: how evenly the routers spread their tokens, a line per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from posttrain.log_file import LogFile
from posttrain.metrics import lines_until


class RouterLog:
    """A line holds `step` and `load`: [L][E] percent of an even share, 100 where each expert gets the same.

    Whole percents keep a line short: about 60 KB for the 58 layers and 256 experts of DeepSeek-V3, 100 bytes for a tiny one.
    A dense policy leaves no file.

    Args:
        run_dir: where router.jsonl is.
        resume_step: go on after this step, dropping lines of later steps; None starts a new file.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self._path = run_dir / "router.jsonl"
        kept = lines_until(self._path, resume_step)
        self._file = LogFile(self._path, kept) if kept or self._path.exists() else None

    def log(self, step: int, tokens_LE: Sequence[Sequence[int]]) -> None:
        """Write one step; nothing where no expert got a token.

        Args:
            step: its number.
            tokens_LE: tokens that each expert got in it.
        """
        if not any(map(sum, tokens_LE)):
            return
        load = [
            [round(100 * tokens * len(tokens_E) / max(1, sum(tokens_E))) for tokens in tokens_E]
            for tokens_E in tokens_LE
        ]
        self._file = self._file or LogFile(self._path)
        self._file.append(json.dumps({"step": step, "load": load}, separators=(",", ":")))
