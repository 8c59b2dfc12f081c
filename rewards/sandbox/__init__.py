"""Running programs that a model wrote: contained, bounded, and without a trace left.

    from rewards.sandbox import Limits, run
    outcome = run("print(input()[::-1])", "abc", Limits(seconds=2))
    outcome.status, outcome.stdout     # ("ok", "cba\\n")

Python, and with `language` Bash, C++, Java or JavaScript, where the tools are installed (`languages.LANGUAGES`).
`mode` "bubblewrap" (the default) puts each program behind namespaces, an almost empty read-only file system, Landlock, a
system-call filter and resource limits. "landlock" does without bubblewrap and is weaker; it must be asked for by name.
What each stops is in docs/sandbox.md; `python -m rewards.sandbox` says what this machine has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewards.sandbox.languages import LANGUAGES, Language, get_language
from rewards.sandbox.launch import SandboxUnavailableError
from rewards.sandbox.limits import Call, Limits, Mode, Outcome, Stdin
from rewards.sandbox.pool import Pool, close_shared_pools, shared_pool
from rewards.sandbox.values import decode, encode, matches

__all__ = [
    "LANGUAGES",
    "Call",
    "Language",
    "Limits",
    "Mode",
    "Outcome",
    "Pool",
    "SandboxUnavailableError",
    "Stdin",
    "close_shared_pools",
    "decode",
    "encode",
    "get_language",
    "matches",
    "run",
    "run_cases",
    "shared_pool",
]


def run(
    program: str | Mapping[str, str],
    stdin: str = "",
    limits: Limits | None = None,
    *,
    mode: Mode = "bubblewrap",
    python: str | None = None,
    language: str = "python",
) -> Outcome:
    """Run a program as a script. Blocks while as many programs run as there are cores.

    Args:
        program: its source, or its files by name; it can use the standard library of its language only.
        stdin: its standard input.
        limits: `Limits()` by default.
        mode: "bubblewrap" or, for Python, "landlock".
        python: the interpreter; see `launch.find_interpreter`.
        language: see `languages.LANGUAGES`.

    Raises:
        SandboxUnavailableError: this machine lacks what the mode or the language needs.
        ValueError: unknown mode or language, or limits that the mode cannot keep.
    """
    return run_cases(program, [Stdin(stdin)], limits, mode=mode, python=python, language=language)[0]


def run_cases(
    program: str | Mapping[str, str],
    cases: Sequence[Stdin | Call],
    limits: Limits | None = None,
    *,
    mode: Mode = "bubblewrap",
    python: str | None = None,
    language: str = "python",
) -> list[Outcome]:
    """Run a program once per case, one after the other, each time in a fresh process with an empty /tmp.

    The cases share one sandbox, which costs a few milliseconds a case instead of tens; but each compiles anew. Arguments
    and errors as in `run`; a `Call` needs a Python program.
    """
    with shared_pool(mode, python, language).sandbox(program, limits or Limits()) as sandbox:
        return [sandbox.run(case) for case in cases]
