"""Letter counting asked and reasoned about in one of two languages, Chinese or Korean.

The question is "e:sleepless几?" or "e:sleepless몇?" (几, 몇: how many), the answer "3". The worked solution is each
letter with the count so far, in numerals of the question's language: "s零l零e一e二" or "s영l영e일e이" for "slee". Both
languages have a script of their own, so `rewards.language_consistency` judges each numeral exactly; a problem's language
is in its metadata, where that reward looks for it.

`mixed_counting` asks the same questions, and its worked solutions are in no language for long: most begin in that of the
question, and each step may change it: "s零l零e일e이".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from data.tasks.base import TaskFamily, TaskItem, gym_dataset
from data.tasks.letter_counting import LENGTHS, LETTERS

NUMERALS = {"zh": "零一二三四五六七八九十", "ko": "영일이삼사오육칠팔구십"}  # ISO 639 code -> 0..10
HOW_MANY = {"zh": "几", "ko": "몇"}
ASKED = 0.75  # mixed_counting: how likely the first step is in the language of the question
SWITCH = 0.1  # mixed_counting: how likely the language changes from one step to the next


class BilingualCounting(TaskFamily):
    name = "bilingual_counting"
    levels = tuple(LENGTHS)
    characters = "".join([*NUMERALS.values(), *HOW_MANY.values()])

    def draw(self, level: int, number: int) -> TaskItem:
        rng = random.Random(number)
        word = "".join(rng.choices(LETTERS, k=rng.randint(*LENGTHS[level])))
        letter, language = rng.choice(LETTERS), rng.choice(list(NUMERALS))
        return TaskItem(
            prompt=question(letter, word, language),
            answer=str(word.count(letter)),
            worked=spelled_counts(letter, word, self.languages(language, len(word), rng)),
            metadata={"task": self.name, "level": level, "language": language},
        )

    def languages(self, language: str, length: int, rng: random.Random) -> list[str]:
        """The language of each step of a worked solution to a question in `language`."""
        return [language] * length

    def prompts(self, level: int) -> Iterator[str]:
        shortest, longest = LENGTHS[level]
        for length in range(shortest, longest + 1):
            for letters in product(LETTERS, repeat=length):
                for letter, language in product(LETTERS, NUMERALS):
                    yield question(letter, "".join(letters), language)

    def space(self, level: int) -> int:
        shortest, longest = LENGTHS[level]
        return sum(len(NUMERALS) * len(LETTERS) ** (length + 1) for length in range(shortest, longest + 1))

    def score(self, answer_text: str, answer: str) -> float:
        """reasoning_gym's: the same text."""
        return float(gym_dataset("letter_counting").score_answer(answer_text, {"answer": answer}))

    def steps(self, worked: str) -> list[str]:
        return re.findall(r"[a-z][^a-z]+", worked)

    def join(self, steps: Sequence[str]) -> str:
        return "".join(steps)

    def with_result(self, step: str, change: Callable[[str], str]) -> str:
        language = next(code for code, numerals in NUMERALS.items() if step[1] in numerals)
        return step[0] + numeral(int(change(str(value(step[1:])))), language)

    def slip(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """One letter is counted that should not be, or not counted that should be; in the question's language."""
        letter, word = prompt[0], prompt[2:-2]
        languages = [language_of(prompt)] * len(word)
        worked = spelled_counts(letter, word, languages, misjudged=rng.randrange(len(word)))
        return worked, str(value(self.steps(worked)[-1][1:]))


class MixedCounting(BilingualCounting):
    name = "mixed_counting"

    def languages(self, language: str, length: int, rng: random.Random) -> list[str]:
        """Mostly the question's language at first, and after each step another one with probability `SWITCH`."""
        others = [code for code in NUMERALS if code != language]
        spoken = [language if rng.random() < ASKED else rng.choice(others)]
        while len(spoken) < length:
            others = [code for code in NUMERALS if code != spoken[-1]]
            spoken.append(rng.choice(others) if rng.random() < SWITCH else spoken[-1])
        return spoken


def question(letter: str, word: str, language: str) -> str:
    """("e", "see", "zh") -> "e:see几?" """
    return f"{letter}:{word}{HOW_MANY[language]}?"


def language_of(prompt: str) -> str:
    """The language that a question is asked in.

    Raises:
        ValueError: not a question of this family.
    """
    for language, word in HOW_MANY.items():
        if prompt.endswith(f"{word}?"):
            return language
    raise ValueError(f"{prompt!r} is not a question of {BilingualCounting.name}: it must end with one of {HOW_MANY}")


def numeral(count: int, language: str) -> str:
    """12 -> "十二" (zh); 0 to 19."""
    numerals = NUMERALS[language]
    return numerals[count] if count <= 10 else numerals[10] + numerals[count - 10]


def value(text: str) -> int:
    """ "十二" -> 12; the inverse of `numeral` for every language."""
    return sum(
        numerals.index(character) for character in text for numerals in NUMERALS.values() if character in numerals
    )


def spelled_counts(letter: str, word: str, languages: Sequence[str], misjudged: int | None = None) -> str:
    """("e", "see", ["zh", "zh", "ko"]) -> "s零e一e이"; the letter at place `misjudged` is taken for what it is not."""
    count = 0
    steps = []
    for place, (character, language) in enumerate(zip(word, languages, strict=True)):
        count += (character == letter) != (place == misjudged)
        steps.append(character + numeral(count, language))
    return "".join(steps)
