"""What has loss: the one place where a chat becomes tokens and a mask.

    messages -> text (the chat template) -> the stretches that the assistant wrote -> tokens that begin in them

With `{% generation %}` markers the template itself says what the assistant wrote. Without them the chat is rendered up to
each of its turns with and without it, and the difference is the turn; that works as long as a template only ever adds to
what it has written. The whole text is tokenized once, so the ids are those of `apply_chat_template`.

transformers' own assistant mask is not used: where a tokenizer leaves blanks out of its offsets, as Llama-3's does, that
mask stops at the first turn that begins with one, or runs on to the end of the chat.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from data.rendering import Rendering, render_chat
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last_assistant", "completion", "all"]


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """A chat as tokens.

    Attributes:
        ids: [T].
        mask: [T], True where a token has loss.
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch that the assistant wrote. A message has several when its template marks several.

    Attributes:
        message: its place in the chat.
        start: the first token that begins inside.
        stop: one past the last token that begins inside.
        straddled: a token lies across the start or the end.
    """

    message: int
    start: int
    stop: int
    straddled: bool


@dataclass(frozen=True, slots=True)
class ChatLayout:
    """A chat as tokens, and what has loss.

    Attributes:
        ids: [T].
        turns: in order; they do not overlap.
    """

    ids: tuple[int, ...]
    turns: tuple[Turn, ...]


# The first n messages, with or without the header of the assistant's next turn.
_Render = Callable[[int, bool], Rendering]
_Stretch = tuple[int, int, int]  # message, and the characters [start, stop) that it wrote


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    loss_on: str = "assistant",
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedChat:
    """A whole chat as token ids, those of `apply_chat_template`, and the mask of what has loss.

    A token has loss when it begins inside what the assistant wrote; one that lies across the beginning has none.

    Args:
        tokenizer: its template is used.
        messages: the chat; it must hold an assistant message unless `loss_on` is "all".
        loss_on: "assistant": every turn of the assistant, its end-of-turn token included, its role header not;
            "last_assistant": the last of them; "completion": all that the assistant says after the last message of
            somebody else; "all": every token.
        tools: JSON schemas of functions that the template may list.
        template_kwargs: more for the template.

    Raises:
        ValueError: no chat template or one that cannot write the chat, an unknown `loss_on`, nothing to train on, a
            tokenizer without offsets, or a template without markers that rewrites what it has written.
    """
    if loss_on == "all":
        text = render_chat(tokenizer, messages, tools=tools, template_kwargs=template_kwargs).text
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return TokenizedChat(ids, (True,) * len(ids))
    layout = lay_out(tokenizer, messages, loss_on=loss_on, tools=tools, template_kwargs=template_kwargs)
    mask = [False] * len(layout.ids)
    for turn in layout.turns:
        mask[turn.start : turn.stop] = [True] * (turn.stop - turn.start)
    return TokenizedChat(layout.ids, tuple(mask))


def lay_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    loss_on: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatLayout:
    """Tokens and turns of a chat. Arguments and errors are those of `tokenize_chat`, without "all"."""
    trained = trained_messages(messages, loss_on)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where a token begins in the text, so the loss mask is unknown; use a "
            f"fast tokenizer (one with a tokenizer.json), or training.loss_on: all"
        )

    def render(count: int, prompt: bool) -> Rendering:
        return render_chat(tokenizer, messages[:count], prompt=prompt, tools=tools, template_kwargs=template_kwargs)

    whole = render(len(messages), False)
    tokens = _tokenize(tokenizer, whole.text)
    if whole.marked is not None:
        stretches = _marked_stretches(whole.marked, messages, trained, render)
    else:
        stretches = [
            (message, start, _end_of_turn(tokenizer, tokens, whole.text, start, stop))
            for message, start, stop in _added_stretches(whole.text, trained, len(messages), render)
        ]
    return ChatLayout(tokens.ids, tuple(_turn(tokenizer, tokens, stretch) for stretch in stretches))


def spans(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = [0, *(place for place in range(1, len(mask)) if mask[place] != mask[place - 1]), len(mask)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop and mask[start]]


def trained_messages(messages: Sequence[Message], loss_on: str) -> list[int]:
    """Places of the messages that have loss, at least one; see `tokenize_chat`.

    Raises:
        ValueError: an unknown `loss_on`, or nothing to train on.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on={loss_on!r}; choose one of {', '.join(get_args(LossOn))}")
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the chat has no assistant message to train on; add one, or set training.loss_on: all")
    if loss_on == "assistant":
        return turns
    if loss_on == "last_assistant":
        return turns[-1:]
    if turns[-1] != len(messages) - 1:
        raise ValueError("loss_on: completion needs a chat that ends with the assistant's message; this one does not")
    others = set(range(len(messages))) - set(turns)
    return [place for place in turns if place > max(others, default=-1)]


# --- stretches of text ------------------------------------------------------------------------------------------------


def _marked_stretches(
    marked: Sequence[tuple[int, int]], messages: Sequence[Message], trained: Sequence[int], render: _Render
) -> list[_Stretch]:
    """The template's own blocks. Which message a block belongs to is found by counting those of the chat before it."""
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    if trained[0] == first and len(marked) == len(trained):
        return [(message, *block) for message, block in zip(trained, marked, strict=True)]
    # `trained` reaches to the assistant's last message, so what is left is its.
    edges = [0 if place == first else len(render(place, False).marked or ()) for place in trained] + [len(marked)]
    if edges != sorted(edges):
        raise ValueError(
            "the chat template has fewer generation blocks when more of the chat follows, so they cannot be told apart by "
            "turn; put one around everything that the assistant writes in each turn"
        )
    return [
        (message, *block)
        for message, (start, stop) in zip(trained, pairwise(edges), strict=True)
        for block in marked[start:stop]
    ]


def _added_stretches(text: str, trained: Sequence[int], count: int, render: _Render) -> list[_Stretch]:
    """What each message adds to the text of those before it and the header of its turn."""
    found = []
    for message in trained:
        before = render(message, True).text
        after = text if message + 1 == count else render(message + 1, False).text
        if not after.startswith(before):
            raise ValueError(
                f"the chat template's generation prompt is not the beginning of what it writes for message {message} (it may "
                f"open <think> itself, and cut the reasoning out of the message), so what has loss is unknown; set "
                f"training.chat_template to one that keeps the messages as they are (deepseek_v3 for DeepSeek's tokenizers, "
                f"or a .jinja file)"
            )
        if not text.startswith(after):
            last = "" if message == trained[-1] else "training.loss_on: last_assistant, or "
            raise ValueError(
                f"the chat template writes message {message} otherwise when more follows (many cut the reasoning of earlier "
                f"turns out), so what has loss is unknown; set {last}training.chat_template to one that keeps every turn "
                f"(deepseek_v3 for DeepSeek's tokenizers, or a .jinja file)"
            )
        found.append((message, len(before), len(after)))
    return found


def _end_of_turn(tokenizer: Any, tokens: _Tokens, text: str, start: int, stop: int) -> int:
    """Where a turn ends: after its end-of-turn token, without the blanks that the template may write behind it.

    ChatML and its kin write a line break there. Generation never gets to it.
    """
    end = start + len(text[start:stop].rstrip())
    last = bisect_left(tokens.starts, end) - 1
    # What decoding leaves out is a special token.
    if start < end < stop and not tokenizer.decode([tokens.ids[last]], skip_special_tokens=True):
        return max(end, min(stop, tokens.stops[last]))
    return stop


# --- stretches of text to tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text as tokens: ids, and the characters [start, stop) of each, as the tokenizer says; [T] each."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]


def _tokenize(tokenizer: Any, text: str) -> _Tokens:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return _Tokens(
        tuple(encoded["input_ids"]), tuple(start for start, _ in offsets), tuple(stop for _, stop in offsets)
    )


def _turn(tokenizer: Any, tokens: _Tokens, stretch: _Stretch) -> Turn:
    message, *edges = stretch
    start, stop = (_first_from(tokenizer, tokens, edge) for edge in edges)
    straddled = any(
        index > 0 and tokens.stops[index - 1] > edge for index, edge in zip((start, stop), edges, strict=True)
    )
    return Turn(message, start, max(start, stop), straddled)


def _first_from(tokenizer: Any, tokens: _Tokens, place: int) -> int:
    """The first token that begins at a character or after it."""
    index = bisect_left(tokens.starts, place)
    while index < len(tokens.ids):
        reach = tokens.stops[index - 1] if index else 0
        # Byte-level tokenizers may leave leading blanks out of the offsets of the token that holds them.
        token = [tokens.ids[index]] if reach < place else []
        text = tokenizer.decode(token, clean_up_tokenization_spaces=False)
        blanks = len(text) - len(text.lstrip())
        if max(reach, tokens.starts[index] - blanks) >= place:
            break
        index += 1
    return index
