"""AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475): 805 instructions, answers against those of GPT-4 Turbo."""

from __future__ import annotations

from eval.benchmarks.base import Benchmark, Hub, Problem, Row


def problem(row: Row) -> Problem:
    return Problem(
        prompt=row["instruction"],
        question=row["instruction"],
        answer=None,
        kind=row.get("dataset"),
        baseline=row["output"],
    )


BENCHMARK = Benchmark(
    name="alpaca_eval",
    title="AlpacaEval 2.0 (win rate)",
    hub=Hub(
        path="tatsu-lab/alpaca_eval",
        revision=None,
        split="eval",
        files=("alpaca_eval_gpt4_baseline.json",),
        checked="name and file as in the data set's own script; its revision is not verified, so the newest is read",
    ),
    columns=("instruction", "output"),
    problem=problem,
    reward="rewards.tournament:score",
    metric="win rate",
    max_completion_length=2048,
    needs=("judge",),
    is_pairwise=True,
    source="the share of points won against the baseline; every pair is judged in both orders",
    departs="the plain win rate by our own rubric: published numbers are length-controlled and not comparable",
)
