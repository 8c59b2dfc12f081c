"""Whether the completion's program, in one of several languages, passes assertions that are compiled or run with it.

Benchmarks such as MultiPL-E bring their tests as code of the language, so the tests and what they expect have to go into the
sandbox beside the program. An exit code says nothing there, since any program can end with 0. So the last line of the
tests is replaced by ours, which has two parts: an assertion about two numbers, and a word that nobody could know before.
A program passes when

1. the word is the last thing that comes out, so the tests were reached and none of them ended the program, and
2. in a second run, with another word, the same assertion made false keeps that word from coming out. Programs that look up
   the word in their own source, switch assertions off or catch them print it then too, and fail.

A program that makes its result equal to everything, or reads from its own source what is expected, is still not found out:
measure with this, do not train with it (docs/sandbox.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from posttrain.types import RewardResult
from rewards.code_tests import STATUSES, assemble, extract_program
from rewards.sandbox import Language, Limits, Mode, Outcome, Pool, Stdin, get_language, shared_pool

PROGRAM = "@@program@@"  # in the files of a record: where the completion's program goes
END = "@@end@@"  # where the tests have passed

# What stands there, with the numbers and the word put in; in the words that the language's tests use themselves.
ENDINGS = {
    "python": 'assert {left} == {right}\nprint("\\n{word}")',
    "bash": "[[ {left} = {right} ]]\nbuiltin printf '\\n%s\\n' {word}",
    "cpp": 'assert(({left}) == ({right})); std::cout << "\\n{word}" << std::endl;',
    "java": 'assert(({left}) == ({right})); System.out.println("\\n{word}");',
    "javascript": 'assert.deepEqual({left},{right});\nconsole.log("\\n{word}");',
}


def score(
    completion: str,
    answer: str | None,
    language: str = "python",
    files: Any = None,
    definitions: str = "",
    sandbox: Mode = "bubblewrap",
    seconds_per_test: float = 20.0,
    cpu_seconds: int = 10,
    memory_mb: int = 1024,
    **metadata: Any,
) -> RewardResult:
    """1.0 when the program passes its tests, else 0.0.

    Status "timeout" or "crash": it ended so, or did not compile. "infrastructure": the sandbox did not start.

    Args:
        completion: the model's text; its last closed code block marked as the language is run.
        answer: not used.
        language: from the record; see `rewards.sandbox.languages`.
        files: from the record: the program's files by name, with `PROGRAM` in one of them and `END` in one.
        definitions: from the record: what goes before the program, unless it has the first line of it itself.
        sandbox: "bubblewrap", or for Python the weaker "landlock".
        seconds_per_test: wall clock of a run; compiling comes on top.
        cpu_seconds: processor time of a run; whole seconds.
        memory_mb: of the program, in units of 2**20 bytes.
        metadata: not used.

    Raises:
        ValueError: no files, a file without its place for the program or the end, or an unknown language.
        rewards.sandbox.SandboxUnavailableError: bubblewrap or a tool of the language is missing.
    """
    known = get_language(language)
    _check_files(files)
    program = extract_program(completion, known.tags)
    if program is None:
        return RewardResult(0.0, detail=f"no single final answer with a closed ```{known.tags[0]} block")
    if definitions.strip() and definitions.strip().split("\n")[0] not in program:
        program = f"{definitions}\n{program}"
    limits = Limits(seconds=seconds_per_test, cpu_seconds=cpu_seconds, memory_bytes=memory_mb * 2**20)
    pool = shared_pool(sandbox, language=language)
    outcome, word = _run(pool, known, _with_program(known, files, program), limits, fails=False)
    if outcome.status == "infrastructure":
        return RewardResult(0.0, "infrastructure", outcome.detail)
    if outcome.status != "ok":
        how = "does not compile" if outcome.step == "compile" else f"ended with {outcome.status}"
        return RewardResult(0.0, STATUSES.get(outcome.status, "ok"), f"{how}: {outcome.detail}")
    if outcome.stdout.rstrip().rpartition("\n")[2] != word:
        return RewardResult(0.0, detail="ended before its tests did")
    control, word = _run(pool, known, _with_program(known, files, program), limits, fails=True)
    if control.status == "infrastructure":
        return RewardResult(0.0, "infrastructure", control.detail)
    if word in control.stdout:
        return RewardResult(0.0, detail="passes assertions that are false: it tampers with its tests")
    return RewardResult(1.0, detail="passes its tests")


def _check_files(files: Any) -> None:
    if not isinstance(files, Mapping) or not files or not all(isinstance(text, str) for text in files.values()):
        raise ValueError(f"program_tests needs the column `files`, names with texts; got {files!r:.200}")
    for mark in (PROGRAM, END):
        places = sum(text.count(mark) for text in files.values())
        if places != 1:
            raise ValueError(f"the column `files` must have {mark} in one place, not in {places}")


def _with_program(language: Language, files: Mapping[str, str], program: str) -> dict[str, str]:
    found = {}
    for name, text in files.items():
        before, mark, after = text.partition(PROGRAM)
        if not mark:
            found[name] = text
        elif language.name == "python":  # what it imports from __future__ has to come first
            found[name] = assemble(before, program, after)
        else:
            found[name] = f"{before}{program}{after}"
    return found


def _run(
    pool: Pool, language: Language, files: Mapping[str, str], limits: Limits, *, fails: bool
) -> tuple[Outcome, str]:
    """Run the tests with an assertion at the end that holds or fails, and what would be printed after it."""
    left = secrets.randbelow(900_000) + 100_000
    right = left + (secrets.randbelow(90_000) + 1 if fails else 0)
    word = secrets.token_hex(16)
    ending = ENDINGS[language.name].format(left=left, right=right, word=word)
    filled = {name: text.replace(END, ending) for name, text in files.items()}
    with pool.sandbox(filled, limits) as runner:
        return runner.run(Stdin()), word
