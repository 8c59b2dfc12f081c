"""Running programs that a model wrote: contained, bounded, and without a trace left.

    from rewards.sandbox import Limits, run
    outcome = run("print(input()[::-1])", "abc", Limits(seconds=2))
    outcome.status, outcome.stdout     # ("ok", "cba\\n")

`mode` "bubblewrap" (the default) puts each program behind namespaces, an almost empty read-only file system, Landlock, a
system-call filter and resource limits. "landlock" does without bubblewrap and is weaker; it must be asked for by name.
What each stops is in docs/sandbox.md; `python -m rewards.sandbox` says what this machine has.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.sandbox.launch import SandboxUnavailableError
from rewards.sandbox.limits import Call, Limits, Mode, Outcome, Stdin
from rewards.sandbox.pool import Pool, close_shared_pools, shared_pool
from rewards.sandbox.values import decode, encode, matches

__all__ = [
    "Call",
    "Limits",
    "Mode",
    "Outcome",
    "Pool",
    "SandboxUnavailableError",
    "Stdin",
    "close_shared_pools",
    "decode",
    "encode",
    "matches",
    "run",
    "run_cases",
    "shared_pool",
]


def run(
    program: str, stdin: str = "", limits: Limits | None = None, *, mode: Mode = "bubblewrap", python: str | None = None
) -> Outcome:
    """Run a Python program as a script. Blocks while as many programs run as there are cores.

    Args:
        program: Python source; it can import the standard library only.
        stdin: its standard input.
        limits: `Limits()` by default.
        mode: "bubblewrap" or "landlock".
        python: the interpreter; see `launch.find_interpreter`.

    Raises:
        SandboxUnavailableError: this machine lacks what the mode needs.
        ValueError: unknown mode, or limits that the mode cannot keep.
    """
    return run_cases(program, [Stdin(stdin)], limits, mode=mode, python=python)[0]


def run_cases(
    program: str,
    cases: Sequence[Stdin | Call],
    limits: Limits | None = None,
    *,
    mode: Mode = "bubblewrap",
    python: str | None = None,
) -> list[Outcome]:
    """Run a program once per case, one after the other, each time in a fresh process with an empty /tmp.

    The cases share one sandbox, which costs a few milliseconds a case instead of tens. Arguments and errors as in `run`.
    """
    with shared_pool(mode, python).sandbox(program, limits or Limits()) as sandbox:
        return [sandbox.run(case) for case in cases]
