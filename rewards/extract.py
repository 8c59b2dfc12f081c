"""Finding the one final answer in a completion: linear in the length, whatever the text."""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAIL = 1000  # characters
_BOX = re.compile(r"\\boxed(?:\s*\{|\s+([^\s{$]))")
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?/\s?\d+)?%?")


def split_answer(completion: str) -> tuple[str | None, str] | None:
    """(thinking, answer) of `<think>..</think><answer>..</answer>`, or of `<answer>..</answer>` alone (thinking None).

    None for anything else: a tag missing, repeated or out of order, or text outside the tags. White space around the
    two blocks does not count as text; both parts come stripped.
    """
    text = completion.strip()
    counts = [text.count(tag) for tag in TAGS]
    if counts[2:] != [1, 1] or counts[:2] not in ([0, 0], [1, 1]):
        return None
    before, _, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or after:
        return None
    before = before.strip()
    if counts[0] == 0:
        return (None, answer.strip()) if not before else None
    if not before.startswith("<think>") or not before.endswith("</think>"):
        return None
    return before.removeprefix("<think>").removesuffix("</think>").strip(), answer.strip()


def final_answer(completion: str) -> str | None:
    """The text of the single answer block; None when there is none, an empty one, several, or text outside."""
    parts = split_answer(completion)
    return parts[1] or None if parts is not None else None


def after_thinking(completion: str) -> str | None:
    """The text after the reasoning; the whole text where there are no think tags, None where the reasoning never ends.

    The opening tag may be missing: chat templates put it into the prompt.
    """
    _, closed, after = completion.rpartition("</think>")
    if closed:
        return after if "<think>" not in after else None
    return completion if "<think>" not in completion else None


def boxed(text: str) -> list[str]:
    r"""The contents of the outermost `\boxed{...}`, stripped, in order; `\boxed 3` has no braces.

    A box that never closes ends the list with an empty string.
    """
    contents: list[str] = []
    start = 0
    while found := _BOX.search(text, start):
        end = _closing_brace(text, found.end()) if found[1] is None else found.end()
        if end is None:
            return [*contents, ""]
        contents.append((found[1] or text[found.end() : end]).strip())
        start = end
    return contents


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced; None when there is none, an empty or an unclosed one.

    Of boxes within each other, the innermost.
    """
    openings = list(_BOX.finditer(text))
    return next(iter(boxed(text[openings[-1].start() :])), None) or None if openings else None


def last_expression(text: str) -> str | None:
    r"""The last formula (`$..$`, `\(..\)`, `\[..\]`), or the last number or fraction of a text without any.

    Only the last `TAIL` characters are looked at, which keeps this fast on any text.
    """
    text = text[-TAIL:]
    formulas = [found for match in _FORMULA.finditer(text) for found in match.groups() if found is not None]
    if formulas:
        return formulas[-1].strip() or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _closing_brace(text: str, start: int) -> int | None:
    """Place of the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    return None
