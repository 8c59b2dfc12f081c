"""manifest.json: size and SHA-256 of every file of a checkpoint, so that a damaged one is noticed before it is used.

It is written last. Files are hashed by several threads, at about the speed of the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


def write(directory: Path) -> None:
    """Describe all files below a directory in its manifest."""
    names = [name for name in _names(directory) if name != MANIFEST]
    with _threads() as threads:
        digests = list(threads.map(lambda name: file_digest(directory / name), names))
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def problems(directory: Path) -> list[str]:
    """What differs from the manifest, a line for each file. Empty: all is as it was written.

    Files that the manifest does not name are none of its business.
    """
    try:
        files = _read(directory)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    # Sizes first: they cost nothing.
    found = [problem for name, known in files.items() if (problem := _size_problem(directory / name, name, known))]
    if found:
        return found
    with _threads() as threads:
        return [line for line in threads.map(lambda item: _content_problem(directory, *item), files.items()) if line]


def file_digest(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(directory: Path) -> dict[str, Any]:
    known = json.loads((directory / MANIFEST).read_bytes())
    if not isinstance(known, dict) or known.get("format") != FORMAT or not isinstance(known.get("files"), dict):
        raise ValueError(f"not a manifest of format {FORMAT}")
    files = known["files"]
    for name, entry in files.items():
        is_entry = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not is_entry or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"its entry of {name} is damaged")
    return files


def _size_problem(path: Path, name: str, known: dict[str, Any]) -> str:
    try:
        size = path.stat().st_size
    except OSError:
        return f"{name} is missing"
    return "" if size == known["bytes"] else f"{name} has {size} bytes and was written with {known['bytes']}"


def _content_problem(directory: Path, name: str, known: dict[str, Any]) -> str:
    try:
        same = file_digest(directory / name) == known["sha256"]
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return "" if same else f"{name} has another content than was written (its SHA-256 differs)"


def _names(directory: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            yield str((Path(folder) / name).relative_to(directory))


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
