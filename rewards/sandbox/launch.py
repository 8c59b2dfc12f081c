"""How a sandbox is started: which interpreter, which directories, which command, as which user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rewards.errors import Unavailable
from rewards.sandbox.confine import landlock_version
from rewards.sandbox.limits import Mode

OLDEST_LANDLOCK = 3  # earlier ones let a program cut files short
NOBODY = 65534  # the user and group inside; outside too, when this process is root's
MODES = ("bubblewrap", "landlock")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # all of it; the same program does the same each time
PYTHON_FLAGS = ("-S", "-s", "-B", "-X", "utf8")
MODULES = ("values", "confine", "supervisor")  # what is sent in, in the order of import

# Reads the modules from standard input without a buffer that would swallow what follows, then hands over. What `main`
# returns runs here, on top level, so that the interpreter ends as it does for any script: threads joined, exit
# handlers run, uncaught exceptions printed.
BOOTSTRAP = f"""
import os, sys, types
def take(count):
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part: os._exit(0)
        data += part
    return data
for name in {MODULES!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(take(int(take(8))), name, "exec"), module.__dict__)
module.main()()
"""

_QUERY = """
import json, sys, sysconfig
paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("DESTSHARED")]
print(json.dumps({"version": sys.version_info[:2], "prefix": sys.base_prefix, "paths": [p for p in paths if p],
                  "multiarch": sysconfig.get_config_var("MULTIARCH") or "", "executable": sys.executable}))
"""


class SandboxUnavailableError(Unavailable):
    """This machine cannot run programs in the sandbox that was asked for; says what is missing and the cure."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that programs run with, as seen by the user that they run as."""

    executable: str  # no symbolic link
    version: tuple[int, int]
    readable: tuple[str, ...]  # directories and files that it needs; all of the file system that programs can read
    masked: tuple[str, ...]  # directories within `readable` that are hidden: installed packages


@cache
def find_bubblewrap() -> str:
    """The path of a usable `bwrap`.

    Raises:
        SandboxUnavailableError: not installed.
    """
    path = shutil.which("bwrap")
    cure = (
        "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap), or accept a weaker "
        'sandbox with sandbox="landlock" (docs/sandbox.md says what it does not stop)'
    )
    if path is None:
        raise SandboxUnavailableError(f"bubblewrap (bwrap) is not installed, so model-written code is not run: {cure}")
    return path


def credentials() -> dict[str, object]:
    """Arguments of `subprocess.Popen` that give up root: the kernel exempts root from the limit of processes."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


@cache
def find_interpreter(python: str | None = None) -> Interpreter:
    """The interpreter for programs: `python`, else the first usable of this process's own, /usr/bin and /usr/local/bin.

    Usable means that the unprivileged user can reach it: one below root's home directory is not.

    Raises:
        SandboxUnavailableError: none usable.
    """
    own = os.path.realpath(sys.executable)
    candidates = [python] if python else [own, "/usr/bin/python3", "/usr/local/bin/python3"]
    reasons = []
    for candidate in candidates:
        try:
            return _inspect(os.path.realpath(candidate))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{candidate}: {error}")
    raise SandboxUnavailableError(
        f"no Python that uid {NOBODY if os.getuid() == 0 else os.getuid()} can run; install one for all users, or name "
        f"one with the option `python`. Tried: {'; '.join(reasons)}"
    )


def _inspect(executable: str) -> Interpreter:
    command = [executable, "-I", "-S", "-c", _QUERY]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env={}, cwd="/", **credentials()
    )  # type: ignore[call-overload]
    facts = json.loads(answer.stdout)
    if tuple(facts["version"]) < (3, 9):
        raise ValueError(f"Python {facts['version']} is older than 3.9")
    multiarch = facts["multiarch"]
    wanted = [executable, *facts["paths"], "/usr/lib64", "/lib64", "/etc/ld.so.cache"]
    wanted += [f"/usr/lib/{multiarch}", f"/lib/{multiarch}"] if multiarch else ["/usr/lib", "/lib"]
    if facts["prefix"] != "/usr":  # a libpython of its own, beside the standard library
        wanted.append(f"{facts['prefix']}/lib")
    packages = [f"{path}/{name}" for path in facts["paths"] for name in ("site-packages", "dist-packages")]
    masked = sorted({os.path.realpath(path) for path in packages if os.path.isdir(path)})
    return Interpreter(executable, tuple(facts["version"]), outermost(wanted), tuple(masked))


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Those of the paths that exist, without links, and without what lies in another of them."""
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths if os.path.exists(path)}, key=len):
        if not any(Path(path).is_relative_to(other) for other in found):
            found.append(path)
    return tuple(found)


def command(mode: Mode, interpreter: Interpreter, info: int, tools: Sequence[str] | None = None) -> list[str]:
    """The command line of one sandbox.

    Args:
        mode: see `rewards.sandbox`.
        interpreter: of the programs.
        info: file descriptor on which bubblewrap tells the process id of the sandbox's first process.
        tools: directories and files of a language other than Python, see `toolchain`; None: there is none.

    Raises:
        SandboxUnavailableError: bubblewrap is missing; Landlock is asked for and too old, or for another language.
        ValueError: unknown mode.
    """
    python = [interpreter.executable, *PYTHON_FLAGS, "-c", BOOTSTRAP]
    if mode == "landlock":
        if tools is not None:
            raise SandboxUnavailableError(
                'sandbox="landlock" runs Python only, because it could not bound the processes of a compiler; use bubblewrap'
            )
        if landlock_version() < OLDEST_LANDLOCK:
            raise SandboxUnavailableError(
                f'sandbox="landlock" needs Linux 6.2 with Landlock switched on (interface {OLDEST_LANDLOCK}, this kernel '
                f"has {landlock_version()}); install bubblewrap instead"
            )
        return python
    if mode != "bubblewrap":
        raise ValueError(f"sandbox must be one of {', '.join(MODES)}, got {mode!r}")
    words = [find_bubblewrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
    words += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox", "--info-fd", str(info)]
    # Of its own namespace only, for a fresh /tmp with a bound on files per case; the program's process drops it.
    words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for path in outermost((*interpreter.readable, *(tools or ()))):
        words += ["--ro-bind", path, path]
    for path in interpreter.masked:
        words += ["--tmpfs", path, "--remount-ro", path]
    for link in ("/lib", "/lib64", *(("/bin",) if tools is not None else ())):
        if os.path.islink(link):
            words += ["--symlink", os.readlink(link), link]
    words += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    if tools is not None:  # of the sandbox's own processes; <(...) in Bash opens /dev/fd
        words += ["--proc", "/proc", "--symlink", "/proc/self/fd", "/dev/fd"]
    words += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    return [*words, "--", *python]


@cache
def sources() -> bytes:
    """The modules that are sent in, as `BOOTSTRAP` reads them."""
    texts = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in MODULES]
    return b"".join(b"%08d" % len(text) + text for text in texts)
