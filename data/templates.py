"""Chat templates: the shipped ones, and a check of what a template teaches."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "chat_templates"
SHIPPED = ("deepseek_v3", "tiny")


def load_template(name_or_path: str) -> str:
    """The text of a shipped template, or of a .jinja file.

    Raises:
        ValueError: neither.
    """
    if name_or_path in SHIPPED:
        return (FOLDER / f"{name_or_path}.jinja").read_text(encoding="utf-8").rstrip("\n")
    path = Path(name_or_path).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        return path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(name_or_path, SHIPPED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the shipped ones are {', '.join(SHIPPED)}"
    raise ValueError(f"chat template {name_or_path!r} is neither shipped nor a .jinja file that exists; {hint}")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Give a tokenizer a template that its vocabulary can write.

    Raises:
        ValueError: no such template, or a marker in it that is not one token of the vocabulary.
    """
    template = load_template(name_or_path)
    markers = sorted(
        set(re.findall(r"'(<[|｜][^'<>]*[|｜]>)", template)) | set(re.findall(r"<｜[^<>｜]+｜>", template))
    )
    broken = [marker for marker in markers if len(tokenizer.encode(marker, add_special_tokens=False)) != 1]
    if broken:
        raise ValueError(
            f"chat template {name_or_path!r} writes {', '.join(broken)}, which this tokenizer cuts into several tokens: it "
            f"is the template of another model; leave training.chat_template out, or give one of this model's kind"
        )
    tokenizer.chat_template = template


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What a template does to a chat of two turns with reasoning; `problems` say what is wrong, each with its cure."""

    stop_token: int | None  # the last trained token of a turn
    stop_is_trained: bool  # it is one of the tokens that end a turn
    reasoning_survives: bool  # in every turn that has loss
    prompt_meets_answer: bool  # training begins exactly where generation would
    problems: tuple[str, ...]


_TURNS = (("What is 2+3?", "<think>2+3=5</think>5"), ("And 4+4?", "<think>4+4=8</think>8"))


def check_template(tokenizer: PreTrainedTokenizerBase, *, loss_on: str, stop_ids: frozenset[int]) -> TemplateReport:
    """Render a fixed chat and look at it.

    Args:
        tokenizer: with its template.
        loss_on: see `data.loss_mask.tokenize_chat`.
        stop_ids: tokens that end generation, e.g. the eos_token_id of tokenizer and generation config.
    """
    from data.loss_mask import spans, tokenize_chat

    messages: list[dict[str, Any]] = []
    for question, answer in _TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chat = tokenize_chat(tokenizer, messages, loss_on=loss_on)
    turns = spans(chat.mask)
    trained = [tokenizer.decode(chat.ids[start:stop]) for start, stop in turns]
    wanted = [answer for _, answer in _TURNS][-len(trained) :]
    survives = all(answer.split("</think>")[0] in text for answer, text in zip(wanted, trained, strict=True))
    ends = [chat.ids[stop - 1] for _, stop in turns]
    stops = all(end in stop_ids for end in ends)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True)
    meets = loss_on == "all" or tuple(prompt["input_ids"]) == chat.ids[: turns[-1][0]]
    problems = []
    if not stops:
        expected = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stop_ids)))
        problems.append(
            f"a turn ends with {tokenizer.convert_ids_to_tokens([ends[-1]])[0]!r} and not with a token that ends generation "
            f"({expected}): the model would never learn to stop; put the end-of-turn token inside the template's "
            f"generation block, or give training.chat_template"
        )
    if not survives:
        problems.append(
            "the template cuts out the reasoning between <think> and </think>: the model would learn not to think; set "
            "training.chat_template to deepseek_v3, or to a .jinja file that keeps it"
        )
    if not meets:
        problems.append(
            "the generation prompt is not what stands before the trained text: the model would be sampled after another "
            "prefix than it was trained after; make the template's add_generation_prompt part end where the generation "
            "block begins"
        )
    return TemplateReport(ends[-1], stops, survives, meets, tuple(problems))
