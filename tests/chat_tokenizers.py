"""Small tokenizers and chat templates of several kinds, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data.chat import build_tokenizer

DEEPSEEK_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    *(f"<｜tool▁{part}▁{edge}｜>" for part in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    "<｜tool▁sep｜>",
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: reasoning before the last question is cut out, and laid out with line breaks after it.
LIKE_QWEN3 = (
    "{% set state = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set state.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set parts = m['content'].split('</think>') %}{% set answer = parts[-1].strip() %}"
    "{% if m['role'] == 'assistant' and loop.index0 > state.last %}"
    "{% set reasoning = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
    "{% set answer = '<think>\\n' + reasoning + '\\n</think>\\n\\n' + answer %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + answer + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1's: reasoning is cut out of every turn, and opened by the generation prompt.
LIKE_R1 = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def without_markers(template: str) -> str:
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def character_tokenizer(special: Sequence[str], template: str, eos: str) -> Any:
    """The tiny models' tokenizer with more special tokens."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(special: Sequence[str], template: str, eos: str, *, trim_offsets: bool = False) -> Any:
    """Byte-level pairs: each byte is a token but "hi", " hi", two blanks and two line breaks, which are one each.

    With `trim_offsets`, offsets leave leading blanks out, as Llama-3's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pairs = [("h", "i"), ("Ġ", "hi"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}
