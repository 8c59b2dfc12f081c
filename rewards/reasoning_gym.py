"""Scores answers to reasoning-gym's problems with the scorer of the dataset that a problem came from.

A record carries what `dataset[index]` of reasoning-gym holds: `answer`, `question`, and its `metadata`, either as one
column of that name or spread over columns. Some scorers run symbolic mathematics without a limit of time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from posttrain.types import RewardResult
from rewards.extract import final_answer

# Datasets whose scorer gives full score to any text, in reasoning-gym 0.1.25.
UNSOUND = ("game_of_life_halting",)


def score(
    completion: str,
    answer: str | None,
    source_dataset: str | None = None,
    partial_credit: bool = False,
    **metadata: Any,
) -> RewardResult:
    """The scorer's verdict on the text of the single answer block: 1.0 or 0.0, or what it says with `partial_credit`.

    A text on which the scorer raises, as that of `prime_factorization` does on words, gets 0.0 with status "crash".

    Args:
        completion: the model's text.
        answer: the reference; None where the dataset has none and its scorer judges by the metadata.
        source_dataset: the dataset's name; from the record's columns or its column `metadata`.
        partial_credit: give the scorer's own score, 0..1, instead of 1.0 for a full score only. Many scorers give 0.01 to
            0.05 to any answer, and some more: `spell_backward` counts letters, `propositional_logic` gives junk 0.25.
        metadata: the other columns; `question` and `metadata`, or the entries of the latter.

    Raises:
        ValueError: no dataset named, an unknown or an unsound one, or a record on which the scorer raises even for the
            reference.
    """
    columns = metadata.get("metadata")
    details = dict(columns) if isinstance(columns, Mapping) else dict(metadata)
    name = source_dataset or details.get("source_dataset")
    if not isinstance(name, str):
        raise ValueError("the record names no source_dataset; keep reasoning-gym's metadata as columns of the data")
    scorer = _scorer(name)
    entry = {
        "question": metadata.get("question", ""),
        "answer": answer,
        "metadata": {**details, "source_dataset": name},
    }
    text = final_answer(completion)
    if text is None:
        return RewardResult(0.0, detail="no single final answer")
    try:
        value = float(scorer(text, entry))
    except Exception as error:  # the text is the model's: anything may come of it
        _check_record(scorer, entry, name)
        return RewardResult(0.0, "crash", f"the scorer of {name} raised {type(error).__name__}: {error}")
    return RewardResult(min(1.0, max(0.0, value)) if partial_credit else float(value == 1.0))


def _check_record(scorer: Callable[..., Any], entry: dict[str, Any], name: str) -> None:
    try:
        scorer(entry["answer"], entry)
    except Exception as error:
        raise ValueError(
            f"the scorer of {name} raises {type(error).__name__}: {error} even for the reference {entry['answer']!r}; "
            f"does the record carry all of the problem's metadata?"
        ) from error


@cache
def _scorer(name: str) -> Callable[..., Any]:
    if name in UNSOUND:
        raise ValueError(
            f"the scorer of reasoning-gym's {name!r} gives full score to any text; leave it out of the data"
        )
    with warnings.catch_warnings():
        # A package that reasoning_gym needs compiles with warnings about its own code.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {name!r}; it has {', '.join(sorted(DATASETS))}")
    scorer: Callable[..., Any] = reasoning_gym.get_score_answer_fn(name)
    return scorer
