"""The generated task families of the tiny recipes, all levels: held-out problems, no download."""

from __future__ import annotations

from collections.abc import Sequence

from data.sources import task_records
from data.tasks import get_task, task_names
from eval.benchmarks.base import Benchmark, Problem
from rewards.extract import final_answer

PER_FAMILY = 100


def generated(size: int | None, seed: int) -> Sequence[Problem]:
    """Evaluation problems of each family, its levels in turn; `size` in all."""
    names = task_names()
    found = []
    for place, name in enumerate(names):
        count = PER_FAMILY if size is None else len(range(place, size, len(names)))
        if not count:
            continue
        for record in task_records(name, get_task(name).levels, "eval", count, seed):
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
