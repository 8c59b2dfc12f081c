"""Checkpoints: whole or not there. Each is a Hugging Face model directory with the training state beside it.

checkpoints/step-20/   model, tokenizer, trainer_state.pt, progress.json
checkpoints/latest     a link to the newest whole one
checkpoints/best       a link to the one that did best on held-out data, where that is measured
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
BEST = "best"
PROGRESS = "progress.json"


def save(
    directory: Path,
    step: int,
    write: Callable[[str], None],
    progress: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint so that a crash at any moment leaves the earlier ones whole.

    Args:
        directory: the run's `checkpoints` directory.
        step: of the run; an existing checkpoint of that step is replaced.
        write: puts the files into an existing directory that it is given.
        progress: JSON-able state of the loop (step, data cursor), see `load_progress`.
        keep: how many checkpoints to keep, the newest first; step 0 is not counted and stays.
        best: as for `adopt`.

    Returns:
        The checkpoint's directory.
    """
    partial = directory / f"step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(str(partial.resolve()))
    return adopt(partial, directory, step, progress, keep=keep, best=best)


def adopt(
    written: Path, directory: Path, step: int, progress: Mapping[str, Any], *, keep: int, best: int | None = None
) -> Path:
    """Make a directory of files, complete and on the same file system, the newest checkpoint of a run.

    Args:
        written: the files; it is moved.
        directory, step, progress, keep: as for `save`.
        best: the step whose checkpoint is linked as `best` and never deleted.

    Returns:
        The checkpoint's directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step}"
    (written / PROGRESS).write_text(json.dumps({"step": step, **progress}))
    for file in written.rglob("*"):
        if file.is_file():
            _fsync(file)
    _fsync(written)
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    _link(directory, LATEST, final.name)
    if best is not None and (directory / f"step-{best}").is_dir():  # also where a crash came before an earlier link
        _link(directory, BEST, f"step-{best}")
    _fsync(directory)
    # Step 0 is what the run started from: adapters, and a prediction module carried along, still need it.
    kept = {directory / "step-0", directory / f"step-{best}"}
    for old in [path for path in whole(directory) if path not in kept][:-keep]:
        shutil.rmtree(old)
    return final


def _link(directory: Path, name: str, target: str) -> None:
    link = directory / f"{name}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    link.replace(directory / name)


def whole(directory: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if path.suffix != ".partial" and (path / PROGRESS).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_trained(directory: Path) -> Path | None:
    """The newest whole checkpoint that training can go on from; step 0 is only a starting point."""
    found = [path for path in whole(directory) if path.name != "step-0"]
    return found[-1] if found else None


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
