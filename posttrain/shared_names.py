"""Names in /dev/shm, which outlive processes that are killed.

Python's resource tracker would take them away, but Ray ends it with the actor whose child it is. Memory needs its name
only until everybody who shares it has mapped it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from multiprocessing import resource_tracker
from pathlib import Path

_HOME = Path("/dev/shm")
_SEMAPHORE = "sem."  # how the C library calls the file of a semaphore


def mapped_names() -> list[str]:
    """Files of /dev/shm that this process has mapped and that still have a name, and those of its semaphores."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if f" {_HOME}/" in line}
    # joblib makes some when it is imported, under another name than they are mapped by.
    paths |= set(_HOME.glob(f"{_SEMAPHORE}loky-{os.getpid()}-*"))
    return sorted(path.name for path in paths if path.parent == _HOME and path.exists())


def drop_names(names: Iterable[str]) -> None:
    """Take these names away. Whoever has mapped the memory keeps it, and the resource tracker forgets it."""
    for name in set(names):
        (_HOME / name).unlink(missing_ok=True)
        if name.startswith("psm_"):  # Python's own shared memory
            resource_tracker.unregister(f"/{name}", "shared_memory")
        elif name.startswith(_SEMAPHORE):
            resource_tracker.unregister(f"/{name.removeprefix(_SEMAPHORE)}", "semaphore")
