"""What has loss, with marked and unmarked templates; the shipped templates; the check of a template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import build_tokenizer, render_prompt
from data.loss_mask import spans, tokenize_chat
from data.templates import check_template, load_template, set_chat_template

DEEPSEEK_TOKENS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    *(f"<｜tool▁{part}▁{edge}｜>" for part in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    "<｜tool▁sep｜>",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's and DeepSeek-R1's: the reasoning of every turn but the last is cut out.
FORGETFUL = (
    "{% for m in messages %}{% set text = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, SAY = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "<think>2+3=5</think>5"}
MORE, LAST = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>1+1=2</think>2"}


def character_tokenizer(special: list[str], template: str) -> Any:
    """One token per character and per special token, any Unicode character known as <unk>."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(token, special=True) for token in special]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> Any:
    tokenizer = character_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="module")
def deepseek() -> Any:
    tokenizer = character_tokenizer(DEEPSEEK_TOKENS, load_template("deepseek_v3"))
    tokenizer.bos_token, tokenizer.eos_token = DEEPSEEK_TOKENS[:2]
    return tokenizer


def trained(tokenizer: Any, messages: list[Any], **options: Any) -> list[str]:
    chat = tokenize_chat(tokenizer, messages, **options)
    assert len(chat.ids) == len(chat.mask)
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert tuple(encoded["input_ids"]) == chat.ids
    return [tokenizer.decode(chat.ids[start:stop]) for start, stop in spans(chat.mask)]


def test_spans_by_hand() -> None:
    assert spans([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert spans([]) == spans([False]) == []
    assert spans([True]) == [(0, 1)]


# --- without markers --------------------------------------------------------------------------------------------------


def test_every_turn_of_an_unmarked_template_by_hand(chatml: Any) -> None:
    """The end-of-turn token has loss, the line break that ChatML writes after it has not."""
    wanted = [text["content"] + "<|im_end|>" for text in (SAY, LAST)]
    assert trained(chatml, [SYSTEM, ASK, SAY, MORE, LAST]) == wanted
    assert trained(chatml, [ASK, SAY, MORE, LAST], loss_on="last_assistant") == wanted[1:]
    assert trained(chatml, [ASK, SAY, MORE, LAST], loss_on="completion") == wanted[1:]
    (whole,) = trained(chatml, [ASK, SAY], loss_on="all")
    assert whole.startswith("<|im_start|>user")


def test_a_template_that_rewrites_earlier_turns_is_refused_or_trained_on_its_last(chatml: Any) -> None:
    tokenizer = character_tokenizer(["<|im_start|>", "<|im_end|>"], FORGETFUL)
    with pytest.raises(ValueError, match=r"message 1 otherwise when more follows.*loss_on: last_assistant"):
        tokenize_chat(tokenizer, [ASK, SAY, MORE, LAST])
    assert trained(tokenizer, [ASK, SAY, MORE, LAST], loss_on="last_assistant") == [LAST["content"] + "<|im_end|>"]


texts = st.text(alphabet="ab<>1 \n", min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    loss_on=st.sampled_from(["assistant", "last_assistant", "completion"]),
)
def test_a_template_with_and_without_markers_gives_the_same_mask(turns: list[tuple[str, str]], loss_on: str) -> None:
    marked, plain = build_tokenizer(), build_tokenizer()
    plain.chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(marked.chat_template))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    assert tokenize_chat(marked, messages, loss_on=loss_on) == tokenize_chat(plain, messages, loss_on=loss_on)


def test_a_slow_tokenizer_needs_markers(chatml: Any) -> None:
    class Slow:
        is_fast = False
        chat_template = CHATML

    with pytest.raises(ValueError, match="use a fast tokenizer"):
        tokenize_chat(Slow(), [ASK, SAY])  # type: ignore[arg-type]


# --- DeepSeek's template ----------------------------------------------------------------------------------------------


def test_deepseek_keeps_the_reasoning_of_every_turn_and_trains_no_role_token(deepseek: Any) -> None:
    assert trained(deepseek, [SYSTEM, ASK, SAY, MORE, LAST]) == [
        text["content"] + "<｜end▁of▁sentence｜>" for text in (SAY, LAST)
    ]
    whole = deepseek.decode(tokenize_chat(deepseek, [SYSTEM, ASK, SAY]).ids)
    assert whole == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+3?<｜Assistant｜><think>2+3=5</think>5<｜end▁of▁sentence｜>"
    )


def test_deepseek_prompts_are_upstreams(deepseek: Any) -> None:
    """TRL ships upstream's template; its newest form also opens the reasoning, which here the model writes itself."""
    import trl

    upstream = (Path(trl.__file__).parent / "chat_templates" / "deepseekv3.jinja").read_text()
    for messages in ([ASK], [SYSTEM, ASK], [SYSTEM, {"role": "system", "content": "Think."}, ASK]):
        theirs = deepseek.apply_chat_template(
            messages, chat_template=upstream, tokenize=False, add_generation_prompt=True
        )
        ours = deepseek.decode(render_prompt(deepseek, messages))
        assert theirs.removesuffix("<think>\n") == ours


def test_deepseek_tool_calls_have_loss_and_their_results_have_not(deepseek: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}, LAST]
    first, second = trained(deepseek, messages)
    assert first == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    )
    assert second == LAST["content"] + "<｜end▁of▁sentence｜>"
    whole = deepseek.decode(tokenize_chat(deepseek, messages).ids)
    assert "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>5<｜tool▁output▁end｜><｜tool▁outputs▁end｜><think>" in whole
    # What the assistant is asked to go on from is what it was trained after.
    prompt = render_prompt(deepseek, messages[:-1])
    assert tokenize_chat(deepseek, messages).ids[: len(prompt)] == prompt


def test_options_of_a_chat_reach_the_template(deepseek: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}" + str(
        tokenizer.chat_template
    )
    chat = tokenize_chat(tokenizer, [ASK, SAY], tools=[{"name": "add"}], template_kwargs={"mood": "calm"})
    assert tokenizer.decode(chat.ids).startswith("calmadd<bos>")


# --- choosing and checking a template ---------------------------------------------------------------------------------


def test_shipped_templates_are_found_and_others_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "mine.jinja"
    own.write_text("{{ messages }}")
    assert load_template(str(own)) == "{{ messages }}"
    with pytest.raises(ValueError, match="did you mean 'deepseek_v3'"):
        load_template("deepseek-v3")
    with pytest.raises(ValueError, match="the shipped ones are deepseek_v3, tiny"):
        load_template("nowhere.jinja")


def test_a_template_of_another_vocabulary_is_refused(deepseek: Any) -> None:
    with pytest.raises(ValueError, match="several tokens"):
        set_chat_template(build_tokenizer(), "deepseek_v3")
    with pytest.raises(ValueError, match=r"<\|assistant\|>|<\|user\|>"):
        set_chat_template(_without_roles(), "tiny")
    set_chat_template(deepseek, "deepseek_v3")


def _without_roles() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def report(tokenizer: Any, loss_on: str = "assistant") -> Any:
    return check_template(tokenizer, loss_on=loss_on, stop_ids=frozenset({tokenizer.eos_token_id}))


def test_good_templates_have_no_problems(chatml: Any, deepseek: Any) -> None:
    for tokenizer in (build_tokenizer(), chatml, deepseek):
        for loss_on in ("assistant", "last_assistant", "completion"):
            found = report(tokenizer, loss_on)
            assert found.problems == () and found.stop_is_trained and found.reasoning_survives
            assert found.stop_token == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("body", "prompt", "words"),
    [
        (
            "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}",
            "<|assistant|>",
            "never learn to stop",
        ),
        (
            "{% generation %}{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endgeneration %}",
            "<|assistant|>",
            "learn not to think",
        ),
        (
            "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}",
            "<|assistant|><think>",
            "sampled after",
        ),
    ],
)
def test_what_a_template_spoils_is_named(body: str, prompt: str, words: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}" + body + "{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    (problem,) = report(tokenizer).problems
    assert words in problem


def test_errors_say_the_cure() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="choose one of assistant, last_assistant, completion, all"):
        tokenize_chat(tokenizer, [ASK, SAY], loss_on="answers")
    with pytest.raises(ValueError, match="no assistant message"):
        tokenize_chat(tokenizer, [ASK])
    with pytest.raises(ValueError, match="ends with the assistant's message"):
        tokenize_chat(tokenizer, [ASK, SAY, MORE], loss_on="completion")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"training\.chat_template"):
        tokenize_chat(tokenizer, [ASK, SAY])
