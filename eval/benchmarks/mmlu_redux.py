"""MMLU-Redux 2.0 (Gema et al. 2024, arXiv 2406.04127): MMLU's questions looked through for errors by people."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_letter, choice
from eval.benchmarks.subjects import MMLU


def problem(row: Row) -> Problem | None:
    if row["error_type"] != "ok":
        return None
    return Problem(
        prompt=choice(row["question"], row["choices"]),
        question=row["question"],
        answer="ABCD"[int(row["answer"])],
        metadata={"num_choices": 4},
        kind=row.get("subject") or row.get("config"),
    )


BENCHMARK = Benchmark(
    name="mmlu_redux",
    title="MMLU-Redux (EM)",
    hub=Hub(
        path="edinburgh-dawg/mmlu-redux-2.0",
        revision="372ea425445d51e1ba1188c56e5e893f8138621f",
        split="test",
        configs=MMLU,
        checked=PINNED,
    ),
    columns=("question", "choices", "answer", "error_type"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="exact match",
    final_answer=boxed_letter,
    published="MMLU-Redux",
    source="zero-shot with reasoning, 8,192 tokens (DeepSeek-V3's README)",
    departs="only questions that the annotators found free of errors; DeepSeek does not say what it did with the others",
)
