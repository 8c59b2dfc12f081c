"""What goes into a sandboxed run and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["bubblewrap", "landlock"]
Status = Literal["ok", "crash", "timeout", "memory", "output", "infrastructure"]
Step = Literal["compile", "run"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run of a program. All but `total_seconds` hold for each case of its own.

    Raises:
        ValueError: a bound that is not positive, or too small for Python to start.
    """

    seconds: float = 10.0  # wall clock
    cpu_seconds: int = 5  # of each process; whole seconds, because the kernel counts so
    memory_bytes: int = 512 * 2**20  # address space of each process
    disk_bytes: int = 16 * 2**20  # of /tmp, which lies in memory; also the longest file
    files: int = 1000  # files and directories in /tmp
    open_files: int = 64
    tasks: int = 64  # processes and threads together
    subprocesses: bool = False  # with True, `memory_bytes` holds for each of up to `tasks` processes
    output_bytes: int = 2**20  # of stdout, of stderr and of a call's encoded result, each
    total_seconds: float = 60.0  # wall clock, over all cases of one program

    def __post_init__(self) -> None:
        for name, least in (
            ("seconds", 0.0),
            ("total_seconds", 0.0),
            ("cpu_seconds", 1),
            ("memory_bytes", 64 * 2**20),
            ("disk_bytes", 4096),
            ("files", 1),
            ("open_files", 16),
            ("tasks", 1),
            ("output_bytes", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"limit {name} must be a finite number, got {value!r}")
            if value < least or value <= 0:
                raise ValueError(f"limit {name} must be {f'at least {least}' if least else 'above 0'}, got {value!r}")
            if isinstance(least, int) and not isinstance(value, int):
                raise ValueError(f"limit {name} must be a whole number, got {value!r}")


@dataclass(frozen=True, slots=True)
class Stdin:
    """Run the program as a script with this standard input."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """Define what the program defines, then call one of its functions. Arguments are plain data (see `values`)."""

    function: str  # a name on top level, or of a method of a class `Solution`
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case of a program did.

    "ok": it ended by itself with exit code 0. "crash": another exit code, a signal, or the sandbox went down under it.
    "timeout": wall clock or CPU time. "memory": its last words were MemoryError (Python alone says so; other programs
    without memory crash). "output": it wrote too much.
    "infrastructure": the sandbox did not start, so nothing is known about the program; `detail` says why.
    """

    status: Status
    stdout: str = ""  # at most `output_bytes`, undecodable bytes replaced
    stderr: str = ""
    result: str | None = None  # of a Call: what the function returned, encoded (see `values`); nothing else is checked
    exit_code: int | None = None  # negative: the signal that ended it
    seconds: float = 0.0  # wall clock
    cpu_seconds: float = 0.0  # user and system, of the program and the processes it waited for
    peak_bytes: int = 0  # largest resident set; includes the interpreter
    step: Step = "run"  # the step that everything here is about: "compile" for a program that did not come to run
    detail: str = ""  # for people
