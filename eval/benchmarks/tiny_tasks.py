"""The generated task families of the tiny recipes, all levels: held-out problems, no download."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from data.sources import task_records
from data.tasks import TaskFamily, get_task, task_names
from eval.benchmarks.base import Benchmark, Problem
from rewards.extract import final_answer

PER_FAMILY = 100


def generated(size: int | None, seed: int) -> Sequence[Problem]:
    """Evaluation problems of each family, level by level; `size` in all."""
    names = task_names()
    found = []
    for place, name in enumerate(names):
        count = PER_FAMILY if size is None else len(range(place, size, len(names)))
        shares = _shares(get_task(name), count)
        records = (task_records(name, (level,), "eval", share, seed) for level, share in shares.items())
        for record in chain.from_iterable(records):
            text = record.messages[-1]["content"]
            found.append(
                Problem(
                    prompt=text,
                    question=text,
                    answer=record.answer,
                    metadata={**record.metadata},
                    kind=f"{name}/{record.metadata['level']}",
                    id=record.id,
                )
            )
    return found


def _shares(family: TaskFamily, count: int) -> dict[int, int]:
    """How many problems each level gives: as many as the others, or all that it has."""
    shares = dict.fromkeys(family.levels, 0)
    while missing := count - sum(shares.values()):
        open_levels = [level for level, share in shares.items() if share < family.distinct(level)]
        if not open_levels:
            break
        for level in open_levels[:missing]:
            shares[level] += 1
    return shares


BENCHMARK = Benchmark(
    name="tiny_tasks",
    title="tiny tasks (Pass@1)",
    generate=generated,
    reward="rewards.task_answer:score",
    metric="pass@1",
    num_samples=4,
    temperature=1.0,
    max_completion_length=128,
    final_answer=final_answer,
    source="this project",
)
