r"""1.0 when the one final answer is the letter of the right choice: `B`, `(B)`, `B.`, `B) Paris`, `The answer is B`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain.types import RewardResult
from rewards.extract import after_thinking, boxed, final_answer, last_boxed

_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}|\*\*(.+?)\*\*|\$(.+?)\$")
_LEAD = re.compile(
    r"^(?:so |thus |therefore,? )?(?:the )?(?:correct |right |final |best )*(?:answer|option|choice)(?: is)?\s*:?\s*"
    r"(?:option |choice )?",
    re.IGNORECASE,
)
_LETTER = re.compile(r"^[(\[]?([A-Za-z])(?:[)\].:,]|\s*[-–—:]|\s|$)[)\].:]*\s*(.*)$", re.DOTALL)
# A second letter that stands as a choice does: "(C)", "C)", "or C", "/C", or alone in capitals; "I" and "A" are words.
_ANOTHER = re.compile(
    r"\(([A-Za-z])\)|(?<!\w)([A-Za-z])[).](?!\w)|(?:\b(?:or|and|not)\s+|[,/&]\s*)\(?([A-Z])\b|(?<![\w'’])([B-HJ-Z])(?![\w'’])"
)
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|not sure|both|neither|not)\b|\?", re.IGNORECASE)


def score(
    completion: str, answer: str, choices: Sequence[str] | None = None, num_choices: int = 26, **metadata: Any
) -> RewardResult:
    r"""1.0 or 0.0: one letter and it is right, with or without the choice's text; 0.0 for hedging.

    The final answer is the single answer block, or, in a text without answer tags, the last `\boxed{}` after the
    reasoning. More than one letter, "either", "maybe", "not" or a question mark make it none. Where the record carries
    `choices`, text after the letter must be the text of that choice, and the text alone is accepted too; without
    them, text after the letter only must not name another letter.

    Args:
        completion: the model's text.
        answer: the reference, a letter: "B", "(B)", in either case; or, with `choices`, the text of the right choice.
        choices: texts of the choices, in the order of the letters; from the record's metadata.
        num_choices: how many letters there are where `choices` is not given, 2 to 26.
        metadata: not used.

    Raises:
        ValueError: a reference that is neither a letter nor one of the choices, or `num_choices` out of range.
    """
    if not 2 <= num_choices <= 26:
        raise ValueError(f"num_choices must be 2 to 26, got {num_choices}")
    texts = [_plain(choice) for choice in choices] if choices is not None else None
    count = len(texts) if texts is not None else num_choices
    right = _reference(answer, texts, count)
    text = _final(completion)
    if text is None:
        return RewardResult(0.0, detail="no single final answer")
    chosen = _choice(text, texts, count)
    return RewardResult(float(chosen == right), detail=f"chose {chosen}" if chosen else "no single letter")


def _final(completion: str) -> str | None:
    if "<answer>" in completion or "</answer>" in completion:
        text = final_answer(completion)
        boxes = {last_boxed(box) or box for box in boxed(text or "")}
        return text if not boxes else boxes.pop() if len(boxes) == 1 else None
    after = after_thinking(completion)
    return last_boxed(after) if after is not None else None


def _reference(answer: str, texts: Sequence[str] | None, count: int) -> str:
    letters = [chr(ord("A") + place) for place in range(count)]
    letter = re.sub(r"[^A-Za-z]", "", _unwrapped(answer)).upper()
    if letter in letters:
        return letter
    if texts is not None and texts.count(_plain(answer)) == 1:
        return letters[texts.index(_plain(answer))]
    raise ValueError(
        f"the reference {answer!r} is neither one of the letters {letters[0]}-{letters[-1]} nor the text of one of the "
        f"choices; correct the data"
    )


def _choice(text: str, texts: Sequence[str] | None, count: int) -> str | None:
    """The letter that the answer commits to; None for none, several, or hedging."""
    text = _LEAD.sub("", _unwrapped(text).strip()).strip()
    if texts is not None and texts.count(_plain(text)) == 1:
        return chr(ord("A") + texts.index(_plain(text)))
    found = _LETTER.match(text)
    if found is None or not 0 <= (place := ord(found[1].upper()) - ord("A")) < count:
        return None
    letter, rest = found[1].upper(), found[2]
    if texts is not None:
        return letter if not _plain(rest) or _plain(rest) == texts[place] else None
    others = {next(filter(None, match.groups())).upper() for match in _ANOTHER.finditer(" " + rest)}
    named = {other for other in others if 0 <= ord(other) - ord("A") < count}
    return None if named - {letter} or _HEDGE.search(rest) else letter


def _unwrapped(text: str) -> str:
    r"""Without `\text{}`, `**`, `$` around parts, two levels deep."""
    for _ in range(2):
        text = _WRAPPER.sub(lambda found: next(filter(None, found.groups()), ""), text)
    return text.replace("\\ ", " ").replace("~", " ")


def _plain(text: str) -> str:
    """A choice's text for comparison: lower case, single spaces, no final mark."""
    return " ".join(_unwrapped(text).lower().split()).strip(" .;:,")
