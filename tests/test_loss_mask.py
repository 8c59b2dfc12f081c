"""What has loss: with and without markers, over several tokenizers, at the edges of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import (
    CHATML_TOKENS,
    DEEPSEEK_TOKENS,
    LIKE_QWEN3,
    LIKE_R1,
    MARKED_CHATML,
    assistant,
    byte_tokenizer,
    character_tokenizer,
    system,
    tool,
    user,
    without_markers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import build_tokenizer
from data.loss_mask import lay_out, spans, tokenize_chat
from data.templates import load_template

CHATML = without_markers(MARKED_CHATML)
SYSTEM = system("Be brief.")
ASK, SAY = user("2+3?"), assistant("<think>2+3=5</think>5")
MORE, LAST = user("1+1?"), assistant("<think>1+1=2</think>2")


@pytest.fixture(scope="module")
def chatml() -> Any:
    return character_tokenizer(CHATML_TOKENS, CHATML, "<|im_end|>")


def trained(tokenizer: Any, messages: list[Any], **options: Any) -> list[str]:
    """The text of each stretch with loss; checks that the ids are those of `apply_chat_template`."""
    chat = tokenize_chat(tokenizer, messages, **options)
    assert len(chat.ids) == len(chat.mask)
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert tuple(encoded["input_ids"]) == chat.ids
    return [tokenizer.decode(chat.ids[start:stop]) for start, stop in spans(chat.mask)]


def tokens(tokenizer: Any, messages: list[Any], **options: Any) -> list[tuple[str, bool]]:
    chat = tokenize_chat(tokenizer, messages, **options)
    return list(zip(tokenizer.convert_ids_to_tokens(list(chat.ids)), chat.mask, strict=True))


def marked(words: str) -> list[tuple[str, bool]]:
    """A hand-worked mask: a word that begins with ^ has loss."""
    return [(word.removeprefix("^"), word.startswith("^")) for word in words.split()]


def test_spans_by_hand() -> None:
    assert spans([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert spans([]) == spans([False]) == []
    assert spans([True]) == [(0, 1)]


# --- by hand ----------------------------------------------------------------------------------------------------------

TINY = {
    "assistant": "<bos> <|user|> 4 <|assistant|> ^7 ^<eos> <|user|> 5 <|assistant|> ^<think> ^</think> ^8 ^<eos>",
    "last_assistant": "<bos> <|user|> 4 <|assistant|> 7 <eos> <|user|> 5 <|assistant|> ^<think> ^</think> ^8 ^<eos>",
    "all": "^<bos> ^<|user|> ^4 ^<|assistant|> ^7 ^<eos> ^<|user|> ^5 ^<|assistant|> ^<think> ^</think> ^8 ^<eos>",
}
TINY["completion"] = TINY["last_assistant"]


@pytest.mark.parametrize("loss_on", TINY)
@pytest.mark.parametrize("with_markers", [True, False])
def test_tokens_of_the_tiny_template(loss_on: str, with_markers: bool) -> None:
    tokenizer: Any = build_tokenizer()
    if not with_markers:
        tokenizer.chat_template = without_markers(load_template("tiny"))
    chat = [user("4"), assistant("7"), user("5"), assistant("<think></think>8")]
    assert tokens(tokenizer, chat, loss_on=loss_on) == marked(TINY[loss_on])


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
def test_tokens_of_chatml(template: str) -> None:
    """The end-of-turn token has loss, the line break that ChatML writes after it has not."""
    tokenizer = byte_tokenizer(CHATML_TOKENS, template, "<|im_end|>")
    assert tokens(tokenizer, [user("a"), assistant("hi hi")]) == marked(
        "<|im_start|> u s e r Ċ a <|im_end|> Ċ <|im_start|> a s s i s t a n t Ċ ^hi ^Ġhi ^<|im_end|> Ċ"
    )


def test_line_breaks_that_the_assistant_wrote_have_loss(chatml: Any) -> None:
    assert trained(chatml, [user("a"), assistant("b\n\n")]) == ["b\n\n<|im_end|>"]
    plain = byte_tokenizer((), "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", "Ċ")
    assert trained(plain, [user("a"), assistant("b\n\n")]) == ["assistant: b\n\n"]  # no header in its prompt


RUN = [SYSTEM, ASK, assistant("a"), tool("t"), assistant("b"), assistant("c")]


@pytest.mark.parametrize(
    ("loss_on", "wanted"),
    [("assistant", ["a", "b", "c"]), ("last_assistant", ["c"]), ("completion", ["b", "c"])],
)
@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
def test_completion_is_all_that_follows_somebody_elses_last_message(
    chatml: Any, template: str, loss_on: str, wanted: list[str]
) -> None:
    tokenizer = character_tokenizer(CHATML_TOKENS, template, "<|im_end|>")
    assert trained(tokenizer, RUN, loss_on=loss_on) == [f"{text}<|im_end|>" for text in wanted]


def test_a_chat_may_end_with_the_user_and_begin_with_the_assistant(chatml: Any) -> None:
    for template in (CHATML, MARKED_CHATML):
        chatml.chat_template = template
        assert trained(chatml, [SAY, ASK]) == [SAY["content"] + "<|im_end|>"]
        assert trained(chatml, [ASK, SAY, MORE], loss_on="last_assistant") == [SAY["content"] + "<|im_end|>"]
    chatml.chat_template = CHATML


# --- templates that rewrite what they have written --------------------------------------------------------------------


def test_a_template_that_cuts_earlier_reasoning_is_refused_or_trained_on_its_last_turn() -> None:
    tokenizer = character_tokenizer(CHATML_TOKENS, LIKE_QWEN3, "<|im_end|>")
    with pytest.raises(
        ValueError, match=r"message 1 otherwise when more follows.*loss_on: last_assistant, or training\."
    ):
        tokenize_chat(tokenizer, [ASK, SAY, MORE, LAST])
    for loss_on in ("last_assistant", "completion"):
        (text,) = trained(tokenizer, [ASK, SAY, MORE, LAST], loss_on=loss_on)
        assert text == "<think>\n1+1=2\n</think>\n\n2<|im_end|>"
    # After the last question it cuts nothing: calls of tools are fine.
    first, second = trained(tokenizer, [ASK, SAY, tool("5"), LAST])
    assert first.startswith("<think>\n2+3=5") and second.startswith("<think>\n1+1=2")


def test_a_last_turn_that_is_rewritten_has_one_cure_only() -> None:
    tokenizer = character_tokenizer(CHATML_TOKENS, LIKE_QWEN3, "<|im_end|>")
    with pytest.raises(ValueError, match="message 1 otherwise when more follows") as error:
        tokenize_chat(tokenizer, [ASK, SAY, MORE], loss_on="last_assistant")
    assert "training.chat_template" in str(error.value) and "loss_on: last" not in str(error.value)


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "completion"])
def test_a_template_that_cuts_all_reasoning_is_refused(loss_on: str) -> None:
    tokenizer = character_tokenizer(DEEPSEEK_TOKENS, LIKE_R1, "<｜end▁of▁sentence｜>")
    with pytest.raises(ValueError, match="generation prompt is not the beginning.*training.chat_template.*deepseek_v3"):
        tokenize_chat(tokenizer, [ASK, SAY], loss_on=loss_on)


# --- properties over random chats -------------------------------------------------------------------------------------

texts = st.text(alphabet="ahi<> \né中\U0001f600", min_size=0, max_size=6)
chats = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), texts), min_size=0, max_size=5)


def _tokenizers() -> list[Any]:
    tiny: Any = build_tokenizer()
    chatml = ("<|im_end|>", CHATML_TOKENS, MARKED_CHATML)
    deepseek = ("<｜end▁of▁sentence｜>", DEEPSEEK_TOKENS, load_template("deepseek_v3"))
    made = [tiny]
    for eos, special, template in (chatml, deepseek):
        made.append(character_tokenizer(special, template, eos))
        made += [byte_tokenizer(special, template, eos, trim_offsets=trim) for trim in (False, True)]
    return made


TOKENIZERS = _tokenizers()


@settings(max_examples=150, deadline=None)
@given(
    first=st.one_of(st.none(), texts),
    turns=chats,
    last=texts,
    loss_on=st.sampled_from(["assistant", "last_assistant", "completion", "all"]),
)
def test_markers_and_prefixes_give_the_same_mask(
    first: str | None, turns: list[tuple[str, str]], last: str, loss_on: str
) -> None:
    messages = [] if first is None else [system(first)]
    messages += [user("a"), *({"role": role, "content": text} for role, text in turns), assistant(last)]
    for tokenizer in TOKENIZERS:
        template = tokenizer.chat_template
        with_markers = tokenize_chat(tokenizer, messages, loss_on=loss_on)
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        tokenizer.chat_template = without_markers(template)
        try:
            assert tokenize_chat(tokenizer, messages, loss_on=loss_on) == with_markers
        finally:
            tokenizer.chat_template = template
        assert tuple(encoded["input_ids"]) == with_markers.ids
        if loss_on == "assistant":
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            words = tokenizer.decode([with_markers.ids[place] for place, flag in enumerate(with_markers.mask) if flag])
            if tokenizer.unk_token_id not in with_markers.ids and not straddles(tokenizer, messages):
                assert words == "".join(text + tokenizer.eos_token for text in said)


def straddles(tokenizer: Any, messages: list[Any]) -> bool:
    """ChatML's header ends with a line break, which may be one token with another that the answer begins with."""
    return any(turn.straddled for turn in lay_out(tokenizer, messages, loss_on="assistant").turns)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_transformers_agrees_where_offsets_are_whole(turns: list[tuple[str, str]]) -> None:
    """Its own assistant mask, on tokenizers whose offsets leave nothing out."""
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    for tokenizer in (TOKENIZERS[0], TOKENIZERS[2], TOKENIZERS[5]):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if not straddles(tokenizer, messages):
            assert tokenize_chat(tokenizer, messages).mask == tuple(map(bool, encoded["assistant_masks"]))


# --- edges of tokens --------------------------------------------------------------------------------------------------

# No special token between prompt and answer: a blank before the answer and its first letters are one token.
COLON = (
    "{% for m in messages %}{{ ('B: ' if m['role'] == 'assistant' else 'A: ') + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'B: ' }}{% endif %}"
)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_beginning_has_no_loss(trim_offsets: bool) -> None:
    """trim_offsets hides the blank: by its offsets, "Ġhi" begins where the answer begins."""
    tokenizer = byte_tokenizer((), COLON, "Ċ", trim_offsets=trim_offsets)
    straddling = [user("a"), assistant("hihi")]
    assert tokens(tokenizer, straddling) == marked("A : Ġ a Ċ B : Ġhi ^hi ^Ċ")
    assert [turn.straddled for turn in lay_out(tokenizer, straddling, loss_on="assistant").turns] == [True]
    for text, wanted in (("a", "Ġ ^a ^Ċ"), (" a", "ĠĠ ^a ^Ċ"), ("  a", "ĠĠ ^Ġ ^a ^Ċ"), (" hi", "Ġ ^Ġhi ^Ċ")):
        assert tokens(tokenizer, [user("a"), assistant(text)]) == marked(f"A : Ġ a Ċ B : {wanted}"), text


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_end_has_loss(trim_offsets: bool) -> None:
    """It begins inside; the line break of the turn and the one that the next message begins with are one token."""
    tokenizer = byte_tokenizer((), COLON.replace("'A: '", "''"), "Ċ", trim_offsets=trim_offsets)
    chat = [user("a"), assistant("b"), user("\na")]
    assert tokens(tokenizer, chat) == marked("a Ċ B : Ġ ^b ^ĊĊ a Ċ")
    (turn,) = lay_out(tokenizer, chat, loss_on="assistant").turns
    assert turn.straddled
    (turn,) = lay_out(tokenizer, [user("a"), assistant("b"), user("a")], loss_on="assistant").turns
    assert not turn.straddled


@pytest.mark.parametrize("template", [MARKED_CHATML, CHATML])
def test_blanks_that_offsets_leave_out_are_found(template: str) -> None:
    tokenizer = byte_tokenizer(CHATML_TOKENS, template, "<|im_end|>", trim_offsets=True)
    assert trained(tokenizer, [user(" hi "), assistant(" hi "), user("a"), assistant("  a ")]) == [
        " hi <|im_end|>",
        "  a <|im_end|>",
    ]


def test_words_between_which_blanks_belong_to_no_token() -> None:
    """A tokenizer that drops blanks: the first word of the answer is not taken for one that holds the blank before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("?", "Q", "A", ":", "three", "four", "end")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="end")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q : ' + m['content'] + ' ' if m['role'] == 'user' else 'A : ' + m['content'] + ' end ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'A : ' }}{% endif %}"
    )
    chat = [user("three"), assistant("four"), user("four"), assistant("three")]
    assert tokens(tokenizer, chat) == marked("Q : three A : ^four ^end Q : four A : ^three ^end")
    assert not any(turn.straddled for turn in lay_out(tokenizer, chat, loss_on="assistant").turns)


# --- markers ----------------------------------------------------------------------------------------------------------

TWO_BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}<|assistant|>"
    "{% if m['reason'] %}{% generation %}{{ m['reason'] }}{% endgeneration %},{% endif %}"
    "{% generation %}{{ m['content'] + '<eos>' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def test_a_turn_of_several_blocks() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = TWO_BLOCKS
    chat = [ASK, assistant("a", reason="b"), MORE, assistant("c", reason="d")]
    assert trained(tokenizer, chat) == ["b", "a<eos>", "d", "c<eos>"]
    assert trained(tokenizer, chat, loss_on="last_assistant") == ["d", "c<eos>"]
    assert [turn.message for turn in lay_out(tokenizer, chat, loss_on="assistant").turns] == [1, 1, 3, 3]
    # As many blocks as turns, but not one each: still told apart.
    assert trained(tokenizer, [*chat[:3], assistant("c")], loss_on="completion") == ["c<eos>"]


def test_a_turn_without_a_block() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    for loss_on in ("assistant", "last_assistant", "completion"):
        assert trained(tokenizer, [ASK, SAY, MORE, LAST], loss_on=loss_on) == [LAST["content"]]
    assert trained(tokenizer, [ASK, SAY, MORE]) == trained(tokenizer, [ASK, SAY, MORE], loss_on="last_assistant") == []
    assert [turn.message for turn in lay_out(tokenizer, [ASK, SAY, MORE, LAST], loss_on="assistant").turns] == [3]


def test_blocks_that_cannot_be_told_apart_are_refused() -> None:
    tokenizer: Any = build_tokenizer()
    block = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    tokenizer.chat_template = (
        "{% if messages | length < 4 %}{% for m in messages %}" + block + "{% endfor %}{% endif %}"
    )
    with pytest.raises(ValueError, match="fewer generation blocks when more of the chat follows"):
        tokenize_chat(tokenizer, [ASK, SAY, MORE, LAST], loss_on="last_assistant")


# --- what reaches the template ----------------------------------------------------------------------------------------


def test_tools_and_options_of_a_chat_reach_the_template() -> None:
    tokenizer: Any = build_tokenizer()
    for template in (load_template("tiny"), without_markers(load_template("tiny"))):
        tokenizer.chat_template = "{{ mood }}{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}" + template
        options: dict[str, Any] = {"tools": ({"name": "add"},), "template_kwargs": {"mood": "calm"}}
        for loss_on in ("assistant", "all"):
            chat = tokenize_chat(tokenizer, [ASK, SAY], loss_on=loss_on, **options)
            assert tokenizer.decode(chat.ids).startswith('calmadd<bos><|system|>{"name": "add"}<|user|>')
            assert tokenizer.decode(chat.ids).endswith(SAY["content"] + "<eos>")


def test_a_template_of_its_own_for_tools_is_used() -> None:
    tokenizer: Any = build_tokenizer()
    tiny = load_template("tiny")
    tokenizer.chat_template = {"default": tiny, "tool_use": "x" + without_markers(tiny)}
    plain, tools = tokenize_chat(tokenizer, [ASK, SAY]), tokenize_chat(tokenizer, [ASK, SAY], tools=[{"name": "add"}])
    assert tokenizer.decode(plain.ids).startswith("<bos>")
    assert tokenizer.decode(tools.ids).startswith("x<bos><|system|>")
    assert [tokenizer.decode(tools.ids[start:stop]) for start, stop in spans(tools.mask)] == [SAY["content"] + "<eos>"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_slow_tokenizer_has_no_mask() -> None:
    from transformers import ByT5Tokenizer

    tokenizer: Any = ByT5Tokenizer()
    for template in (CHATML, MARKED_CHATML):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="ByT5Tokenizer does not say where a token begins.*use a fast tokenizer"):
            tokenize_chat(tokenizer, [ASK, SAY])
    assert all(tokenize_chat(tokenizer, [ASK, SAY], loss_on="all").mask)


def test_errors_say_the_cure() -> None:
    tokenizer: Any = build_tokenizer()
    with pytest.raises(ValueError, match="'answers'; choose one of assistant, last_assistant, completion, all"):
        tokenize_chat(tokenizer, [ASK, SAY], loss_on="answers")
    with pytest.raises(ValueError, match="no assistant message"):
        tokenize_chat(tokenizer, [ASK])
    with pytest.raises(ValueError, match="ends with the assistant's message"):
        tokenize_chat(tokenizer, [ASK, SAY, MORE], loss_on="completion")
    with pytest.raises(ValueError, match="cannot write this chat: unknown role critic; use system, user, assistant"):
        tokenize_chat(tokenizer, [ASK, SAY, {"role": "critic", "content": "no"}])
    with pytest.raises(ValueError, match="cannot write this chat: .*str"):
        tokenize_chat(tokenizer, [{"role": "user", "content": None}, SAY])
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ValueError, match="cannot write this chat: Unexpected end of template"):
        tokenize_chat(tokenizer, [ASK, SAY])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template; set training\.chat_template"):
        tokenize_chat(tokenizer, [ASK, SAY], loss_on="all")
