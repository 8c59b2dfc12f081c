"""Punishes repeated n-grams: 0 for a text that never repeats itself, near -max_penalty for one that does only that."""

from __future__ import annotations

import re
from typing import Any

# A word, or one character of a script that is written without spaces, or one other sign.
_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+|[^\w\s]")


def score(completion: str, answer: str | None, ngram_size: int = 3, max_penalty: float = 1.0, **metadata: Any) -> float:
    """-max_penalty * (1 - different n-grams / all n-grams); 0 for a text of fewer than `ngram_size` words.

    After the repetition penalty of arXiv 2502.03373, appendix C.2, and TRL's `get_repetition_penalty_reward`. Those count
    tokens; a reward sees text, so here n-grams are of words, punctuation marks and, in scripts written without spaces,
    characters. Letter case and white space do not count.

    Args:
        completion: the model's text, tags included.
        answer: not used.
        ngram_size: words of an n-gram, 1 or more.
        max_penalty: 0 or more; the score lies in -max_penalty..0.
        metadata: not used.

    Raises:
        ValueError: an option out of range.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be 1 or more, got {ngram_size}")
    if max_penalty < 0:
        raise ValueError(f"max_penalty must be 0 or more (the score is its negative), got {max_penalty}")
    units = words(completion)
    total = len(units) - ngram_size + 1
    if total < 1:
        return 0.0
    different = len({tuple(units[start : start + ngram_size]) for start in range(total)})
    return -max_penalty * (1 - different / total)


def words(text: str) -> list[str]:
    """What n-grams are made of, in lower case: "So, so: 数学" -> ["so", ",", "so", ":", "数", "学"]."""
    return _UNIT.findall(text.lower())
