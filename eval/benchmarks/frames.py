"""FRAMES (Krishna et al. 2024, arXiv 2409.12941): questions that take facts from several Wikipedia articles."""

from __future__ import annotations

from eval.benchmarks.base import NAMED, Benchmark, Hub, Problem, Row

RUBRIC = (
    "Is the answer correct? 1 if its final answer means the same as the reference answer, in whatever words; else 0."
)


def problem(row: Row) -> Problem:
    documents = row.get("documents")
    context = "" if not documents else "\n\n".join(documents) + "\n\n"
    return Problem(
        prompt=f"{context}{row['Prompt'].strip()}", question=row["Prompt"], answer=row["Answer"], kind=row.get("kind")
    )


BENCHMARK = Benchmark(
    name="frames",
    title="FRAMES (Acc.)",
    hub=Hub(path="google/frames-benchmark", revision=None, split="test", checked=NAMED),
    columns=("Prompt", "Answer"),
    problem=problem,
    reward="rewards.judge:score",
    reward_kwargs={"rubric": RUBRIC, "scale": 1},
    metric="accuracy",
    needs=("judge",),
    shortens=True,
    published="FRAMES",
    source="greedy; a language model compares with the reference, as in the paper",
    departs=(
        "the data set holds links, not articles: without a column `documents` (list of texts) in your copy this is the "
        "paper's closed-book setting, and lower than numbers with the articles in the prompt"
    ),
)
