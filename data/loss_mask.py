"""What has loss: the one place where a chat becomes tokens and a mask.

With `{% generation %}` markers the template itself says what the assistant wrote. Without them the chat is rendered up to
each assistant turn with and without it, and the difference is the turn; that works as long as a template only ever adds to
what it has written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from data.chat import require_template
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last_assistant", "completion", "all"]
_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """A chat as tokens.

    Attributes:
        ids: [T].
        mask: [T], True where a token has loss.
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message] | Sequence[dict[str, Any]],
    *,
    loss_on: str = "assistant",
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedChat:
    """A whole chat as token ids and the mask of what has loss.

    Args:
        tokenizer: its template is used.
        messages: the chat; it must hold an assistant message unless `loss_on` is "all".
        loss_on: "assistant": every turn of the assistant, its end-of-turn token included, its role header not;
            "last_assistant": the last of them; "completion": all that follows the last message of somebody else;
            "all": every token.
        tools: functions the template may list.
        template_kwargs: more for the template.

    Raises:
        ValueError: no chat template, an unknown `loss_on`, no assistant message, or a template without markers that
            rewrites earlier turns.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on={loss_on!r}; choose one of {', '.join(get_args(LossOn))}")
    template = require_template(tokenizer)
    chat: list[Any] = [dict(message) for message in messages]
    more: dict[str, Any] = {**(template_kwargs or {}), **({"tools": list(tools)} if tools else {})}
    if loss_on == "all":
        encoded: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **more)
        return TokenizedChat(tuple(encoded["input_ids"]), (True,) * len(encoded["input_ids"]))
    turns = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the chat has no assistant message to train on; add one, or set loss_on: all")
    if loss_on == "completion":
        turns = _completion(chat)
    elif loss_on == "last_assistant":
        turns = turns[-1:]
    if _MARKER.search(template):
        return _by_markers(tokenizer, chat, turns, more)
    return _by_prefixes(tokenizer, chat, turns, more)


def spans(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = [0, *(place for place in range(1, len(mask)) if mask[place] != mask[place - 1]), len(mask)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop and mask[start]]


def _completion(chat: list[Any]) -> list[int]:
    """The assistant messages after the last message of somebody else."""
    others = [place for place, message in enumerate(chat) if message["role"] != "assistant"]
    first = others[-1] + 1 if others else 0
    if first == len(chat):
        raise ValueError("loss_on: completion needs a chat that ends with the assistant's message; this one does not")
    return list(range(first, len(chat)))


def _by_markers(tokenizer: Any, chat: list[Any], turns: list[int], more: dict[str, Any]) -> TokenizedChat:
    encoded = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    ids, inside = tuple(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    assistants = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    if turns != assistants:
        found = spans(inside)
        if len(found) != len(assistants):
            raise ValueError(
                f"the chat template marks {len(found)} stretches as the assistant's and the chat has {len(assistants)} "
                f"assistant messages, so one turn cannot be told from another; set loss_on: assistant"
            )
        kept = {found[assistants.index(turn)] for turn in turns}
        inside = [flag and any(start <= place < stop for start, stop in kept) for place, flag in enumerate(inside)]
    return TokenizedChat(ids, tuple(inside))


def _by_prefixes(tokenizer: Any, chat: list[Any], turns: list[int], more: dict[str, Any]) -> TokenizedChat:
    """Mark the text that each turn adds; a token has loss when it begins inside."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where a token begins in the text, so the loss mask is unknown; use a "
            f"fast tokenizer, or a chat template with {{% generation %}} markers"
        )

    def render(count: int, prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(chat[:count], tokenize=False, add_generation_prompt=prompt, **more)
        return text

    whole = render(len(chat), False)
    inside: list[tuple[int, int]] = []
    for turn in turns:
        before, after = render(turn, True), whole if turn + 1 == len(chat) else render(turn + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"the chat template writes message {turn} otherwise when more follows (many cut the reasoning of earlier "
                f"turns out), so what has loss is unknown; set training.loss_on: last_assistant, or training.chat_template "
                f"to one that keeps every turn (deepseek_v3, or a .jinja file)"
            )
        inside.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    mask = [any(start <= begin < stop for start, stop in inside) for begin, _ in encoded["offset_mapping"]]
    special = set(tokenizer.all_special_ids)
    for start, stop in spans(mask):
        # ChatML and its kin write a line break after the end-of-turn token: generation never gets there.
        ends = [place for place in range(start, stop) if ids[place] in special]
        if ends and not tokenizer.decode(ids[ends[-1] + 1 : stop]).strip():
            mask[ends[-1] + 1 : stop] = [False] * (stop - ends[-1] - 1)
    return TokenizedChat(ids, tuple(mask))
