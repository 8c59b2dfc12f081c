"""Right answers made wrong in known ways: what a reward model learns to tell apart.

    answer   the reasoning is right, the final answer is another number
    step     one step's result is wrong, the steps after it and the final answer are right
    carried  one step is wrong and carried through, so that the final answer follows from it and is wrong
    skipped  one step is left out; the final answer is right
    swapped  the reasoning of another problem before the right final answer
    format   all is right but the tags: one is missing or double, or text stands around them

Where the reasoning is empty (a direct answer), only `answer` and `format` can be done. `answer`, `carried` and `format` are
refused by a verifier that sees the final answer alone; `step`, `skipped` and `swapped` are what it cannot see.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from data.chat import format_answer
from data.tasks import TaskFamily

Corruption = Literal["answer", "step", "carried", "skipped", "swapped", "format"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
_WITHOUT_REASONING = ("answer", "format")


@dataclass(frozen=True, slots=True)
class Solution:
    """A right answer to a problem of a task family."""

    prompt: str
    answer: str
    worked: str  # empty for a direct answer

    @property
    def text(self) -> str:
        """As the assistant writes it."""
        return format_answer(self.worked, self.answer)


def applicable(kind: Corruption, solution: Solution, family: TaskFamily) -> bool:
    """Whether a solution can be corrupted this way."""
    if not solution.worked:
        return kind in _WITHOUT_REASONING
    return kind != "skipped" or len(family.steps(solution.worked)) > 1


def corrupt(kind: Corruption, solution: Solution, family: TaskFamily, other: Solution, rng: random.Random) -> str:
    """The assistant's text with one thing wrong in it.

    Args:
        kind: what to corrupt; it must be `applicable`.
        solution: the right one.
        family: of the problem.
        other: of the same family, with another worked solution; its reasoning is what `swapped` takes.
        rng: decides where and how.

    Raises:
        ValueError: an unknown kind, or one that is not applicable.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; the kinds are {', '.join(CORRUPTIONS)}")
    if not applicable(kind, solution, family):
        raise ValueError(f"corruption {kind!r} needs more reasoning than {solution.text!r} has; use answer or format")
    if kind == "answer":
        return format_answer(solution.worked, other_number(solution.answer, rng))
    if kind == "format":
        return rng.choice(_broken_formats(solution))
    if kind == "swapped":
        return format_answer(other.worked, solution.answer)
    if kind == "carried":
        return format_answer(*family.slip(solution.prompt, rng))
    steps = family.steps(solution.worked)
    place = rng.randrange(len(steps))
    if kind == "skipped":
        del steps[place]
    else:
        steps[place] = family.with_result(steps[place], lambda number: other_number(number, rng))
    return format_answer(family.join(steps), solution.answer)


def other_number(text: str, rng: random.Random) -> str:
    """A whole number 1 to 3 away; a negative one only from a negative one. "7" -> "5"."""
    number = int(text)
    near = [number + error for error in (-3, -2, -1, 1, 2, 3)]
    return str(rng.choice([value for value in near if value >= 0 or number < 0]))


def _broken_formats(solution: Solution) -> list[str]:
    """The right content in wrong tags; none of these has one final answer."""
    thinking, answer = f"<think>{solution.worked}</think>", f"<answer>{solution.answer}</answer>"
    return [
        f"{thinking}{solution.answer}",
        f"{thinking}<answer>{solution.answer}",
        f"{thinking}{answer}{answer}",
        f"{thinking}{answer} {solution.answer}",
        f"<think>{solution.worked}{answer}",
        f"{solution.worked}{answer}" if solution.worked else f"{solution.answer}{answer}",
    ]
