"""LiveCodeBench (Jain et al. 2024, arXiv 2403.07974): contest problems by date, with hidden tests."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

from eval.benchmarks.base import Benchmark, Hub, Problem, Row

FIRST, LAST = "2024-08-01", "2025-01-31"  # contests of DeepSeek-R1's table
_STARRED = ("typing", "collections", "itertools", "functools")
_MODULES = ("bisect", "collections", "functools", "heapq", "itertools", "math", "re", "sys")
IMPORTS = "\n".join([*(f"from {name} import *" for name in _STARRED), *(f"import {name}" for name in _MODULES)])


def problem(row: Row) -> Problem | None:
    if not FIRST <= str(row["contest_date"])[:10] <= LAST:
        return None
    name = json.loads(row["metadata"] or "{}").get("func_name")
    cases = [*json.loads(row["public_test_cases"]), *hidden_tests(row["private_test_cases"])]
    how = (
        f"Write your solution into this, in one block that begins with ```python:\n\n```python\n{row['starter_code']}\n```"
        if row.get("starter_code")
        else "Write a program that reads standard input and prints the answer, in one block that begins with ```python."
    )
    return Problem(
        prompt=f"{row['question_content'].strip()}\n\n{how}",
        question=row["question_content"],
        answer=None,
        metadata={"tests": [_test(case, name) for case in cases], "prologue": IMPORTS, "tuples_as_lists": True},
        kind=row["difficulty"],
        id=row["question_id"],
    )


def _test(case: Row, name: str | None) -> dict[str, Any]:
    if case["testtype"] == "stdin":
        return {"stdin": case["input"], "stdout": case["output"]}
    arguments = [json.loads(line) for line in case["input"].splitlines() if line.strip()]
    return {"function": name, "args": arguments, "expected": json.loads(case["output"])}


def hidden_tests(text: str) -> list[dict[str, Any]]:
    """The hidden tests: JSON, or base64 of compressed pickled JSON text.

    Raises:
        ValueError: the pickle holds anything but a text; unpickling other things could run code.
    """
    try:
        found: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError:
        found = json.loads(_Text(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    return found


class _Text(pickle.Unpickler):
    """Loads plain values and nothing that has to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"hidden tests hold {module}.{name} where a text belongs; the data may be forged")


BENCHMARK = Benchmark(
    name="livecodebench",
    title="LiveCodeBench (Pass@1-COT)",
    hub=Hub(
        path="livecodebench/code_generation_lite",
        revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        split="test",
        files=("test4.jsonl", "test5.jsonl"),
        checked="name and revision as other public code pins them; which file holds which months is not verified",
    ),
    columns=(
        *("question_content", "question_id", "contest_date", "starter_code", "difficulty"),
        *("public_test_cases", "private_test_cases", "metadata"),
    ),
    problem=problem,
    reward="rewards.code_tests:score",
    reward_kwargs={"seconds_per_test": 6.0, "total_seconds": 90.0, "memory_mb": 1024},
    metric="pass@1",
    num_samples=8,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    needs=("sandbox",),
    published="LiveCodeBench",
    source="DeepSeek-R1's README: temperature 0.6, top-p 0.95, 32,768 tokens; contests of August 2024 to January 2025",
    departs="8 samples a problem instead of 64; printed numbers must agree as text",
)
