"""Files that are whole or not there; and a disk that is full: how its errors look, and the warning that a run goes on with."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that hide the error's number: safetensors, torch.save, an error that came through Ray as text.
_WORDS = (
    *("No space left on device", "Disk quota exceeded", "File too large", "StorageFull", "QuotaExceeded"),
    *("PytorchStreamWriter failed", "inline_container.cc"),
)


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that there is no room to write."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if any(words in str(error) for words in _WORDS):
            return True
        following = error.__cause__ or error.__context__
        if following is None:
            return False
        error = following
    return False


def warn(text: str) -> None:
    """Say loudly, on stderr, what the run goes on without."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never half."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
