"""CNMO 2024 in English, as OpenCompass collected it; DeepSeek does not say which copy its tables are of."""

from __future__ import annotations

from eval.benchmarks.base import NAMED, Benchmark, Hub, Problem, Row, boxed_number, mathematics


def problem(row: Row) -> Problem:
    return Problem(prompt=mathematics(row["question"]), question=row["question"], answer=row["answer"])


BENCHMARK = Benchmark(
    name="cnmo_2024",
    title="CNMO 2024 (Pass@1)",
    hub=Hub(path="opencompass/LiveMathBench", revision=None, split="test", configs=("v202412_CNMO_en",), checked=NAMED),
    columns=("question", "answer"),
    problem=problem,
    reward="rewards.math_answer:score",
    metric="pass@1",
    num_samples=64,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    final_answer=boxed_number,
    published="CNMO 2024",
    source="as AIME 2024 in DeepSeek-R1's README",
    departs="DeepSeek names no data set: this one's 18 problems may be others than those of its tables",
)
