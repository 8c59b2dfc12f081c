"""SimpleQA (Wei et al. 2024, arXiv 2411.04368): short questions of fact, graded by a language model."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row

RUBRIC = (
    "Is the answer correct? 1 if it states what the reference answer states, whatever words it takes, and nothing that "
    "contradicts it. 0 if it contradicts the reference, gives several candidates, or does not commit to an answer."
)


def problem(row: Row) -> Problem:
    return Problem(prompt=row["problem"], question=row["problem"], answer=row["answer"])


BENCHMARK = Benchmark(
    name="simpleqa",
    title="SimpleQA (Correct)",
    hub=Hub(
        path="basicv8vc/SimpleQA",
        revision="e319282ab125c3dbd0c7fd00be2e4dd54e7e8f94",
        split="test",
        checked="a copy of the authors' file, which is not on the hub under their name; " + PINNED,
    ),
    columns=("problem", "answer"),
    problem=problem,
    reward="rewards.judge:score",
    reward_kwargs={"rubric": RUBRIC, "scale": 1},
    metric="correct",
    max_completion_length=2048,
    needs=("judge",),
    published="SimpleQA",
    source="greedy; the share of correct answers, as in DeepSeek-V3's README",
    departs="our own rubric; the authors' grader also tells wrong from not attempted, and has its own prompt",
)
