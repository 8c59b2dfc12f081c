"""Evaluation problems in training data, by the rules of `data.clean`; and the scores without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.clean import Decontaminator, Example
from data.records import Record
from eval.statistics import Estimate, estimate
from posttrain.recipe import ContaminationSection
from posttrain.records import section_records, source_split

SHOWN = 5  # examples


@dataclass(frozen=True, slots=True)
class Found:
    """What of one suite's problems is in the training data."""

    problems: int
    contaminated: tuple[str, ...]  # prompt ids
    examples: tuple[Example, ...]
    clean: Estimate | None  # the score on the problems that were not found; None if none is left

    def to_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "problems": self.problems,
            "contaminated": list(self.contaminated),
            "share": len(self.contaminated) / self.problems,
            "examples": [asdict(example) for example in self.examples],
            "clean": self.clean.to_dict() if self.clean else None,
        }


def training_records(section: ContaminationSection, seed: int) -> list[Record]:
    """The training data that the recipe names.

    Raises:
        ValueError: it cannot be read.
    """
    return [
        record
        for dataset in section.datasets
        for record in section_records(dataset, source_split(dataset, "train"), seed)
    ]


def find(questions: Mapping[str, str], training: Sequence[Record], ngram: int) -> dict[str, Example]:
    """Prompt id -> what of that problem is in the training data, for those of which something is.

    Args:
        questions: prompt id -> what the problem asks, without the instructions that all problems share.
        training: chats or problems.
        ngram: words in a row, see `data.clean`.

    Raises:
        ValueError: no problem with a text.
    """
    judge = Decontaminator(
        [Record(name, ({"role": "user", "content": text},)) for name, text in questions.items() if text.strip()], ngram
    )
    found: dict[str, Example] = {}
    for record in training:
        for example in judge.find_all(record):
            assert example.problem is not None  # `find_all` names it
            found.setdefault(example.problem, example)
    return found


def judge_suite(
    questions: Mapping[str, str], rows: Sequence[Mapping[str, Any]], training: Sequence[Record], ngram: int
) -> Found:
    """Look for a suite's problems, and score it again without those that were found.

    Args:
        questions: see `find`.
        rows: the suite's sampled completions, see `eval.suite.completion_rows`.
        training, ngram: see `find`.
    """
    found = find(questions, training, ngram)
    clean: dict[str, list[float]] = {}
    for row in rows:
        if row["prompt_id"] not in found:
            clean.setdefault(row["prompt_id"], []).append(row["score"])
    return Found(
        len(questions),
        tuple(found),
        tuple(list(found.values())[:SHOWN]),
        estimate(list(clean.values())) if clean else None,
    )
