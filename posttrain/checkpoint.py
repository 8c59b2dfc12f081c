"""Checkpoints: whole or not there. Each is a Hugging Face model directory with the training state beside it.

checkpoints/step-20/   model, tokenizer, trainer_state.pt, progress.json
checkpoints/latest     a link to the newest whole one
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RunStopped

LATEST = "latest"
PROGRESS = "progress.json"


def save(directory: Path, step: int, write: Callable[[str], None], progress: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint so that a crash at any moment leaves the earlier ones whole.

    Args:
        directory: the run's `checkpoints` directory.
        step: of the run; an existing checkpoint of that step is replaced.
        write: puts the files into an existing directory that it is given.
        progress: JSON-able state of the loop (step, data cursor), see `load_progress`.
        keep: how many checkpoints to keep, the newest first.

    Returns:
        The checkpoint's directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final, partial = directory / f"step-{step}", directory / f"step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(str(partial.resolve()))
    (partial / PROGRESS).write_text(json.dumps({"step": step, **progress}))
    for file in partial.rglob("*"):
        if file.is_file():
            _fsync(file)
    _fsync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    link = directory / f"{LATEST}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(directory / LATEST)
    _fsync(directory)
    for old in whole(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def whole(directory: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if path.suffix != ".partial" and (path / PROGRESS).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def require_fresh(directory: Path) -> None:
    """Refuse to start anew where an earlier run's checkpoints are: the two would be mixed, and the old ones deleted.

    Raises:
        RunStopped: there are checkpoints beyond step 0, which is only a starting point.
    """
    found = [path.name for path in whole(directory) if path.name != "step-0"]
    if found:
        raise RunStopped(
            f"{directory} holds {', '.join(found)} of an earlier run: add --resume, or give another output_dir, or delete "
            f"that directory"
        )


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as progress, with its step."""
    return json.loads((checkpoint / PROGRESS).read_text())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
