"""A chat as text: what the chat template writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A chat as text.

    Attributes:
        text: of the whole chat.
        marked: characters [start, stop) of each generation block; None for a template without such blocks.
    """

    text: str
    marked: tuple[tuple[int, int], ...] | None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Rendering:
    """The text of a chat; with `prompt`, the header of the assistant's next turn follows.

    Raises:
        ValueError: no chat template, or one that cannot write the chat.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; set training.chat_template to a shipped one (deepseek_v3, tiny) or to a "
            ".jinja file"
        )
    schemas: Any = [dict(tool) for tool in tools] if tools else None
    template = tokenizer.get_chat_template(tools=schemas)
    has_markers = _MARKER.search(template) is not None
    try:
        texts, marked = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=schemas,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=has_markers,
            **{**tokenizer.special_tokens_map, **(template_kwargs or {})},
        )
    except (TemplateError, TypeError) as error:  # TypeError: a template that joins a text and nothing
        raise ValueError(f"the chat template cannot write this chat: {error}") from error
    return Rendering(texts[0], tuple(marked[0]) if has_markers else None)
