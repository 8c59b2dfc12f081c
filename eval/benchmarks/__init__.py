"""Benchmarks by name: one file, one `BENCHMARK`.

    get_benchmark("math_500").problem(row)

A new one is a file here with a `BENCHMARK` and a name in `NAMES`; tests/test_benchmarks.py then holds it to the contract.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module

from eval.benchmarks.base import Benchmark

NAMES = (
    "math_500",
    "aime_2024",
    "aime_2025",
    "cnmo_2024",
    "gsm8k",
    "gpqa_diamond",
    "mmlu",
    "mmlu_redux",
    "mmlu_pro",
    "ceval",
    "drop",
    "ifeval",
    "simpleqa",
    "frames",
    "longbench_v2",
    "humaneval",
    "humaneval_mul",
    "mbpp",
    "livecodebench",
    "reward_bench",
    "arena_hard",
    "alpaca_eval",
    "tiny_tasks",
    "reasoning_gym",
)


@cache
def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"{name!r} is no benchmark"
            + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(NAMES)}")
        )
    found: Benchmark = import_module(f"eval.benchmarks.{name}").BENCHMARK
    return found
