"""C-Eval (Huang et al. 2023, arXiv 2305.08322): 52 subjects in Chinese. The answers of its test split are not public."""

from __future__ import annotations

from eval.benchmarks.base import NAMED, Benchmark, Hub, LmEval, Problem, Row, boxed_letter
from eval.benchmarks.subjects import CEVAL


def problem(row: Row) -> Problem:
    choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    return Problem(
        prompt=f"{row['question'].strip()}\n\n{choices}\n\n请逐步推理，并把正确选项的字母写在 \\boxed{{}} 中。",
        question=row["question"],
        answer=row["answer"],
        metadata={"num_choices": 4},
        kind=row.get("config"),
    )


BENCHMARK = Benchmark(
    name="ceval",
    title="C-Eval (EM)",
    hub=Hub(path="ceval/ceval-exam", revision=None, split="val", configs=CEVAL, checked=NAMED),
    columns=("question", "A", "B", "C", "D", "answer"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="exact match",
    final_answer=boxed_letter,
    lm_eval=LmEval(task="ceval-valid", num_fewshot=5, metric="acc", published="C-Eval (base)"),
    published="C-Eval",
    source="zero-shot with reasoning, 8,192 tokens (DeepSeek-V3's README)",
    departs="the split val, since the answers of test are not public",
)
