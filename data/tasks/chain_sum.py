"""Sums and differences of one-digit numbers: prompt "4-1-7+7=", answer "3".

Problems come from reasoning_gym's `chain_sum`, whose expression is written without spaces and without the sentence
around it, so that a character-level model reads one token per symbol. Worked solution: the running totals,
"4-1=3,3-7=-4,-4+7=3". At the lower levels only those problems are taken whose running totals stay small, so that each
step of a worked solution is one of about a hundred facts, while the direct answer still asks for all steps at once.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from data.tasks.base import TaskFamily, TaskItem, gym_dataset

TERMS = {1: (2, 3), 2: (4, 5), 3: (6, 7), 4: (8, 9)}  # level -> fewest and most terms
HIGHEST = {1: 9, 2: 9, 3: 19, 4: None}  # level -> every running total lies in 0..HIGHEST; None sets no bounds


class ChainSum(TaskFamily):
    name = "chain_sum"
    levels = tuple(TERMS)

    def draw(self, level: int, number: int) -> TaskItem:
        fewest, most = TERMS[level]
        problems = gym_dataset("chain_sum", min_terms=fewest, max_terms=most, min_digits=1, max_digits=1)
        while True:
            entry = problems[number]
            expression = entry["metadata"]["expression"].replace(" ", "")
            if _within(totals(expression), HIGHEST[level]):
                break
            number += 1
        return TaskItem(
            prompt=f"{expression}=",
            answer=entry["answer"],
            worked=running_totals(expression),
            metadata={"task": self.name, "level": level},
        )

    def prompts(self, level: int) -> Iterator[str]:
        fewest, most = TERMS[level]
        for terms in range(fewest, most + 1):
            for first in range(10):
                yield from _continued(str(first), first, terms - 1, HIGHEST[level])

    def space(self, level: int) -> int:
        fewest, most = TERMS[level]
        return sum(_count(terms, HIGHEST[level]) for terms in range(fewest, most + 1))

    def score(self, answer_text: str, answer: str) -> float:
        """reasoning_gym's: equal as decimal numbers, so "+7", "07" and "7.0" are right against "7"."""
        dataset = gym_dataset("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
        return float(dataset.score_answer(answer_text, {"answer": answer}))

    def steps(self, worked: str) -> list[str]:
        return worked.split(",")

    def join(self, steps: Sequence[str]) -> str:
        return ",".join(steps)

    def slip(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """One running total is off by 1 or 2."""
        expression = prompt.rstrip("=")
        place = rng.randrange(1, len(totals(expression)))
        worked = running_totals(expression, wrong_at=place, error=rng.choice((-2, -1, 1, 2)))
        return worked, worked.rpartition("=")[2]


def totals(expression: str) -> list[int]:
    """ "4-1-7" -> [4, 3, -4]: the value after each term."""
    return list(accumulate(int(term) for term in re.findall(r"[+-]?\d+", expression)))


def running_totals(expression: str, wrong_at: int = 0, error: int = 0) -> str:
    """ "4-1-7" -> "4-1=3,3-7=-4"; `expression` has two terms or more, joined by + and -.

    The totals from term `wrong_at` on are off by `error`.
    """
    terms = re.findall(r"[+-]?\d+", expression)[1:]
    values = [value + error * (place >= wrong_at) for place, value in enumerate(totals(expression))]
    return ",".join(
        f"{before}{term}={after}" for before, term, after in zip(values[:-1], terms, values[1:], strict=True)
    )


def _within(values: list[int], highest: int | None) -> bool:
    return highest is None or all(0 <= value <= highest for value in values)


def _continued(text: str, total: int, terms: int, highest: int | None) -> Iterator[str]:
    """Every prompt that starts with `text` (worth `total`) and has so many terms more."""
    if terms == 0:
        yield f"{text}="
        return
    for sign in (1, -1):
        for digit in range(10):
            if _within([total + sign * digit], highest):
                yield from _continued(
                    f"{text}{'+' if sign > 0 else '-'}{digit}", total + sign * digit, terms - 1, highest
                )


def _count(terms: int, highest: int | None) -> int:
    """How many expressions of so many terms keep their running totals within bounds."""
    if highest is None:
        return int(10 * 20 ** (terms - 1))
    ways = Counter(range(10))  # running total -> expressions so far
    for _ in range(terms - 1):
        following: Counter[int] = Counter()
        for total, count in ways.items():
            for step in [*range(10), *range(0, -10, -1)]:
                if 0 <= total + step <= highest:
                    following[total + step] += count
        ways = following
    return sum(ways.values())
