"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school problems; the reference's number follows `####`."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, LmEval, Problem, Row, mathematics
from rewards.math_answer import extract_answer


def problem(row: Row) -> Problem:
    return Problem(
        prompt=mathematics(row["question"]),
        question=row["question"],
        answer=row["answer"].rpartition("####")[2].strip().replace(",", ""),
    )


BENCHMARK = Benchmark(
    name="gsm8k",
    title="GSM8K (EM)",
    hub=Hub(
        path="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        split="test",
        configs=("main",),
        fewshot_split="train",
        checked=PINNED,
    ),
    columns=("question", "answer"),
    problem=problem,
    demonstration=lambda row: (mathematics(row["question"]), _worked(row["answer"])),
    reward="rewards.math_answer:score",
    reward_kwargs={"extract": "last_expression"},
    metric="exact match",
    max_completion_length=1024,
    final_answer=lambda completion: extract_answer(completion, "last_expression"),
    lm_eval=LmEval(
        task="gsm8k",
        fewshot_split="train",
        num_fewshot=8,
        metric="exact_match",
        filter="flexible-extract",
        published="GSM8K (base)",
    ),
    published="GSM8K (base)",
    source="greedy and zero-shot with reasoning, as chat models are asked",
    departs="the published numbers are 8-shot, of base models; method: lm_eval asks as they do",
)


def _worked(answer: str) -> str:
    reasoning, _, number = answer.rpartition("####")
    return f"{reasoning.strip()}\n\\boxed{{{number.strip()}}}"
