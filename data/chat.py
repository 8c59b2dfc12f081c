"""Text to tokens: the character tokenizer of the tiny models, and prompts.

A chat is rendered as

    <bos><|user|>4-1=<|assistant|><think>4-1=3</think><answer>3</answer><eos>

`loss_mask.tokenize_chat` adds what has loss; `templates.py` has the shipped chat templates.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.rendering import render_chat
from data.templates import load_template
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
# Not special: they are part of the answer and must survive decoding with skip_special_tokens.
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


def build_tokenizer(extra_characters: str = "") -> PreTrainedTokenizerFast:
    """A character-level tokenizer (107 tokens) with the chat template above.

    Each printable ASCII character and the newline is one token, every other character is <unk>. Decoding gives the
    text back exactly.

    Args:
        extra_characters: more characters that are a token each, e.g. "零一二"; none of them twice.

    Raises:
        ValueError: a character that is there already.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = (*SPECIAL_TOKENS, *TAG_TOKENS, *CHARACTERS, *extra_characters)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(
            f"extra_characters={extra_characters!r} has a character twice, or one that every tiny policy knows"
        )
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
    tokenizer.chat_template = load_template("tiny")
    return tokenizer


def format_answer(worked: str | None, answer: str) -> str:
    """The assistant's text: `<think>{worked}</think><answer>{answer}</answer>`; a direct answer has an empty think."""
    return f"<think>{worked or ''}</think><answer>{answer}</answer>"


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids [T] of a chat up to where the assistant begins to write.

    Args:
        tokenizer: its chat template is used.
        messages: the chat so far.
        tools: JSON schemas of functions that the template may list.
        template_kwargs: more for the template.

    Raises:
        ValueError: no messages, the last message is the assistant's own, or no chat template that can write them.
    """
    if not messages:
        raise ValueError("a prompt needs at least one message; got none")
    if messages[-1]["role"] == "assistant":
        raise ValueError("a prompt must end with a user message, but its last message is the assistant's; remove it")
    chat = render_chat(tokenizer, messages, prompt=True, tools=tools, template_kwargs=template_kwargs)
    return tuple(tokenizer(chat.text, add_special_tokens=False)["input_ids"])
