"""1.0 when the answer is the reference, character by character."""

from __future__ import annotations

from typing import Any

from rewards.extract import final_answer


def score(completion: str, answer: str, answer_tags: bool = True, **metadata: Any) -> float:
    """1.0 or 0.0; white space around the text does not count.

    Args:
        completion: the model's text.
        answer: the reference.
        answer_tags: compare the text of the single <answer> block; with False, the whole completion.
        metadata: not used.
    """
    text = final_answer(completion) if answer_tags else completion.strip()
    return float(text is not None and text == answer.strip())
