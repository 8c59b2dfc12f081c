"""Text of sampled tokens, as a reader of the stream would have got it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def completion_text(tokenizer: Any, prompt_ids: Sequence[int], token_ids: Sequence[int], *, ended: bool) -> str:
    """The text that `token_ids` add to a prompt's, special tokens left out.

    Decoding the completion alone would not do: many tokenizers drop the blank at the beginning of a text. What a character cut
    off at the end would have been is left out, as servers do that stream.

    Args:
        tokenizer: of transformers. One without a `tokenizers` backend decodes the completion alone.
        prompt_ids: what stands before it.
        token_ids: of the completion.
        ended: its last token ended it, and is no text whether or not the tokenizer calls it special.
    """
    if ended:
        token_ids = token_ids[:-1]
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    return "".join(token_texts(tokenizer, prompt_ids, token_ids))


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: empty for a special one, and for one that ends within a character.

    Args:
        tokenizer: of transformers. One without a `tokenizers` backend decodes each token alone, blanks between words left out.
        prompt_ids: what stands before.
        token_ids: of the completion.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [str(tokenizer.decode([token_id], skip_special_tokens=True)) for token_id in token_ids]
    stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
    pieces = []
    for token_id in token_ids:
        try:
            pieces.append(stream.step(backend, token_id) or "")
        except Exception as error:  # the binding raises nothing more precise
            if "Invalid prefix" not in str(error):
                raise
            # Bytes that are no text can leave the stream with a beginning it does not find again.
            stream = DecodeStream(skip_special_tokens=True)
            pieces.append(stream.step(backend, token_id) or "")
    return pieces
