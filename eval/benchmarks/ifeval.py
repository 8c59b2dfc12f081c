"""IFEval (Zhou et al. 2023, arXiv 2311.07911): instructions whose following a program can check."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row


def problem(row: Row) -> Problem:
    options = [{name: value for name, value in given.items() if value is not None} for given in row["kwargs"]]
    return Problem(
        prompt=row["prompt"],
        question=row["prompt"],
        answer=None,
        metadata={"instruction_id_list": list(row["instruction_id_list"]), "kwargs": options},
        id=str(row["key"]),
    )


BENCHMARK = Benchmark(
    name="ifeval",
    title="IF-Eval (Prompt Strict)",
    hub=Hub(path="google/IFEval", revision="966cd89545d6b6acfd7638bc708b98261ca58e84", split="train", checked=PINNED),
    columns=("key", "prompt", "instruction_id_list", "kwargs"),
    problem=problem,
    reward="rewards.instruction_following:score",
    metric="prompt-level strict accuracy",
    published="IF-Eval",
    source="greedy; all instructions of a prompt are followed, by the strict rules of the paper",
    departs="sentences, words and languages are told apart by our own rules, see rewards/instructions.py",
)
