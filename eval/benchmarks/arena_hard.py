"""Arena-Hard-Auto v0.1 (Li et al. 2024, arXiv 2406.11939): 500 hard requests, answers against those of GPT-4-0314."""

from __future__ import annotations

from typing import Any

from eval.benchmarks.base import Benchmark, Hub, Problem, Row

FOLDER = "data/arena-hard-v0.1"


def problem(row: Row) -> Problem:
    return Problem(
        prompt=row["prompt"],
        question=row["prompt"],
        answer=None,
        kind=row.get("cluster"),
        baseline=_text(row["messages"][-1]["content"]),
        id=row["uid"],
    )


def _text(content: Any) -> str:
    """An answer's text; newer files have it inside an object."""
    return str(content["answer"]) if isinstance(content, dict) else str(content)


BENCHMARK = Benchmark(
    name="arena_hard",
    title="Arena-Hard (win rate)",
    hub=Hub(
        path="lmarena-ai/arena-hard-auto",
        revision="15f3746e21432264ce9b453999bde4f3c946d2e6",
        split="test",
        files=(f"{FOLDER}/question.jsonl", f"{FOLDER}/model_answer/gpt-4-0314.jsonl"),
        join="uid",
        checked="name, revision and files as other public code uses them; the columns of the answers are not verified",
    ),
    columns=("uid", "prompt", "messages"),
    problem=problem,
    reward="rewards.tournament:score",
    metric="win rate",
    max_completion_length=4096,
    needs=("judge",),
    is_pairwise=True,
    published="Arena-Hard",
    source="the share of points won against the baseline; every pair is judged in both orders",
    departs="points of 1, 1/2 and 0 by our own rubric, where the authors fit a model to five degrees of preference",
)
