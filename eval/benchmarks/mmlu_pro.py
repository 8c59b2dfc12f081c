"""MMLU-Pro (Wang et al. 2024, arXiv 2406.01574): up to ten choices, harder questions."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, LmEval, Problem, Row, boxed_letter, choice


def problem(row: Row) -> Problem:
    return Problem(
        prompt=choice(row["question"], row["options"]),
        question=row["question"],
        answer=row["answer"],
        metadata={"num_choices": len(row["options"])},
        kind=row["category"],
        id=str(row["question_id"]),
    )


BENCHMARK = Benchmark(
    name="mmlu_pro",
    title="MMLU-Pro (EM)",
    hub=Hub(
        path="TIGER-Lab/MMLU-Pro",
        revision="b189ec765aa7ed75c8acfea42df31fdae71f97be",
        split="test",
        checked=PINNED,
    ),
    columns=("question_id", "question", "options", "answer", "category"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="exact match",
    final_answer=boxed_letter,
    lm_eval=LmEval(
        task="mmlu_pro",
        subtask=lambda row: f"mmlu_pro_{row['category'].replace(' ', '_')}",
        fewshot_split="validation",
        num_fewshot=5,
        metric="exact_match",
        filter="custom-extract",
        published="MMLU-Pro (base)",
    ),
    published="MMLU-Pro",
    source="zero-shot with reasoning, 8,192 tokens (DeepSeek-V3's README); lm_eval: 5-shot, generated",
)
