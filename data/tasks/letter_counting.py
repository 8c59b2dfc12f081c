"""How often a letter occurs in a word: prompt "e in sleepless?", answer "3".

The words are random strings over five letters and not those of reasoning_gym's `letter_counting`: that one takes them
from a book and asks only for letters that occur, so for single words the answer is nearly always 1 and a model that
never counts scores high. Here each letter, the one asked for included, is drawn evenly, and 0 is a possible answer.
Worked solution: each letter with the count so far, "s0l0e1e2p2l2e3s3s3".
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import product

from data.tasks.base import TaskFamily, TaskItem, gym_dataset

LETTERS = "aelps"
LENGTHS = {1: (3, 5), 2: (6, 8), 3: (9, 11), 4: (12, 14)}  # level -> fewest and most letters of the word


class LetterCounting(TaskFamily):
    name = "letter_counting"
    levels = tuple(LENGTHS)

    def draw(self, level: int, number: int) -> TaskItem:
        rng = random.Random(number)
        word = "".join(rng.choices(LETTERS, k=rng.randint(*LENGTHS[level])))
        letter = rng.choice(LETTERS)
        return TaskItem(
            prompt=f"{letter} in {word}?",
            answer=str(word.count(letter)),
            worked=running_counts(letter, word),
            metadata={"task": self.name, "level": level},
        )

    def prompts(self, level: int) -> Iterator[str]:
        shortest, longest = LENGTHS[level]
        for length in range(shortest, longest + 1):
            for letters in product(LETTERS, repeat=length):
                for letter in LETTERS:
                    yield f"{letter} in {''.join(letters)}?"

    def space(self, level: int) -> int:
        shortest, longest = LENGTHS[level]
        return sum(len(LETTERS) ** (length + 1) for length in range(shortest, longest + 1))

    def score(self, answer_text: str, answer: str) -> float:
        """reasoning_gym's: the same text."""
        return float(gym_dataset("letter_counting").score_answer(answer_text, {"answer": answer}))

    def steps(self, worked: str) -> list[str]:
        return re.findall(r"[a-z]\d+", worked)

    def join(self, steps: Sequence[str]) -> str:
        return "".join(steps)

    def slip(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """One letter is counted that should not be, or not counted that should be."""
        letter, _, word = prompt.rstrip("?").partition(" in ")
        worked = running_counts(letter, word, misjudged=rng.randrange(len(word)))
        return worked, self.steps(worked)[-1][1:]


def running_counts(letter: str, word: str, misjudged: int | None = None) -> str:
    """("e", "see") -> "s0e1e2"; the letter at place `misjudged` is taken for what it is not."""
    count = 0
    steps = []
    for place, character in enumerate(word):
        count += (character == letter) != (place == misjudged)
        steps.append(f"{character}{count}")
    return "".join(steps)
