"""MATH-500: the 500 problems of MATH that Lightman et al. (2023, arXiv 2305.20050) held out."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_number, mathematics


def problem(row: Row) -> Problem:
    return Problem(
        prompt=mathematics(row["problem"]),
        question=row["problem"],
        answer=row["answer"],
        kind=row["subject"],
        id=row["unique_id"],
    )


BENCHMARK = Benchmark(
    name="math_500",
    title="MATH-500 (Pass@1)",
    hub=Hub(
        path="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        split="test",
        checked=PINNED,
    ),
    columns=("problem", "answer", "subject", "level", "unique_id"),
    problem=problem,
    reward="rewards.math_answer:score",
    metric="pass@1",
    num_samples=4,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    final_answer=boxed_number,
    published="MATH-500",
    source="DeepSeek-R1's README: temperature 0.6, top-p 0.95, 32,768 tokens, boxed answers",
    departs="4 samples a problem instead of 64, which 500 problems need less; set num_samples: 64 for R1's number",
)
