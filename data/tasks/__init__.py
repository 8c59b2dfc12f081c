"""Task families: generated problems with worked solutions and exact scorers. One file per family.

    get_task("chain_sum").item(level=2, split="train", index=17)
    -> TaskItem(prompt="1-3+0-8=", answer="-10", worked="1-3=-2,-2+0=-2,-2-8=-10", ...)

A new family is a file with a `TaskFamily` and an entry in `_FAMILIES`.
"""

from __future__ import annotations

from data.tasks.base import Split, TaskFamily, TaskItem, split_of
from data.tasks.bilingual_counting import BilingualCounting, MixedCounting
from data.tasks.chain_sum import ChainSum
from data.tasks.letter_counting import LetterCounting
from data.tasks.products import Products

__all__ = ["Split", "TaskFamily", "TaskItem", "get_task", "split_of", "task_names"]

_FAMILIES: dict[str, TaskFamily] = {
    family.name: family for family in (ChainSum(), Products(), LetterCounting(), BilingualCounting(), MixedCounting())
}


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows."""
    return tuple(_FAMILIES)


def get_task(name: str) -> TaskFamily:
    """The task family of that name.

    Raises:
        ValueError: no such family.
    """
    if name not in _FAMILIES:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]
