"""1.0 for the answer format of DeepSeek-R1 (arXiv 2501.12948, section 2.2.2): reasoning, then answer, in tags."""

from __future__ import annotations

from typing import Any

from rewards.extract import split_answer


def score(completion: str, answer: str | None, require_thinking: bool = False, **metadata: Any) -> float:
    """1.0 when the whole text is `<think>..</think><answer>..</answer>`, each tag once and the answer not empty.

    Args:
        completion: the model's text; white space between and around the two blocks is allowed.
        answer: not used; the format says nothing about being right.
        require_thinking: the thinking must not be empty either.
        metadata: not used.
    """
    parts = split_answer(completion)
    if parts is None or parts[0] is None or not parts[1]:
        return 0.0
    return float(bool(parts[0]) or not require_thinking)
