"""Text to tokens: the character tokenizer of the tiny models, its chat template, and the loss mask.

A chat is rendered as

    <bos><|user|>4-1=<|assistant|><think>4-1=3</think><answer>3</answer><eos>

and the mask covers the assistant's content and its <eos>, not the role token. `render_prompt` and `tokenize_with_mask`
work with any tokenizer whose chat template marks the assistant's part with `{% generation %}`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
# Not special: they are part of the answer and must survive decoding with skip_special_tokens.
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

# The assistant's text is used as it is: reasoning between <think> tags is never cut out.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] in ['user', 'system'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% else %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer (107 tokens) with the chat template above.

    Each printable ASCII character and the newline is one token, every other character is <unk>. Decoding gives the
    text back exactly.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *TAG_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()  # without a decoder, tokens are joined with spaces
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def format_answer(worked: str | None, answer: str) -> str:
    """The assistant's text: `<think>{worked}</think><answer>{answer}</answer>`; a direct answer has an empty think."""
    return f"<think>{worked or ''}</think><answer>{answer}</answer>"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids [T] of a chat up to where the assistant begins to write.

    Raises:
        ValueError: no messages, the last message is the assistant's own, or no chat template.
    """
    if not messages:
        raise ValueError("a prompt needs at least one message; got none")
    if messages[-1]["role"] == "assistant":
        raise ValueError("a prompt must end with a user message, but its last message is the assistant's; remove it")
    _check_template(tokenizer, needs_generation=False)
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def tokenize_with_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids [T] of a whole chat and the mask [T] that is True on what the assistant wrote, end of turn included.

    Raises:
        ValueError: the tokenizer has no chat template, or one without generation markers.
    """
    _check_template(tokenizer, needs_generation=True)
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return tuple(encoded["input_ids"]), tuple(bool(inside) for inside in encoded["assistant_masks"])


def _check_template(tokenizer: PreTrainedTokenizerBase, *, needs_generation: bool) -> None:
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template; set tokenizer.chat_template, e.g. to data.chat.CHAT_TEMPLATE"
        )
    if needs_generation and not re.search(r"{%-?\s*generation\s*-?%}", str(template)):
        raise ValueError(
            "the chat template does not mark what the assistant writes, so the loss mask is unknown; put "
            "{% generation %}...{% endgeneration %} around the assistant's content and its end-of-turn token"
        )
