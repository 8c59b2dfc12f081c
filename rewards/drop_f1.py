"""DROP's F1 (Dua et al. 2019, arXiv 1903.00161, section 5): words in common with the best matching reference.

The answer is the text of the single answer block, or what follows the reasoning. Parts separated by `|` are several spans;
each is paired with a span of the reference so that the sum of their F1 is largest, and a span without a partner counts 0.
Spans compare as sets of words, without case, punctuation and articles, numbers by value; where the reference's span holds a
number, a span without any of its numbers scores 0. As in the authors' script the result is rounded to two places.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from posttrain.types import RewardResult
from rewards.extract import after_thinking, final_answer

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
    completion: str, answer: str | None, references: Sequence[Sequence[str]] = (), **metadata: Any
) -> RewardResult:
    """0.0 to 1.0: the best F1 over the references.

    Args:
        completion: the model's text.
        answer: the reference where there is just one, of one span; used when `references` is empty.
        references: each a list of spans; from the record.
        metadata: not used.

    Raises:
        ValueError: no reference with a text.
    """
    known = [list(reference) for reference in references] or ([[answer]] if answer is not None else [])
    known = [reference for reference in known if any(span.strip() for span in reference)]
    if not known:
        raise ValueError("drop_f1 needs `references`, lists of spans of which one has a text, or an answer")
    tagged = "<answer>" in completion or "</answer>" in completion
    text = final_answer(completion) if tagged else after_thinking(completion)
    if text is None or not text.strip():
        return RewardResult(0.0, detail="no single final answer")
    spans = [part.strip() for part in text.split("|") if part.strip()]
    return RewardResult(max(f1(spans, reference) for reference in known))


def f1(spans: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of an answer's spans with those of one reference, rounded to two places."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    answers, wanted = [words_of(span) for span in spans], [words_of(span) for span in reference]
    if not answers or not wanted:
        return 0.0
    table = np.array([[_overlap(answer, target) for answer in answers] for target in wanted])
    rows, columns = linear_sum_assignment(table, maximize=True)
    return round(float(table[rows, columns].sum()) / max(len(answers), len(wanted)), 2)


def words_of(span: str) -> frozenset[str]:
    """{"3.0", "field", "goals"} of "The 3 field goals!"."""
    words = (_plain(word) for word in re.split(r"[ -]", span.lower()))
    return frozenset(part for word in words for part in word.split() if part not in _ARTICLES)


def _plain(word: str) -> str:
    """A number in one form; of other words the letters and digits."""
    bare = word if is_number(word) else word.translate(_PUNCTUATION)
    return str(float(bare)) if is_number(bare) else bare


def is_number(text: str) -> bool:
    """Whether Python reads it as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _overlap(answer: frozenset[str], target: frozenset[str]) -> float:
    numbers = {word for word in target if is_number(word)}
    if numbers and not numbers & answer:
        return 0.0
    common = len(answer & target)
    precision = common / len(answer) if answer else 1.0
    recall = common / len(target) if target else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
