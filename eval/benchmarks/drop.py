"""DROP (Dua et al. 2019, arXiv 1903.00161): questions that need counting and adding over a passage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.benchmarks.base import NAMED, Benchmark, Hub, Problem, Row


def problem(row: Row) -> Problem:
    return Problem(
        prompt=_prompt(row),
        question=row["question"],
        answer=None,
        metadata={"references": references(row)},
        cluster=row["section_id"],
        id=row["query_id"],
    )


def references(row: Row) -> list[list[str]]:
    """Every different reference: the answer and those of the validators, each a list of spans."""
    checked = row.get("validated_answers") or {}
    numbers, dates, spans = (checked.get(name) or [] for name in ("number", "date", "spans"))
    others = [
        {"number": number, "date": date, "spans": span}
        for number, date, span in zip(numbers, dates, spans, strict=True)
    ]
    found: list[list[str]] = []
    for answer in (row["answer"], *others):
        reference = _spans(answer)
        if reference not in found and any(span.strip() for span in reference):
            found.append(reference)
    return found


def _spans(answer: Mapping[str, Any]) -> list[str]:
    """A number, or spans of the passage, or a date."""
    if answer.get("number"):
        return [str(answer["number"])]
    if answer.get("spans"):
        return [str(span) for span in answer["spans"]]
    date = answer.get("date") or {}
    return [" ".join(str(date.get(part) or "") for part in ("day", "month", "year")).strip()]


def _prompt(row: Row) -> str:
    return (
        f"{row['passage'].strip()}\n\nQuestion: {row['question'].strip()}\n\n"
        f"Answer from the passage. Reason briefly, then write the answer alone, without units or explanation, between "
        f"<answer> and </answer>; several parts are separated by |."
    )


BENCHMARK = Benchmark(
    name="drop",
    title="DROP (3-shot F1)",
    hub=Hub(
        path="EleutherAI/drop",
        revision=None,
        split="validation",
        fewshot_split="train",
        checked=NAMED,
    ),
    columns=("section_id", "query_id", "passage", "question", "answer", "validated_answers"),
    problem=problem,
    demonstration=lambda row: (_prompt(row), f"<answer>{' | '.join(references(row)[0])}</answer>"),
    num_fewshot=3,
    reward="rewards.drop_f1:score",
    metric="F1",
    max_completion_length=8192,
    published="DROP",
    source="DeepSeek-V3's README: 3-shot, F1; references and F1 as in the authors' and lm-eval's scripts",
)
