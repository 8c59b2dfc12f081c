"""What an environment's messages add to a chat: by hand, and against whole chats rendered by several templates."""

from __future__ import annotations

from typing import Any

import pytest

from data.chat import build_tokenizer, render_prompt
from data.templates import load_template
from data.turns import added_ids, added_text, require_turns
from tests.chat_tokenizers import (
    CHATML_TOKENS,
    DEEPSEEK_TOKENS,
    LIKE_QWEN3,
    LIKE_R1,
    MARKED_CHATML,
    assistant,
    character_tokenizer,
    tool,
    user,
)


def tiny() -> Any:
    return build_tokenizer()


def chatml() -> Any:
    return character_tokenizer(CHATML_TOKENS, MARKED_CHATML, "<|im_end|>")


def deepseek() -> Any:
    return character_tokenizer(DEEPSEEK_TOKENS, load_template("deepseek_v3"), "<｜end▁of▁sentence｜>")


def test_by_hand() -> None:
    prompt, messages = [user("31-45?")], [user("higher")]
    assert added_text(tiny(), prompt, messages) == "<eos><|user|>higher<|assistant|>"
    # The line break after the end of a turn belongs to no message, and is not forgotten.
    expected = "<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"
    assert added_text(chatml(), prompt, messages) == expected


@pytest.mark.parametrize("make", [tiny, chatml, deepseek])
@pytest.mark.parametrize("role", [user, tool])
def test_sampled_tokens_and_what_is_added_are_the_whole_chat(make: Any, role: Any) -> None:
    tokenizer = make()
    prompt, replies = [user("31-45?")], [[role("higher")], [role("lower"), role("again")]]
    if make is deepseek and role is tool:
        pytest.skip("its template writes tool messages only after tool calls")
    ids = list(render_prompt(tokenizer, prompt))
    chat: list[Any] = list(prompt)
    for text, messages in zip(("38", "40"), replies, strict=True):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # sampled
        ids += added_ids(tokenizer, prompt, messages, ids[-1])
        chat += [assistant(text), *messages]
    assert ids == list(render_prompt(tokenizer, chat))


def test_an_end_of_turn_that_was_not_sampled_is_added() -> None:
    tokenizer = tiny()
    sampled, cut = tokenizer.eos_token_id, tokenizer("3", add_special_tokens=False)["input_ids"][0]
    ids = added_ids(tokenizer, [user("31-45?")], [user("higher")], sampled)
    assert added_ids(tokenizer, [user("31-45?")], [user("higher")], cut) == (sampled, *ids)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    qwen = character_tokenizer(CHATML_TOKENS, LIKE_QWEN3, "<|im_end|>")
    with pytest.raises(ValueError, match="not prefix-stable: with messages of role user"):
        added_text(qwen, [user("31-45?")], [user("higher")])
    require_turns(qwen)  # messages of the role tool are no new question, and leave the turns before as they are
    assert added_text(qwen, [user("31-45?")], [tool("higher")]).endswith("<|im_start|>assistant\n")
    require_turns(character_tokenizer(DEEPSEEK_TOKENS, LIKE_R1, "<｜end▁of▁sentence｜>"))
    rewriting = "{% for m in messages %}{{ loop.length ~ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="not prefix-stable"):
        require_turns(character_tokenizer((), rewriting, "<eos>"))
