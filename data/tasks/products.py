"""Products of two whole numbers: prompt "47*6=", answer "282".

Factors come from reasoning_gym's `products`. Its two factors always have the same number of digits, so for level 2 the
first factor is taken from a two-digit problem and the second from a one-digit problem. Worked solution: each digit
times each digit with its zeros, then the running sum, "40*6=240,7*6=42,240+42=282". Digits that are zero keep their
step, so that every problem of a level has the same form.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from data.tasks.base import TaskFamily, TaskItem, gym_dataset

DIGITS = {1: (1, 1), 2: (2, 1), 3: (2, 2)}  # level -> digits of the first and of the second factor


class Products(TaskFamily):
    name = "products"
    levels = tuple(DIGITS)

    def draw(self, level: int, number: int) -> TaskItem:
        digits_a, digits_b = DIGITS[level]
        a, b = _factors(digits_a, number)[0], _factors(digits_b, number)[1]
        return TaskItem(
            prompt=f"{a}*{b}=",
            answer=str(a * b),
            worked=partial_products(a, b),
            metadata={"task": self.name, "level": level},
        )

    def prompts(self, level: int) -> Iterator[str]:
        digits_a, digits_b = DIGITS[level]
        for a in _numbers(digits_a):
            for b in _numbers(digits_b):
                yield f"{a}*{b}="

    def space(self, level: int) -> int:
        digits_a, digits_b = DIGITS[level]
        return len(_numbers(digits_a)) * len(_numbers(digits_b))

    def score(self, answer_text: str, answer: str) -> float:
        """reasoning_gym's: equal as decimal numbers, so "+42", "042" and "42.0" are right against "42"."""
        dataset = gym_dataset("products", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
        return float(dataset.score_answer(answer_text, {"answer": answer}))

    def steps(self, worked: str) -> list[str]:
        return worked.split(",")

    def join(self, steps: Sequence[str]) -> str:
        return ",".join(steps)

    def slip(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """One partial product is off by its right factor, as when a line of the table is missed."""
        a, b = (int(factor) for factor in prompt.rstrip("=").split("*"))
        worked = partial_products(a, b, wrong_at=rng.randrange(len(str(a)) * len(str(b))))
        return worked, worked.rpartition("=")[2]


def partial_products(a: int, b: int, wrong_at: int | None = None) -> str:
    """(47, 6) -> "40*6=240,7*6=42,240+42=282"; both factors are 0 or more.

    Partial product `wrong_at` is too large by its right factor, or by 1 where that is 0.
    """
    pairs = [(left, right) for left in _places(a) for right in _places(b)]
    parts = [left * right + (place == wrong_at) * (right or 1) for place, (left, right) in enumerate(pairs)]
    steps = [f"{left}*{right}={part}" for (left, right), part in zip(pairs, parts, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{part}={total + part}")
        total += part
    return ",".join(steps)


def _places(number: int) -> list[int]:
    """47 -> [40, 7]; 0 -> [0]."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]


def _numbers(digits: int) -> range:
    """The numbers that reasoning_gym draws for so many digits: 0 counts as a one-digit number."""
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _factors(digits: int, number: int) -> tuple[int, int]:
    entry = gym_dataset("products", min_terms=2, max_terms=2, min_digits=digits, max_digits=digits)[number]
    first, second = entry["metadata"]["expression"].split(" * ")
    return int(first), int(second)
