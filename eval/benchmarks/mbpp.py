"""MBPP (Austin et al. 2021, arXiv 2108.07732): 500 short programs, each with three assertions."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row
from eval.benchmarks.humaneval import CHECK


def problem(row: Row) -> Problem:
    shown = "\n".join(row["test_list"])
    lines = "\n".join(f"    {line}" for test in row["test_list"] for line in test.splitlines())
    return Problem(
        prompt=(
            f"{row['text'].strip()}\n\nWrite the Python function, with the imports it needs, in one block that begins with "
            f"```python. It must pass these tests:\n\n```\n{shown}\n```"
        ),
        question=row["text"],
        answer=None,
        metadata={
            "tests": [{"function": CHECK, "args": [], "expected": True}],
            "epilogue": f"{row.get('test_setup_code') or ''}\n\ndef {CHECK}():\n{lines}\n    return True\n",
        },
        id=str(row["task_id"]),
    )


BENCHMARK = Benchmark(
    name="mbpp",
    title="MBPP (Pass@1)",
    hub=Hub(
        path="google-research-datasets/mbpp",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        split="test",
        configs=("full",),
        checked=PINNED,
    ),
    columns=("task_id", "text", "test_list"),
    problem=problem,
    reward="rewards.code_tests:score",
    metric="pass@1",
    max_completion_length=2048,
    needs=("sandbox",),
    published="MBPP (base)",
    source="greedy pass@1 by the data set's assertions; chat models are shown them, as in the paper",
    departs="zero-shot; the published numbers are 3-shot, of base models",
)
