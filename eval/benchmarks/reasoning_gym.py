"""Problems that reasoning-gym generates, by the levels of its own curricula: no download, no end of problems."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from eval.benchmarks.base import Benchmark, Problem

DATASETS = (
    "basic_arithmetic",
    "chain_sum",
    "count_bits",
    "gcd",
    "lcm",
    "letter_counting",
    "products",
    "simple_equations",
)
LEVELS = (0, 1, 2)  # of every attribute of a curriculum, from the easiest on
PER_LEVEL = 10


def generated(size: int | None, seed: int) -> Sequence[Problem]:
    """Problems of each data set and level; `size` in all, spread evenly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that reasoning_gym needs
        from reasoning_gym.factory import create_curriculum, create_dataset

    places = [(name, level) for level in LEVELS for name in DATASETS]
    found = []
    for place, (name, level) in enumerate(places):
        count = PER_LEVEL if size is None else len(range(place, size, len(places)))
        if not count:
            continue
        curriculum = create_curriculum(name)
        curriculum.set_global_level(level)
        config = curriculum.generate_configuration({"size": count, "seed": seed})
        for item in create_dataset(name, **vars(config)):
            details = item["metadata"]
            found.append(
                Problem(
                    prompt=f"{item['question']}\n\nWrite the final answer between <answer> and </answer>.",
                    question=item["question"],
                    answer=item["answer"],
                    metadata={**details, "source_dataset": name, "question": item["question"]},
                    kind=f"{name}/{level}",
                    id=f"{name}/{level}/{seed}/{details['source_index']}",
                )
            )
    return found


BENCHMARK = Benchmark(
    name="reasoning_gym",
    title="reasoning-gym, levels 0-2 (Pass@1)",
    generate=generated,
    reward="rewards.reasoning_gym:score",
    metric="pass@1",
    num_samples=4,
    temperature=1.0,
    max_completion_length=512,
    source="reasoning-gym's curricula, all attributes at one level; its own scorers",
)
