"""Finding the one final answer in a completion. Plain string search: linear in the length, whatever the text."""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced; None when there is none or it never closes."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip() or None
    return None
