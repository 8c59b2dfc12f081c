"""AIME 2024: the 30 problems of both papers; answers are whole numbers from 0 to 999."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_number, mathematics


def problem(row: Row) -> Problem:
    return Problem(
        prompt=mathematics(row["problem"]), question=row["problem"], answer=str(row["answer"]), id=str(row["id"])
    )


BENCHMARK = Benchmark(
    name="aime_2024",
    title="AIME 2024 (Pass@1)",
    hub=Hub(
        path="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        split="train",
        checked=PINNED,
    ),
    columns=("id", "problem", "answer"),
    problem=problem,
    reward="rewards.math_answer:score",
    metric="pass@1",
    num_samples=64,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    final_answer=boxed_number,
    published="AIME 2024",
    source="DeepSeek-R1's README: 64 samples a problem, temperature 0.6, top-p 0.95, 32,768 tokens; cons@64 beside it",
)
