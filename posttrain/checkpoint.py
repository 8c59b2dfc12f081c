"""Checkpoints: whole or not there. Each is a Hugging Face model directory with the training state beside it.

checkpoints/step-20/   model, tokenizer, trainer_state.pt, progress.json, manifest.json (a checksum for each file)
checkpoints/latest     a link to the newest whole one
checkpoints/best       a link to the one that did best on held-out data, where that is measured

A checkpoint that is found damaged is put aside as step-20.broken, and never deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain import manifest
from posttrain.disk import warn
from posttrain.errors import RunStopped

LATEST = "latest"
BEST = "best"
PROGRESS = "progress.json"
_HAS_MANIFEST = "has_manifest"  # in progress.json: one without it was written before there were any
_REPLACED = ".replaced"  # while a checkpoint of the same step takes its place


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
    partial = begin(directory, step)
    write(str(partial.resolve()))
    return adopt(partial, directory, step, progress, keep=keep, best=best)


def begin(directory: Path, step: int) -> Path:
    """An empty directory for the files of a checkpoint; what a crash left of others is removed."""
    for left in directory.glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial = directory / f"step-{step}.partial"
    partial.mkdir(parents=True)
    return partial


def adopt(
    written: Path, directory: Path, step: int, progress: Mapping[str, Any], *, keep: int, best: int | None = None
) -> Path:
    """Make a directory of files, complete and on the same file system, the newest checkpoint of a run.

    The logs beside `directory` are synced first: none may be behind a checkpoint that outlives the machine.

    Args:
        written: the files; it is moved.
        directory, step, progress, keep: as for `save`.
        best: the step whose checkpoint is linked as `best` and never deleted.

    Returns:
        The checkpoint's directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for log in directory.parent.glob("*.jsonl"):
        _fsync(log)
    final = directory / f"step-{step}"
    (written / PROGRESS).write_text(json.dumps({"step": step, **progress, _HAS_MANIFEST: True}))
    manifest.write(written)
    for path in [*written.rglob("*"), written]:
        _fsync(path)
    replaced = directory / f"{final.name}{_REPLACED}"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    written.rename(final)
    _link(directory, LATEST, final.name)
    if best is not None and (directory / f"step-{best}").is_dir():  # also where a crash came before an earlier link
        _link(directory, BEST, f"step-{best}")
    _fsync(directory)
    shutil.rmtree(replaced, ignore_errors=True)
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
    """The checkpoints that were written to their end, oldest first. Whether they still are what was written: `problems`."""
    return [path for path in _steps(directory) if (path / PROGRESS).exists()]


def _steps(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
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
    found: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text())
    found.pop(_HAS_MANIFEST, None)
    return found


# --- is it still what was written? ------------------------------------------------------------------------------------


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint of a run, a line for each file. All files are read. Empty: it is as it was written."""
    if (checkpoint / manifest.MANIFEST).exists():
        return manifest.problems(checkpoint)
    try:
        progress = json.loads((checkpoint / PROGRESS).read_bytes())
        step = int(progress["step"])
    except FileNotFoundError:
        return [f"{PROGRESS} is missing"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"{PROGRESS} is torn ({error})"]
    if progress.get(_HAS_MANIFEST):
        return [f"{manifest.MANIFEST} is missing"]
    warn(f"{checkpoint} (step {step}) was written without checksums, by an earlier version: it cannot be verified")
    return []


def newest_sound(directory: Path, *, start: bool = False) -> Path | None:
    """The newest checkpoint whose files are what was written; None where there is none at all.

    Damaged ones that are newer are put aside, with a warning that names the file, and `latest` is set anew.

    Args:
        directory: the run's `checkpoints`.
        start: also take step 0, which is otherwise only a starting point.

    Raises:
        RunStopped: there are checkpoints, and all of them are damaged.
    """
    _put_back(directory)
    broken: list[str] = []
    for path in reversed(_steps(directory)):
        if path.name == "step-0" and not start:
            continue
        found = problems(path)
        if not found:
            if broken or not (directory / LATEST).exists():
                _link(directory, LATEST, path.name)
                warn(f"going on from {path}; what was done after it is done again")
            return path
        aside = put_aside(path)
        broken.append(f"{aside.name} ({found[0]})")
        warn(f"checkpoint {path} is damaged: {'; '.join(found)}; it is kept as {aside}")
    if broken:
        raise RunStopped(
            f"no whole checkpoint is left in {directory}: {', '.join(broken)}; mend one from a copy and rename it back, or "
            f"start again in another output_dir"
        )
    return None


def put_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one. Returns where it is now."""
    aside, number = checkpoint.with_name(f"{checkpoint.name}.broken"), 2
    while aside.exists():
        aside, number = checkpoint.with_name(f"{checkpoint.name}.broken-{number}"), number + 1
    checkpoint.rename(aside)
    for name in (LATEST, BEST):
        link = checkpoint.parent / name
        if link.is_symlink() and os.readlink(link) == checkpoint.name:
            link.unlink()
    return aside


def require_sound(path: str | Path) -> None:
    """Look at a checkpoint that another run has made, or this one before, before it is used as a model.

    Places without a manifest (hub names, checkpoints of other programs) are let through.

    Raises:
        RunStopped: a file is not what was written.
    """
    directory = Path(path).expanduser()
    is_ours = all((directory / name).exists() for name in (manifest.MANIFEST, PROGRESS))
    found = manifest.problems(directory) if is_ours else []
    if found:
        raise RunStopped(
            f"{directory.resolve()} is damaged: {'; '.join(found[:3])}; take another checkpoint, make it again, or, if you "
            f"changed it on purpose, delete its {manifest.MANIFEST}"
        )


def _put_back(directory: Path) -> None:
    """A crash between the two renames of `adopt` leaves the old checkpoint of that step under another name."""
    for old in directory.glob(f"step-*{_REPLACED}"):
        final = old.with_name(old.name.removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
