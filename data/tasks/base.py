"""What a task family is, and the rule that keeps training and evaluation problems apart.

The split of a problem is a property of its prompt text alone (`split_of`): a stable hash sends one prompt in ten to
"eval" and the others to "train". A family draws problems until one falls on the requested side, so no prompt can be in
both splits, whatever the seeds, sizes and levels.
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

Split = Literal["train", "eval"]
EVAL_SHARE = 10  # one prompt in this many is an evaluation prompt
COUNTABLE = 50_000  # levels with at most this many prompts are counted exactly


@dataclass(frozen=True, slots=True)
class TaskItem:
    """One generated problem."""

    prompt: str  # compact, e.g. "4-1-7+7="
    answer: str  # the final answer, e.g. "3"
    worked: str  # every step to the answer, e.g. "4-1=3,3-7=-4,-4+7=3"
    metadata: Mapping[str, Any] = field(default_factory=dict)  # at least task and level


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, from its text alone: the same on every machine and in every run."""
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


class TaskFamily(ABC):
    """A generator, its worked solutions and its scorer.

    A family says what its levels are, how a problem is drawn from a number, which prompts exist and how an answer is
    scored; `item` and `items` do the rest.
    """

    name: str
    levels: tuple[int, ...]
    characters: str = ""  # of its texts, beyond printable ASCII: `model.extra_characters` of a policy built for it

    @abstractmethod
    def draw(self, level: int, number: int) -> TaskItem:
        """The problem that `number` (0 <= number < 2**62) stands for at this level; the same for the same number."""

    @abstractmethod
    def prompts(self, level: int) -> Iterator[str]:
        """Every prompt of the level, each once."""

    @abstractmethod
    def space(self, level: int) -> int:
        """How many prompts the level has."""

    @abstractmethod
    def score(self, answer_text: str, answer: str) -> float:
        """Score in 0..1 of an extracted final answer against the reference; exactly 1.0 means right.

        Values between 0 and 1 are the generator's own partial credit, which `rewards.task_answer` does not give.
        """

    @abstractmethod
    def steps(self, worked: str) -> list[str]:
        """The steps of a worked solution, each ending with its result; `join` puts them together again."""

    @abstractmethod
    def join(self, steps: Sequence[str]) -> str:
        """The inverse of `steps`."""

    def with_result(self, step: str, change: Callable[[str], str]) -> str:
        """A step with another result: `change` is given the number in digits and returns the one to write instead."""
        return re.sub(r"-?\d+$", lambda found: change(found[0]), step)

    @abstractmethod
    def slip(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """A worked solution with one mistake that is carried through to the end, and the wrong answer it comes to."""

    def item(self, level: int, split: Split, index: int, seed: int = 0) -> TaskItem:
        """Problem `index` (0, 1, ...) of a split. The same arguments always give the same problem.

        Small levels repeat themselves within a split; `items` leaves repeats out of evaluation sets.

        Raises:
            ValueError: unknown level or split, negative index.
        """
        self._check(level, split)
        if index < 0:
            raise ValueError(f"index must be 0 or more, got {index}")
        key = f"{self.name}/{level}/{split}/{seed}/{index}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 3
        while True:
            item = self.draw(level, number)
            if split_of(item.prompt) == split:
                return item
            number += 1

    def items(self, level: int, split: Split, size: int, seed: int = 0) -> list[TaskItem]:
        """`size` problems of a split. Evaluation problems are distinct; training problems may repeat.

        Raises:
            ValueError: unknown level or split, negative size, or more distinct evaluation problems than exist.
        """
        self._check(level, split)
        if size < 0:
            raise ValueError(f"size must be 0 or more, got {size}")
        if split == "train":
            return [self.item(level, split, index, seed) for index in range(size)]
        self._check_distinct(level, size)
        distinct: dict[str, TaskItem] = {}
        index = 0
        while len(distinct) < size:
            item = self.item(level, split, index, seed)
            distinct.setdefault(item.prompt, item)
            index += 1
        return list(distinct.values())

    def distinct(self, level: int) -> int:
        """How many distinct evaluation problems a level can give; of a large level half of them.

        Raises:
            ValueError: unknown level.
        """
        self._check(level, "eval")
        if self.space(level) <= COUNTABLE:
            return _count_eval(self, level)
        # Collecting nearly all of a large level would take for ever.
        return self.space(level) // (2 * EVAL_SHARE)

    def _check(self, level: int, split: str) -> None:
        if level not in self.levels:
            raise ValueError(f"task {self.name!r} has no level {level}; its levels are {list(self.levels)}")
        if split not in get_args(Split):
            raise ValueError(f"unknown split {split!r} of task {self.name!r}; use one of {list(get_args(Split))}")

    def _check_distinct(self, level: int, size: int) -> None:
        available = self.distinct(level)
        if size > available:
            how_many = f"{'exactly' if self.space(level) <= COUNTABLE else 'up to'} {available}"
            raise ValueError(
                f"task {self.name!r} level {level} can give {how_many} distinct eval problems, not {size}; "
                f"ask for fewer or add higher levels (it has {list(self.levels)})"
            )


@cache
def _count_eval(family: TaskFamily, level: int) -> int:
    return sum(split_of(prompt) == "eval" for prompt in family.prompts(level))


@cache
def gym_dataset(name: str, **config: int) -> Any:
    """A `reasoning_gym` dataset to index with any number below 2**62; item k depends on k and the config alone.

    reasoning_gym seeds item k with `seed + k`, so with seed 0 the index is the seed. Imported here and not at the top
    because the import takes 1.5 s.
    """
    with warnings.catch_warnings():
        # A package that reasoning_gym needs compiles with warnings about its own code.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    return reasoning_gym.create_dataset(name, size=2**62, seed=0, **config)
