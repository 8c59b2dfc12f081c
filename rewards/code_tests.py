"""The share of a problem's tests that the completion's Python program passes, run in a sandbox.

What is expected never enters the sandbox: what the program printed or returned comes out as data and is compared here,
so a program cannot pass by ending the test early, by printing a verdict or by overloading `==`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.types import RewardResult, RewardStatus
from rewards.code_cases import CodeTest, read_tests
from rewards.extract import final_answer
from rewards.sandbox import Limits, Mode, Outcome, get_language, shared_pool

TAGS = get_language("python").tags
STATUSES: dict[str, RewardStatus] = {"timeout": "timeout", "crash": "crash", "memory": "crash", "output": "crash"}


def score(
    completion: str,
    answer: str | None,
    tests: Any = None,
    prologue: str = "",
    epilogue: str = "",
    partial_credit: bool = False,
    sandbox: Mode = "bubblewrap",
    python: str | None = None,
    seconds_per_test: float = 10.0,
    cpu_seconds: int = 5,
    total_seconds: float = 60.0,
    memory_mb: int = 512,
    tolerance: float = 0.0,
    tuples_as_lists: bool = False,
    **metadata: Any,
) -> RewardResult:
    """1.0 when every test passes, else 0.0; with partial credit the share of tests that pass.

    Status "timeout" or "crash": the first test that failed did so by running too long, or by ending with an error, out
    of memory or with too much output. "infrastructure": the sandbox did not start.

    Args:
        completion: the model's text; see `extract_program` for what is run.
        answer: the tests as JSON text, where the record has no column `tests`.
        tests: a list of tests or JSON text of one; see `rewards.code_cases`.
        prologue, epilogue: code before and after the completion's program, from the record: what the problem has defined, or
            a function that checks it. Code that checks inside the sandbox can be deceived by the program it checks: use it to
            measure, not to train.
        partial_credit: score the share of tests; otherwise the first that fails ends the run.
        sandbox: "bubblewrap", or the weaker "landlock" (docs/sandbox.md).
        python: the interpreter; by default this process's own where it can be reached from inside, else the system's.
        seconds_per_test: wall clock.
        cpu_seconds: processor time of a test; whole seconds.
        total_seconds: wall clock for all tests; those not reached fail.
        memory_mb: address space, in units of 2**20 bytes.
        tolerance: absolute and relative error allowed between two floats of a returned value.
        tuples_as_lists: a returned tuple counts as a list, for tests that came as JSON, which has no tuples.
        metadata: not used.

    Raises:
        ValueError: no tests, tests that cannot be read, or an option out of range.
        rewards.sandbox.SandboxUnavailableError: bubblewrap or a usable interpreter is missing.
    """
    if tests is None and answer is None:
        raise ValueError("code_tests needs the tests of the problem: a column `tests`, or JSON text as the answer")
    cases = read_tests(answer if tests is None else tests)
    limits = Limits(
        seconds=seconds_per_test, cpu_seconds=cpu_seconds, total_seconds=total_seconds, memory_bytes=memory_mb * 2**20
    )
    program = extract_program(completion)
    if program is None:
        return RewardResult(0.0, detail="no single final answer with a closed ```python block")
    program = assemble(prologue, program, epilogue)
    passed, failure, failed = 0, None, 0
    with shared_pool(sandbox, python).sandbox(program, limits) as runner:
        for place, test in enumerate(cases):
            outcome = runner.run(test.case)
            if outcome.status == "infrastructure":
                return RewardResult(0.0, "infrastructure", outcome.detail)
            if test.passed(outcome, tolerance=tolerance, tuples_as_lists=tuples_as_lists):
                passed += 1
                continue
            if failure is None:
                failure, failed = outcome, place
            if not partial_credit:
                break
    if failure is None:
        return RewardResult(1.0, detail=f"{passed} of {len(cases)} tests")
    share = passed / len(cases) if partial_credit else 0.0
    detail = f"{passed} of {len(cases)} tests; test {failed} {_describe(cases[failed], failure)}"
    return RewardResult(share, STATUSES.get(failure.status, "ok"), detail)


def extract_program(completion: str, tags: Sequence[str] = TAGS) -> str | None:
    """The program of a completion: the last closed code block with one of the marks, python, python3 or py.

    It is looked for in the single answer block; in a text without answer tags, in what follows the last `</think>`.
    None: no such block, an empty one, or answer tags that are not one pair.
    """
    if "<answer>" in completion or "</answer>" in completion:
        text = final_answer(completion) or ""
    else:
        text = completion.rpartition("</think>")[2]
    program: str | None = None
    block: list[str] | None = None
    language = ""
    for line in text.split("\n"):
        mark = line.strip()
        if block is None and mark.startswith("```"):
            block, language = [], mark[3:].strip().lower()
        elif block is not None and mark == "```":
            if language in tags:
                program = "\n".join(block)
            block = None
        elif block is not None:
            block.append(line)
    return program if program is not None and program.strip() else None


def assemble(prologue: str, program: str, epilogue: str) -> str:
    """The three one after the other; what the program imports from `__future__` has to come first."""
    if not prologue and not epilogue:
        return program
    lines = program.split("\n")
    first = [line for line in lines if line.startswith("from __future__ import")]
    rest = [line for line in lines if not line.startswith("from __future__ import")]
    return "\n".join([*first, prologue, *rest, "", epilogue, ""])


def _describe(test: CodeTest, outcome: Outcome) -> str:
    if outcome.status != "ok":
        return f"ended with {outcome.status}: {outcome.detail}"
    got = outcome.stdout if outcome.result is None else outcome.result
    return f"expected {test.expected!r:.100}, got {got!r:.100}"
