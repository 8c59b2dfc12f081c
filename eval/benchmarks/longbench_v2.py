"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): four choices about contexts of 8,000 to 2 million words."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_letter, choice


def problem(row: Row) -> Problem:
    asked = choice(row["question"], [row[f"choice_{letter}"] for letter in "ABCD"])
    return Problem(
        prompt=f"Read this text, then answer the question below it.\n\n{row['context'].strip()}\n\n{asked}",
        question=row["question"],
        answer=row["answer"],
        metadata={"num_choices": 4},
        kind=row["length"],
        id=row["_id"],
    )


BENCHMARK = Benchmark(
    name="longbench_v2",
    title="LongBench v2 (Acc.)",
    hub=Hub(
        path="THUDM/LongBench-v2", revision="2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9", split="train", checked=PINNED
    ),
    columns=("_id", "length", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="accuracy",
    temperature=0.1,
    max_completion_length=1024,
    final_answer=boxed_letter,
    shortens=True,
    published="LongBench v2",
    source="the paper: temperature 0.1, contexts longer than the window lose their middle",
)
