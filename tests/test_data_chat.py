"""The character tokenizer, its chat template and the loss mask."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from data.chat import build_tokenizer, format_answer, render_prompt
from data.loss_mask import tokenize_chat
from data.tasks import get_task, task_names

USER = {"role": "user", "content": "4-1="}
ASSISTANT = {"role": "assistant", "content": "<think>4-1=3</think><answer>3</answer>"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def test_special_tokens(tokenizer: Any) -> None:
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    special = {"<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"}
    assert set(tokenizer.all_special_tokens) == special
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))  # no holes: it sizes the embedding
    assert len(tokenizer) == 7 + 4 + 95 + 1  # special, tags, printable ASCII, newline


def test_one_token_per_character_and_per_tag(tokenizer: Any) -> None:
    assert tokenizer.tokenize("<think>1+ \n</think>") == ["<think>", "1", "+", " ", "\n", "</think>"]
    printable = string.printable[:95] + "\n"
    assert tokenizer.tokenize(printable) == list(printable)
    assert tokenizer.unk_token_id not in tokenizer(printable)["input_ids"]


def test_unknown_characters_become_one_unk_each(tokenizer: Any) -> None:
    assert tokenizer.tokenize("aé\U0001f600b") == ["a", "<unk>", "<unk>", "b"]


@pytest.mark.parametrize("name", task_names())
def test_task_texts_survive_the_round_trip(name: str) -> None:
    tokenizer = build_tokenizer(get_task(name).characters)
    for level in get_task(name).levels:
        for item in get_task(name).items(level, "train", 50):
            for text in (item.prompt, format_answer(item.worked, item.answer), format_answer(None, item.answer)):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
                assert tokenizer.decode(ids) == text


def test_extra_characters_are_a_token_each_and_change_no_other() -> None:
    plain, extended = build_tokenizer(), build_tokenizer("零몇")
    assert len(extended) == len(plain) + 2
    assert extended.tokenize("e零몇?") == ["e", "零", "몇", "?"]
    assert plain.tokenize("e零몇?") == ["e", "<unk>", "<unk>", "?"]
    assert plain.get_vocab().items() <= extended.get_vocab().items()
    for wrong in ("零零", "e"):
        with pytest.raises(ValueError, match="has a character twice"):
            build_tokenizer(wrong)


def test_odd_spacing_survives_the_round_trip(tokenizer: Any) -> None:
    for text in ("a  b ,c . d !", " leading", "trailing ", "\n\n x\n", "do n't", "<think> </think> "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_format_answer() -> None:
    assert format_answer("1+1=2", "2") == "<think>1+1=2</think><answer>2</answer>"
    assert format_answer(None, "2") == "<think></think><answer>2</answer>"


def test_rendered_prompt_is_the_start_of_the_rendered_chat(tokenizer: Any) -> None:
    prompt = render_prompt(tokenizer, [USER])
    assert tokenizer.decode(prompt) == "<bos><|user|>4-1=<|assistant|>"
    ids = tokenize_chat(tokenizer, [USER, ASSISTANT]).ids
    assert ids[: len(prompt)] == prompt


def test_system_message_is_rendered(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert tokenizer.decode(render_prompt(tokenizer, [system, USER])).startswith("<bos><|system|>Be brief.<|user|>4-1=")


def masked_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    chat = tokenize_chat(tokenizer, messages)
    ids, mask = chat.ids, chat.mask
    assert len(ids) == len(mask)
    return str(tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside]))


def test_mask_covers_exactly_the_content_and_its_eos(tokenizer: Any) -> None:
    assert masked_text(tokenizer, [USER, ASSISTANT]) == ASSISTANT["content"] + "<eos>"
    chat = tokenize_chat(tokenizer, [USER, ASSISTANT])
    ids, mask = chat.ids, chat.mask
    start = mask.index(True)
    assert tokenizer.convert_ids_to_tokens(ids[start - 1]) == "<|assistant|>"
    assert all(mask[start:])


def test_mask_covers_every_turn_of_the_assistant(tokenizer: Any) -> None:
    second = {"role": "assistant", "content": "7"}
    assert masked_text(tokenizer, [USER, ASSISTANT, USER, second]) == ASSISTANT["content"] + "<eos>7<eos>"
    with pytest.raises(ValueError, match="no assistant message"):
        tokenize_chat(tokenizer, [USER])


def test_template_keeps_the_reasoning_of_every_turn(tokenizer: Any) -> None:
    ids = tokenize_chat(tokenizer, [USER, ASSISTANT, USER, ASSISTANT]).ids
    assert tokenizer.decode(ids).count("<think>4-1=3</think>") == 2


def test_mask_works_with_another_template_that_has_markers() -> None:
    other: Any = build_tokenizer()
    other.chat_template = (
        "{%- for m in messages %}{{ m.role + ':' }}{%- if m.role == 'assistant' %}{%- generation -%}{{ m.content }}"
        "{%- endgeneration -%}{%- else %}{{ m.content }}{%- endif %}{%- endfor %}"
    )
    assert masked_text(other, [USER, {"role": "assistant", "content": "3"}]) == "3"


def test_trls_view_of_the_mask_is_the_same(tokenizer: Any) -> None:
    chat = tokenize_chat(tokenizer, [USER, ASSISTANT])
    ids, mask = chat.ids, chat.mask
    encoded = tokenizer.apply_chat_template(
        [[USER, ASSISTANT]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tuple(encoded["input_ids"][0]) == ids
    assert tuple(map(bool, encoded["assistant_masks"][0])) == mask


def test_errors_say_the_cure() -> None:
    broken: Any = build_tokenizer()
    broken.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert broken.decode(render_prompt(broken, [USER])) == "4-1="
    broken.chat_template = None
    for call, messages in ((render_prompt, [USER]), (tokenize_chat, [USER, ASSISTANT])):
        with pytest.raises(ValueError, match=r"no chat template; set training\.chat_template"):
            call(broken, messages)
    with pytest.raises(ValueError, match="last message is the assistant's; remove it"):
        render_prompt(build_tokenizer(), [USER, ASSISTANT])
    with pytest.raises(ValueError, match="at least one message"):
        render_prompt(build_tokenizer(), [])


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_saved_and_loaded_it_is_the_same(tokenizer: Any, tmp_path: Path, beside_a_model: bool) -> None:
    from transformers import AutoTokenizer, DeepseekV3Config

    tokenizer.save_pretrained(tmp_path)
    if beside_a_model:  # the model type can change the class that AutoTokenizer picks
        DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(tmp_path)
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    chat = [USER, ASSISTANT]
    assert tokenize_chat(loaded, chat) == tokenize_chat(tokenizer, chat)
    assert render_prompt(loaded, [USER]) == render_prompt(tokenizer, [USER])
    ids = tokenize_chat(loaded, chat).ids
    assert loaded.decode(ids, skip_special_tokens=True) == "4-1=" + ASSISTANT["content"]
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")
    assert loaded.get_vocab() == tokenizer.get_vocab()
