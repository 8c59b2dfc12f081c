"""Chat templates: the shipped ones, and a check of what a template teaches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.loss_mask import ChatLayout, lay_out, trained_messages
from data.rendering import render_chat
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "chat_templates"
SHIPPED = ("deepseek_v3", "tiny")
_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)
_SPECIAL = re.compile(r"<[|｜][^<>|｜\s'\"{}]+[|｜]>|<bos>|<eos>|</?s>")  # what looks like a special token


def load_template(name_or_path: str) -> str:
    """The text of a shipped template, or of a .jinja file.

    Raises:
        ValueError: neither.
    """
    if name_or_path in SHIPPED:
        return (FOLDER / f"{name_or_path}.jinja").read_text(encoding="utf-8").rstrip("\n")
    path = Path(name_or_path).expanduser()
    if path.suffix == ".jinja":
        if path.is_file():
            return path.read_text(encoding="utf-8")
        raise ValueError(f"there is no chat template {name_or_path!r}; the shipped ones are {', '.join(SHIPPED)}")
    near = difflib.get_close_matches(name_or_path, SHIPPED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"chat template {name_or_path!r} is unknown; {hint}the shipped ones are {', '.join(SHIPPED)}, and a path must end "
        f"in .jinja"
    )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Give a tokenizer a template that its vocabulary can write.

    Special tokens are found by their look, in the template and in a chat that it writes: <|...|>, <｜...｜>, <bos>, <eos>,
    <s>, </s>.

    Raises:
        ValueError: no such template, one that cannot write a plain chat, or a special token in it that is not a single token
            of the vocabulary. The tokenizer is then as it was.
    """
    template = load_template(name_or_path)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        text = render_chat(tokenizer, _probe(), prompt=True).text
    except ValueError as error:
        tokenizer.chat_template = before
        raise ValueError(f"training.chat_template {name_or_path}: {error}") from error
    broken = [
        token
        for token in sorted({*_SPECIAL.findall(_COMMENT.sub("", template)), *_SPECIAL.findall(text)})
        if not _is_one_token(tokenizer, token)
    ]
    if broken:
        tokenizer.chat_template = before
        raise ValueError(
            f"training.chat_template {name_or_path} writes {', '.join(broken)}, which this tokenizer does not have as a "
            f"token: it is the template of another model; leave training.chat_template out, or give one for this model"
        )


def _is_one_token(tokenizer: Any, token: str) -> bool:
    # A word-level tokenizer makes one token of any text, the unknown one.
    number = tokenizer.get_vocab().get(token)
    return number is not None and tokenizer.encode(token, add_special_tokens=False) == [number]


# --- what a template teaches ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What a template makes of a chat of two turns with reasoning; `problems` say what is wrong, each with its cure.

    Where the chat cannot be laid out at all, `stop_token` is None, the facts are False, and the problem says why.
    """

    stop_token: int | None  # the last trained token of the last turn
    stop_is_trained: bool  # every turn that should have loss ends with a token that ends generation
    reasoning_survives: bool  # in each of them
    text_survives: bool  # decoding gives each of them back, blanks aside
    prompt_meets_answer: bool  # the ids of the generation prompt are those that stand before each of them
    straddled: bool  # a token lies across an edge of one of them
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    """Of one turn; see TemplateReport. `last` is its last trained token, None when it has none."""

    last: int | None
    stops: bool
    reasoning: bool
    text: bool
    prompt: bool
    straddled: bool


_TURNS = (("What is 2+3?", "2+3=5", "5"), ("And 4+4?", "4+4=8", "8"))  # question, reasoning, answer


def _probe() -> list[Message]:
    chat: list[Message] = []
    for question, reasoning, answer in _TURNS:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": f"<think>{reasoning}</think>{answer}"})
    return chat


def check_template(
    tokenizer: PreTrainedTokenizerBase, *, loss_on: str, stop_ids: frozenset[int] | None = None
) -> TemplateReport:
    """Write a fixed chat of two turns with reasoning, and look at what would be trained.

    Args:
        tokenizer: with its template.
        loss_on: see `data.loss_mask.tokenize_chat`; "all" is looked at as "assistant", which it includes.
        stop_ids: tokens that end generation, e.g. the eos_token_id of tokenizer and generation config; the tokenizer's if
            None.

    Raises:
        ValueError: the tokenizer has no chat template, or `loss_on` is unknown.
    """
    if stop_ids is None:
        stop_ids = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    chat = _probe()
    loss_on = "assistant" if loss_on == "all" else loss_on
    places = trained_messages(chat, loss_on)
    render_chat(tokenizer, chat[:1], prompt=True)  # raises where there is no template at all
    try:
        layout = lay_out(tokenizer, chat, loss_on=loss_on)
    except ValueError as error:
        return TemplateReport(None, False, False, False, False, False, (str(error),))
    turns = [_facts(tokenizer, chat, layout, place, stop_ids) for place in places]
    return TemplateReport(
        stop_token=turns[-1].last,
        stop_is_trained=all(turn.stops for turn in turns),
        reasoning_survives=all(turn.reasoning for turn in turns),
        text_survives=all(turn.text for turn in turns),
        prompt_meets_answer=all(turn.prompt for turn in turns),
        straddled=any(turn.straddled for turn in turns),
        problems=tuple(_problems(tokenizer, turns, stop_ids)),
    )


def _facts(tokenizer: Any, chat: Sequence[Message], layout: ChatLayout, place: int, stop_ids: frozenset[int]) -> _Facts:
    pieces = [turn for turn in layout.turns if turn.message == place and turn.start < turn.stop]
    if not pieces:
        return _Facts(None, False, False, False, False, False)
    decode = _squeezing(tokenizer)
    trained = [token for piece in pieces for token in layout.ids[piece.start : piece.stop]]
    start, stop = pieces[0].start, pieces[-1].stop
    # The end-of-turn token is not part of the text; `decode` keeps special tokens.
    body = len(trained) - (not tokenizer.decode(trained[-1:], skip_special_tokens=True))
    written, context = decode(trained[:body]), decode(layout.ids[: stop - len(trained) + body])
    _, reasoning, _ = _TURNS[place // 2]
    prompt = tokenizer(render_chat(tokenizer, chat[:place], prompt=True).text, add_special_tokens=False)["input_ids"]
    content = _squeeze(chat[place]["content"])
    return _Facts(
        last=trained[-1],
        stops=trained[-1] in stop_ids,
        reasoning=decode(tokenizer.encode(reasoning, add_special_tokens=False)) in written,
        # The generation prompt may hold the opening <think>; nothing but the message may have loss.
        text=content.endswith(written) and context.endswith(content),
        prompt=tuple(prompt) == layout.ids[:start],
        straddled=any(piece.straddled for piece in pieces),
    )


def _squeeze(text: str) -> str:
    """Without blanks: a template may lay a message out afresh."""
    return "".join(text.split())


def _squeezing(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda ids: _squeeze(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _problems(tokenizer: Any, turns: Sequence[_Facts], stop_ids: frozenset[int]) -> list[str]:
    found = [turn for turn in turns if turn.last is not None]
    problems = []
    if len(found) < len(turns):
        problems.append(
            f"only {len(found)} of {len(turns)} turns of the assistant have loss: the others would not be learned; put "
            f"{{% generation %}} around what the assistant writes in each turn, or give training.chat_template"
        )
    if wrong := [turn for turn in found if not turn.stops]:
        expected = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(stop_ids)))) or "none is known"
        problems.append(
            f"a turn ends with {tokenizer.convert_ids_to_tokens(wrong[0].last)!r} and not with a token that ends generation "
            f"({expected}): the model would never learn to stop; put the end-of-turn token inside the template's generation "
            f"block, give training.chat_template, or mend the tokenizer's eos_token"
        )
    if not all(turn.reasoning for turn in found):
        problems.append(
            "the template cuts out the reasoning between <think> and </think>: the model would learn not to think; set "
            "training.chat_template to one that keeps it (deepseek_v3 for DeepSeek's tokenizers, or a .jinja file)"
        )
    elif not all(turn.text for turn in found):
        problems.append(
            "what has loss is not the assistant's text when it is decoded: the template puts a header or other words of its "
            "own into it, or the vocabulary lacks characters; look at the rows, and put {% generation %} around the content "
            "and the end-of-turn token alone"
        )
    if any(turn.straddled for turn in found):
        problems.append(
            "a token lies across the edge of what the assistant wrote, so its characters there are not trained, or others "
            "are: end the template's generation prompt, and each turn, with a special token or a line break"
        )
    elif not all(turn.prompt for turn in found):
        problems.append(
            "the generation prompt is not what stands before the trained text: the model would be sampled after another "
            "prefix than it was trained after; make the template's add_generation_prompt part end where the generation "
            "block begins"
        )
    return problems
