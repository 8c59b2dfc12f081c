"""AIME 2025: the 30 problems of both papers of the year after DeepSeek-R1's tables."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_number, mathematics


def problem(row: Row) -> Problem:
    return Problem(
        prompt=mathematics(row["problem"]), question=row["problem"], answer=str(row["answer"]), id=str(row["id"])
    )


BENCHMARK = Benchmark(
    name="aime_2025",
    title="AIME 2025 (Pass@1)",
    hub=Hub(path="math-ai/aime25", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b", split="test", checked=PINNED),
    columns=("id", "problem", "answer"),
    problem=problem,
    reward="rewards.math_answer:score",
    metric="pass@1",
    num_samples=64,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    final_answer=boxed_number,
    source="as AIME 2024 in DeepSeek-R1's README",
)
