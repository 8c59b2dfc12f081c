"""The share of words of the reasoning that are in the target language, as in DeepSeek-R1 (arXiv 2501.12948, section 2.3.2).

There it keeps a policy from mixing languages in its reasoning, at a small cost in accuracy; it is added to the reward of
being right. Code, formulas and addresses are no words and not counted.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from posttrain.types import RewardResult
from rewards.languages import count_words

Part = Literal["reasoning", "all"]
_FENCE = "```"
# Formulas and inline code stay within a line and short, so that one stray sign does not swallow the text after it.
_INLINE = re.compile(r"\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,200}\$|`[^`\n]{1,200}`|https?://\S+|</?[A-Za-z]\w{0,20}>")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def score(
    completion: str,
    answer: str | None,
    language: str = "en",
    part: Part = "reasoning",
    without_words: float = 0.0,
    **metadata: Any,
) -> RewardResult:
    """Words in the target language / all words: 0..1.

    Args:
        completion: the model's text.
        answer: not used.
        language: the target, as an ISO 639 code: "en", "zh", ...; a record's column of this name sets it per problem.
        part: "reasoning" is the think block, or, in a text without one, what comes before the answer block (all of it
            where there is none either); "all" is the whole text.
        without_words: the score where there are no words: 0, so that a policy gains nothing by thinking in formulas only.
        metadata: not used.

    Raises:
        ValueError: an unknown language or part.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, got {part!r}")
    text = reasoning(completion) if part == "reasoning" else completion
    matching, total = count_words(prose(text), language)
    if total == 0:
        return RewardResult(without_words, detail="no words")
    return RewardResult(matching / total, detail=f"{matching} of {total} words")


def reasoning(completion: str) -> str:
    """The think block's text, open or closed; the opening tag may be missing, where the prompt has it."""
    before, closed, _ = completion.partition("</think>")
    if closed or "<think>" in completion:
        return before.rpartition("<think>")[2]
    return completion.partition("<answer>")[0] or completion


def prose(text: str) -> str:
    """A text without code, formulas, LaTeX commands, tags and addresses; linear in its length."""
    text = " ".join(text.split(_FENCE)[::2])
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), (r"\begin{", r"\end{")):
        text = _without(text, opening, closing)
    return _COMMAND.sub(" ", _INLINE.sub(" ", text))


def _without(text: str, opening: str, closing: str) -> str:
    """The text without what stands between the two; an opening that is never closed leaves the text as it is."""
    first, *rest = text.split(opening)
    kept = [first]
    for piece in rest:
        _, found, after = piece.partition(closing)
        kept.append(after.partition("}")[2] if found and opening.endswith("{") else after if found else piece)
    return " ".join(kept)
