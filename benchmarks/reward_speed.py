"""What a call of each shipped rule reward costs: 1,000 different completions through the door that training uses.

    python benchmarks/reward_speed.py [--quick]

A completion is about 200 words of reasoning and an answer; half are right, and no two have the same text, so that no
verdict comes from a cache. One call before the clock starts loads what the reward needs. `math_answer` has one row for
integers, which need no judge, and one for answers that need mathematics.

The last line is one JSON object, reward -> mean microseconds per call.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Started as a script, this file would be found in place of the package that has its name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from rewards import RewardFunction  # noqa: E402

PHRASES = (
    "so we add the first number to the second and then divide by three which gives a smaller value but wait let me check",
    "that again because the sum must be even therefore our result cannot be right unless one of them was negative",
)
VOCABULARY = " ".join(PHRASES).split()


@dataclass(frozen=True)
class Subject:
    """One row: a reward, and how its problems look."""

    name: str
    spec: str
    answer: Callable[[int], str]  # problem number -> reference
    written: Callable[[int], str]  # problem number -> a right answer as a model writes it
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def _letter(number: int) -> str:
    return "ABCD"[number % 4]


SUBJECTS = (
    Subject("exact", "rewards.exact:score", str, str),
    Subject("format", "rewards.format:score", str, str),
    Subject("task_answer", "rewards.task_answer:score", str, str, {"task": "chain_sum"}),
    Subject("math_answer, integers", "rewards.math_answer:score", str, str),
    Subject(
        "math_answer",
        "rewards.math_answer:score",
        lambda number: rf"\frac{{{number}}}{{7}}",
        lambda number: rf"x = \frac{{{2 * number}}}{{14}}",
    ),
    Subject(
        "multiple_choice",
        "rewards.multiple_choice:score",
        _letter,
        lambda number: f"The answer is ({_letter(number)}).",
    ),
    Subject("reasoning_gym", "rewards.reasoning_gym:score", str, str, {"source_dataset": "chain_sum"}),
    Subject("language_consistency", "rewards.language_consistency:score", str, str, {}, {"language": "en"}),
    Subject("length:overlong", "rewards.length:overlong", str, str, {}, {"max_length": 400, "cache_length": 100}),
    Subject(
        "length:cosine", "rewards.length:cosine", str, str, {}, {"max_length": 400, "judge": "rewards.exact:score"}
    ),
    Subject("repetition", "rewards.repetition:score", str, str),
    Subject(
        "instruction_following",
        "rewards.instruction_following:score",
        str,
        str,
        {
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence", "length_constraints:number_words"],
            "kwargs": [{}, {"keywords": ["1"]}, {"num_words": 100, "relation": "less than"}],
        },
    ),
)


def completions(subject: Subject, size: int, words: int = 200) -> list[tuple[str, str]]:
    """(text, reference) of each completion; every other one is wrong."""
    source = random.Random(subject.name)
    pairs = []
    for number in range(1, size + 1):
        sentences = [" ".join(source.choices(VOCABULARY, k=10)).capitalize() + "." for _ in range(words // 10)]
        written = subject.written(number if number % 2 else number + 1)
        pairs.append((f"<think>{' '.join(sentences)}</think><answer>{written}</answer>", subject.answer(number)))
    return pairs


def measure(subject: Subject, size: int) -> list[float]:
    """Microseconds of each call."""
    reward = RewardFunction(subject.name, subject.spec, kwargs=dict(subject.options))
    metadata = {**subject.metadata, "finish_reason": "stop", "completion_length": 320}
    first, *rest = completions(subject, size + 1)
    reward(*first, metadata)
    micros = []
    for text, answer in rest:
        start = time.perf_counter()
        reward(text, answer, metadata)
        micros.append((time.perf_counter() - start) * 1e6)
    return micros


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 completions instead of 1,000")
    options = parser.parse_args(arguments)
    size = 100 if options.quick else 1000
    table = Table(title=f"microseconds per call, {size} completions each")
    for heading in ("reward", "mean", "median", "99%"):
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    means = {}
    for subject in SUBJECTS:
        micros = measure(subject, size)
        means[subject.name] = round(statistics.fmean(micros), 1)
        figures = (means[subject.name], statistics.median(micros), statistics.quantiles(micros, n=100)[-1])
        table.add_row(subject.name, *(f"{figure:,.1f}" for figure in figures))
    Console(file=sys.stdout, width=100).print(table)
    print(json.dumps(means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
