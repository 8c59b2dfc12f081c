"""MMLU (Hendrycks et al. 2020, arXiv 2009.03300): 57 subjects, four choices."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, LmEval, Problem, Row, boxed_letter, choice


def problem(row: Row) -> Problem:
    return Problem(
        prompt=choice(row["question"], row["choices"]),
        question=row["question"],
        answer="ABCD"[int(row["answer"])],
        metadata={"num_choices": 4},
        kind=row["subject"],
    )


BENCHMARK = Benchmark(
    name="mmlu",
    title="MMLU (EM)",
    hub=Hub(
        path="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        split="test",
        configs=("all",),
        checked=PINNED,
    ),
    columns=("question", "choices", "answer", "subject"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="exact match",
    max_completion_length=8192,
    final_answer=boxed_letter,
    lm_eval=LmEval(
        task="mmlu",
        subtask=lambda row: f"mmlu_{row['subject']}",
        fewshot_split="dev",
        num_fewshot=5,
        metric="acc",
        published="MMLU (base)",
    ),
    published="MMLU",
    source="chat: zero-shot with reasoning, 8,192 tokens (DeepSeek-V3's README); base: 5-shot log-likelihood, lm_eval",
)
