"""The shipped chat templates, choosing one, and the check of what a template teaches."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
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

from data.chat import build_tokenizer, render_prompt
from data.loss_mask import spans, tokenize_chat
from data.templates import SHIPPED, check_template, load_template, set_chat_template

CHATML = without_markers(MARKED_CHATML)
END = "<｜end▁of▁sentence｜>"
ASK, SAY = user("2+3?"), assistant("<think>2+3=5</think>5")
MORE, LAST = user("1+1?"), assistant("<think>1+1=2</think>2")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}


@pytest.fixture
def deepseek() -> Any:
    tokenizer = character_tokenizer(DEEPSEEK_TOKENS, load_template("deepseek_v3"), END)
    tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    return tokenizer


def texts(tokenizer: Any, messages: list[Any], **options: Any) -> tuple[str, list[str]]:
    """A whole chat, and each stretch with loss."""
    chat = tokenize_chat(tokenizer, messages, **options)
    return tokenizer.decode(chat.ids), [tokenizer.decode(chat.ids[start:stop]) for start, stop in spans(chat.mask)]


def upstream(tokenizer: Any, name: str, messages: list[Any]) -> str:
    """What a template that TRL ships makes of a prompt."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text


# --- DeepSeek's template ----------------------------------------------------------------------------------------------


def test_deepseek_keeps_the_reasoning_of_every_turn_and_trains_no_role_token(deepseek: Any) -> None:
    whole, trained = texts(deepseek, [system("Brief."), ASK, SAY, MORE, LAST])
    assert whole == (
        "<｜begin▁of▁sentence｜>Brief.<｜User｜>2+3?<｜Assistant｜><think>2+3=5</think>5<｜end▁of▁sentence｜>"
        "<｜User｜>1+1?<｜Assistant｜><think>1+1=2</think>2<｜end▁of▁sentence｜>"
    )
    assert trained == [SAY["content"] + END, LAST["content"] + END]


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [system("Be brief."), ASK],
        [ASK, MORE],
        [system("Be brief."), ASK, tool("5")],
    ],
)
def test_deepseek_prompts_are_upstreams(deepseek: Any, name: str, messages: list[Any]) -> None:
    """Newer upstream templates also open the reasoning, which the model writes itself here."""
    theirs = upstream(deepseek, name, messages)
    ours = deepseek.decode(render_prompt(deepseek, messages))
    assert theirs in (ours, ours + "<think>\n")


@pytest.mark.parametrize(
    "messages", [[ASK, tool("5"), tool("6")], [system("Be brief."), system("Think."), ASK]], ids=["results", "systems"]
)
def test_deepseek_prompts_with_several_of_a_kind_are_v3s(deepseek: Any, messages: list[Any]) -> None:
    """The distilled models' own puts a line break between results and forgets all system messages but the last."""
    theirs = upstream(deepseek, "deepseekv3", messages)
    ours = deepseek.decode(render_prompt(deepseek, messages))
    assert theirs in (ours, ours + "<think>\n")


def test_deepseek_tool_calls_have_loss_and_their_results_have_not(deepseek: Any) -> None:
    second = {"name": "mul", "arguments": '{"a": 1}'}  # without the wrapping, arguments as text
    call = assistant("<think>sum</think>", tool_calls=[CALL, second])
    messages = [ASK, call, tool("5"), tool("1"), LAST, MORE, assistant("2")]
    whole, trained = texts(deepseek, messages)
    assert trained == [
        "<think>sum</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 2, "b": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>mul\n```json\n'
        '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + END,
        LAST["content"] + END,
        "2" + END,
    ]
    results = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>5<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert f"{END}{results}<think>1+1=2" in whole
    assert whole.endswith(f"{END}<｜User｜>1+1?<｜Assistant｜>2{END}")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_prompt_is_what_its_answer_was_trained_after(deepseek: Any, name: str) -> None:
    tokenizer = deepseek if name == "deepseek_v3" else build_tokenizer()
    call = assistant("", tool_calls=[CALL])
    messages = [system("s"), ASK, call, tool("5"), tool("6"), SAY, MORE, assistant("a"), assistant("b"), ASK, LAST]
    options: dict[str, Any] = {"tools": [{"name": "add"}]}
    ids = tokenize_chat(tokenizer, messages, **options).ids
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [start for start, _ in spans(tokenize_chat(tokenizer, messages, **options).mask)]
    for place, start in zip(places, starts, strict=True):
        if messages[place - 1]["role"] != "assistant":
            assert ids[:start] == render_prompt(tokenizer, messages[:place], **options)


def test_functions_are_listed_in_the_system_prompt(deepseek: Any) -> None:
    tools = [{"name": "add"}, {"name": "mul"}]
    listing = '## Tools\n\nYou can call these functions:\n\n{"name": "add"}\n{"name": "mul"}'
    prompt = deepseek.decode(render_prompt(deepseek, [system("Brief."), ASK], tools=tools))
    assert prompt == f"<｜begin▁of▁sentence｜>Brief.\n\n{listing}<｜User｜>2+3?<｜Assistant｜>"
    whole, _ = texts(deepseek, [ASK, SAY], tools=tools)
    assert whole.startswith(f"<｜begin▁of▁sentence｜>{listing}<｜User｜>2+3?")


def test_reasoning_in_a_field_of_its_own_is_kept(deepseek: Any) -> None:
    chat = [ASK, assistant("5", reasoning_content="2+3=5"), MORE, LAST]
    assert texts(deepseek, chat)[1][0] == f"<think>\n2+3=5\n</think>\n\n5{END}"
    assert texts(build_tokenizer(), chat)[1][0] == "<think>2+3=5</think>5<eos>"


def test_tools_in_the_tiny_template() -> None:
    chat = [ASK, assistant("So:", tool_calls=[CALL, CALL]), tool("5"), assistant("", tool_calls=[CALL])]
    whole, trained = texts(build_tokenizer(), chat, tools=[{"name": "add"}, {"name": "mul"}])
    call = 'add {"a": 2, "b": 3}'
    assert trained == [f"So:\n{call}\n{call}<eos>", f"{call}<eos>"]
    assert whole.startswith('<bos><|system|>{"name": "add"}\n{"name": "mul"}<|user|>2+3?<|assistant|>So:')
    assert "<eos><|user|>5<|assistant|>add" in whole


def test_options_reach_a_prompt() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = "{{ mood }}" + str(tokenizer.chat_template)
    prompt = tokenizer.decode(render_prompt(tokenizer, [ASK], template_kwargs={"mood": "calm"}))
    assert prompt == "calm<bos><|user|>2+3?<|assistant|>"


# --- choosing a template ----------------------------------------------------------------------------------------------


def test_templates_are_found_by_name_or_path_and_others_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "mine.jinja"
    own.write_text("{{ messages }}")
    assert load_template(str(own)) == "{{ messages }}"
    with pytest.raises(ValueError, match="did you mean 'deepseek_v3'.*the shipped ones are deepseek_v3, tiny"):
        load_template("deepseek-v3")
    with pytest.raises(ValueError, match="there is no chat template.*the shipped ones are deepseek_v3, tiny"):
        load_template("nowhere.jinja")
    (tmp_path / "mine.txt").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="a path must end in .jinja"):
        load_template(str(tmp_path / "mine.txt"))


def test_a_template_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny: Any = build_tokenizer()
    before = tiny.chat_template
    with pytest.raises(
        ValueError, match=r"deepseek_v3 writes <｜Assistant｜>, <｜User｜>, .*<｜tool▁sep｜>, which this"
    ):
        set_chat_template(tiny, "deepseek_v3")
    assert tiny.chat_template == before
    without_tools = character_tokenizer(DEEPSEEK_TOKENS[:4], CHATML, END)
    with pytest.raises(ValueError, match="deepseek_v3 writes <｜tool▁calls▁begin｜>"):
        set_chat_template(without_tools, "deepseek_v3")
    with pytest.raises(ValueError, match=r"tiny writes <bos>, <eos>, <\|assistant\|>, <\|system\|>, <\|user\|>, which"):
        set_chat_template(byte_tokenizer((), CHATML, END), "tiny")
    put_together = tmp_path / "roles.jinja"  # a token that only a written chat shows
    put_together.write_text("{% for m in messages %}{{ '<|' + m['role'] + '_says|>' + m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=r"writes <\|assistant_says\|>, <\|user_says\|>, which"):
        set_chat_template(tiny, str(put_together))


def test_the_unknown_token_stands_for_no_special_token(tmp_path: Path) -> None:
    """A word-level tokenizer encodes any text as one token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert len(tokenizer.encode("<|user|>", add_special_tokens=False)) == 1
    with pytest.raises(ValueError, match=r"tiny writes <bos>, <eos>, <\|assistant\|>"):
        set_chat_template(tokenizer, "tiny")


def test_a_template_that_fits_is_set_and_saved(deepseek: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    deepseek.chat_template = LIKE_R1
    set_chat_template(deepseek, "deepseek_v3")
    deepseek.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == load_template("deepseek_v3")
    path = tmp_path / "commented.jinja"
    path.write_text("{# not <|im_start|> #}" + LIKE_R1)
    set_chat_template(deepseek, str(path))
    assert deepseek.chat_template.startswith("{# not")


def test_a_template_that_cannot_be_used_is_refused(deepseek: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    for text, words in (("{% for m in %}", "Expected an expression"), ("{{ raise_exception('no!') }}", "no!")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"broken.jinja: the chat template cannot write this chat: {words}"):
            set_chat_template(deepseek, str(path))
    assert deepseek.chat_template == load_template("deepseek_v3")


# --- what a template teaches ------------------------------------------------------------------------------------------


def test_good_templates_have_no_problems(deepseek: Any) -> None:
    chatml = [
        make(CHATML_TOKENS, template, "<|im_end|>")
        for make in (character_tokenizer, byte_tokenizer)
        for template in (CHATML, MARKED_CHATML)
    ]
    for tokenizer in (build_tokenizer(), deepseek, *chatml):
        for loss_on in ("assistant", "last_assistant", "completion", "all"):
            report: Any = check_template(tokenizer, loss_on=loss_on)
            assert report.problems == () and report.stop_token == tokenizer.eos_token_id
            assert report.stop_is_trained and report.reasoning_survives and report.text_survives
            assert report.prompt_meets_answer and not report.straddled
            json.dumps(asdict(report))


def tiny_like(body: str, prompt: str = "<|assistant|>") -> Any:
    """The tiny tokenizer with a template whose assistant turns are `body`."""
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + body + "{% else %}"
        "{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    return tokenizer


GOOD = "<|assistant|>{% generation %}{{ m['content'] + '<eos>' }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("body", "prompt", "fact", "words"),
    [
        (
            "<|assistant|>{% generation %}{{ m['content'] }}{% endgeneration %}<eos>",
            "<|assistant|>",
            "stop_is_trained",
            "never learn to stop",
        ),
        ("<|assistant|>{{ m['content'] }}", "<|assistant|>", "stop_is_trained", "never learn to stop"),
        (GOOD.replace("m['content']", "m['content'].split('</think>')[-1]"), "<|assistant|>", "reasoning_survives", "think"),
        (GOOD, "<|assistant|><think>", "prompt_meets_answer", "sampled after another prefix"),
        ("{% generation %}" + GOOD.replace("{% generation %}", ""), "", "text_survives", "is not the assistant's text"),
        ("<|assistant|>{{ m['content'] }}<eos>", "", "text_survives", "is not the assistant's text"),
        ("<|assistant|>{{ m['content'] | upper }}<eos>", "<|assistant|>", "text_survives", "is not the assistant's text"),
        (
            "{% if loop.last %}" + GOOD + "{% else %}" + without_markers(GOOD) + "{% endif %}",
            "<|assistant|>",
            "stop_is_trained",
            "only 1 of 2 turns",
        ),
    ],
)  # fmt: skip
def test_what_a_template_spoils_is_named(body: str, prompt: str, fact: str, words: str) -> None:
    report = check_template(tiny_like(body, prompt), loss_on="assistant")
    (problem,) = report.problems
    assert words in problem
    assert not getattr(report, fact)


def test_a_prompt_may_open_the_reasoning() -> None:
    """The opening tag is then the prompt's, and only what follows it has loss."""
    tokenizer = tiny_like("<|assistant|>{{ m['content'] + '<eos>' }}", "<|assistant|><think>")
    report = check_template(tokenizer, loss_on="assistant")
    assert report.problems == () and report.text_survives and report.prompt_meets_answer
    assert texts(tokenizer, [ASK, SAY])[1] == ["2+3=5</think>5<eos>"]


def test_a_template_that_lays_reasoning_out_afresh_is_fine_for_the_last_turn() -> None:
    tokenizer = character_tokenizer(CHATML_TOKENS, LIKE_QWEN3, "<|im_end|>")
    assert check_template(tokenizer, loss_on="last_assistant").problems == ()
    report = check_template(tokenizer, loss_on="assistant")
    (problem,) = report.problems
    assert "loss_on: last_assistant" in problem and report.stop_token is None and not report.reasoning_survives


def test_r1s_own_template_is_refused_with_the_cure(deepseek: Any) -> None:
    deepseek.chat_template = LIKE_R1
    for loss_on in ("assistant", "last_assistant"):
        (problem,) = check_template(deepseek, loss_on=loss_on).problems
        assert "training.chat_template" in problem and "deepseek_v3" in problem
    set_chat_template(deepseek, "deepseek_v3")
    assert check_template(deepseek, loss_on="assistant").problems == ()


def test_a_token_across_an_edge_is_named() -> None:
    colon = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    assert check_template(byte_tokenizer(("<eos>",), colon + prompt, "<eos>"), loss_on="assistant").problems == ()
    for trim_offsets in (False, True):
        joined = colon.replace("m['content']", "m['content'].replace('<think>', 'hi<think>')")
        tokenizer = byte_tokenizer(("<eos>",), joined + prompt, "<eos>", trim_offsets=trim_offsets)
        report = check_template(tokenizer, loss_on="assistant")
        assert report.straddled and not report.prompt_meets_answer
        assert any("lies across the edge" in problem for problem in report.problems)


def test_the_tokens_that_end_generation_may_be_given() -> None:
    """Qwen's base models: the tokenizer's eos is <|endoftext|>, and turns end with <|im_end|>."""
    tokenizer = character_tokenizer((*CHATML_TOKENS, "<|endoftext|>"), CHATML, "<|endoftext|>")
    (problem,) = check_template(tokenizer, loss_on="assistant").problems
    assert "a turn ends with '<|im_end|>'" in problem and "(<|endoftext|>)" in problem
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    report = check_template(tokenizer, loss_on="assistant", stop_ids=frozenset({end, tokenizer.eos_token_id}))
    assert report.problems == () and report.stop_token == end


def test_characters_that_the_vocabulary_lacks_are_seen() -> None:
    tokenizer = tiny_like(GOOD.replace("m['content']", "m['content'].replace('5', '\u00e9')"))
    report = check_template(tokenizer, loss_on="assistant")
    assert not report.text_survives and len(report.problems) == 1


def test_without_a_template_there_is_nothing_to_check() -> None:
    tokenizer: Any = build_tokenizer()
    with pytest.raises(ValueError, match="choose one of"):
        check_template(tokenizer, loss_on="answers")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_template(tokenizer, loss_on="assistant")
