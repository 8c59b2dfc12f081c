"""Content hashes of what stages take in and make, and what differs between two looks at a stage.

A file is hashed once: its SHA-256 is trusted for as long as its inode, size and times of change stay the same. A directory
has the hash of its files and their names. What belongs to resuming (optimizer, random states, progress) is left out of a
checkpoint, because no other stage reads it and it holds times.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.disk import write_atomically
from posttrain.recipe import Recipe
from posttrain.recipe_file import recipe_tree
from posttrain.stage_inputs import Input, neutral

CACHE = "digests.json"  # in the pipeline's run directory
TRAINING_STATE = (
    *("optimizer*.pt", "optimizer*.bin", "optimizer-*.safetensors", "scheduler.pt", "rng_state*", "scaler.pt"),
    *("training_args.bin", "trainer_state.json", "trainer_state.pt", "progress.json", "manifest.json", "*.distcp"),
)
LOGS = (
    *("recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "report.html", "stage.json"),
    *("data.json", "preflight.json", "alarms.jsonl", "suspicious.jsonl", "*.log"),
    *("journal", "trainer", "tensorboard", "wandb", "logs", "crash"),
)  # at the top of a stage's directory
SETTLED_SECONDS = 1.0  # a file changed more recently could change again without its times showing it
LARGE = 8 * 2**30  # bytes; from here on hashing is worth a word
SAMPLED = 64  # blocks of a large file that `quick_digest` reads
BLOCK = 2**20  # bytes


class Digests:
    """SHA-256 of files, remembered in the pipeline's run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._home = Path(os.path.abspath(run_dir))
        self._file = run_dir / CACHE
        self._known: dict[str, list[Any]] = {}
        self._is_new = False
        if self._file.exists():
            self._known = json.loads(self._file.read_text())

    def of_file(self, path: Path) -> str:
        """The file's SHA-256, in hex."""
        real = path.resolve()
        name = str(real.relative_to(self._home)) if self._home in real.parents else str(real)
        stat = real.stat()
        look = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._known.get(name)
        if known is not None and known[:-1] == look:
            return str(known[-1])
        if stat.st_size > LARGE:
            print(f"hashing {real} ({stat.st_size / 2**30:.0f} GiB); it is done once", flush=True)
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            self._known[name] = [*look, digest]
            self._is_new = True
        return digest

    def of(self, path: Path) -> str:
        """The hash of a file, or of a directory's files without their training state."""
        return self.of_file(path) if path.is_file() else tree_digest(self.of_files(path))

    def of_files(self, directory: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
        """Path below the directory -> SHA-256.

        Args:
            directory: links to files in it are followed, links to directories are not.
            leave_out: patterns of names at its top.
        """
        top = directory.resolve()
        return {name: self.of_file(top / name) for name in _files(top, leave_out)}

    def save(self) -> None:
        """Remember what was hashed, if the run directory is there."""
        if self._is_new and self._home.is_dir():
            write_atomically(self._file, json.dumps(self._known))
            self._is_new = False


def tree_digest(files: Mapping[str, str]) -> str:
    """One hash for files by name. It does not depend on their order."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def quick_digest(path: Path) -> str:
    """What tells one file or directory from another: all of small files, and of large ones the size and 64 MiB of blocks
    spread evenly. Training state is left out, as in `Digests`.
    """
    if path.is_file():
        return _quick_file(path)
    return tree_digest({name: _quick_file(path / name) for name in _files(path.resolve(), ())})


def _quick_file(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLED * BLOCK:
            found.update(file.read())
            return found.hexdigest()
        for number in range(SAMPLED):
            file.seek((size - BLOCK) * number // (SAMPLED - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def _files(top: Path, leave_out: Sequence[str]) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        is_top = Path(folder) == top
        folders[:] = sorted(name for name in folders if not _is_left_out(name, leave_out if is_top else ()))
        for name in sorted(names):
            path = Path(folder) / name
            left_out = (*TRAINING_STATE, *(leave_out if is_top else ()))
            if not _is_left_out(name, left_out) and path.is_file():
                yield str(path.relative_to(top))


def _is_left_out(name: str, patterns: Sequence[str]) -> bool:
    hidden = name.startswith(".") or name.endswith(".partial") or fnmatch.fnmatch(name, "step-*.broken*")
    return hidden or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a stage is about to be run with, or was. JSON-able."""

    recipe: Mapping[str, Any]  # resolved, with {run_dir} for the run directory
    inputs: Sequence[Mapping[str, Any]]  # key, name, stage, sha256 (None: known by its name)

    @property
    def fingerprint(self) -> str:
        """Equal for equal recipes and inputs."""
        text = json.dumps([self.recipe, self.inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def take_snapshot(recipe: Recipe, run_dir: Path, inputs: Sequence[tuple[Input, str | None]]) -> Snapshot:
    """A stage's recipe, and its inputs with their hashes."""
    rows = [{"key": found.key, "name": found.name, "stage": found.stage, "sha256": digest} for found, digest in inputs]
    return Snapshot(neutral_recipe(recipe, run_dir), rows)


def neutral_recipe(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """A resolved recipe as JSON, with `{run_dir}` for the run directory."""
    tree = json.loads(json.dumps(recipe_tree(recipe), default=str))
    renamed = _renamed(tree, run_dir)
    assert isinstance(renamed, dict)
    return renamed


def _renamed(value: Any, run_dir: Path) -> Any:
    if isinstance(value, str):
        return neutral(value, run_dir)
    if isinstance(value, Mapping):
        return {key: _renamed(inner, run_dir) for key, inner in value.items()}
    return [_renamed(inner, run_dir) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is different."""

    key: str  # of the recipe
    text: str  # for people

    def __str__(self) -> str:
        return self.text


def changes(before: Snapshot, now: Snapshot) -> list[Change]:
    """What is different, the recipe's keys first. Empty: nothing."""
    old, new = dict(_leaves(before.recipe)), dict(_leaves(now.recipe))
    found = []
    for key in dict.fromkeys((*new, *old)):
        if key not in new:
            found.append(Change(key, f"{key} {_short(old[key])} was removed"))
        elif key not in old:
            found.append(Change(key, f"{key} {_short(new[key])} is new"))
        elif old[key] != new[key]:
            found.append(Change(key, f"{key} {_short(old[key])} -> {_short(new[key])}"))
    explained = {change.key for change in found}
    known = {(row["key"], row["name"]): row["sha256"] for row in before.inputs}
    for row in now.inputs:
        key, place = row["key"], (row["key"], row["name"])
        if place in known and known[place] != row["sha256"]:
            found.append(Change(key, f"input {row['name']} ({key}) changed"))
        elif place not in known and key not in explained:
            found.append(Change(key, f"input {row['name']} ({key}) is new"))
    for key, name in known.keys() - {(row["key"], row["name"]) for row in now.inputs}:
        if key not in {change.key for change in found}:
            found.append(Change(key, f"input {name} ({key}) is gone"))
    return found


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Key path -> value; an empty section or list is a value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{index}")
    else:
        yield key, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
