"""A record, and how the row of a file becomes one.

    {"messages": [...]}                            a chat
    {"conversations": [{"from", "value"}, ...]}    a chat in ShareGPT's form
    {"prompt": "4-1=", "completion": "3"}          a chat; both may also be messages
    {"prompt": "4-1=", "answer": "3"}              a problem

What is wrong with a row is said with its file and its place in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.types import Message

CHAT_COLUMNS = ("messages", "conversations", "prompt")  # a row has one of them
COLUMNS = (*CHAT_COLUMNS, "completion", "answer", "worked", "id", "tools", "chat_template_kwargs")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# What the one who renders a chat decides, and not the chat.
RESERVED_KWARGS = (
    *("conversation", "messages", "tools", "chat_template", "tokenize", "return_dict", "return_tensors"),
    *("return_assistant_tokens_mask", "add_generation_prompt", "continue_final_message"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """One problem, or one finished chat when the last message is the assistant's."""

    id: str  # unique within a source and stable, e.g. "chain_sum/2/train/0/17" (task, level, split, seed, index)
    messages: tuple[Message, ...]
    answer: str | None = None  # the reference answer that rewards see
    metadata: Mapping[str, Any] = field(default_factory=dict)
    worked: str | None = None  # a written-out solution, without tags
    tools: tuple[Mapping[str, Any], ...] | None = None  # JSON schemas of functions, for the chat template
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # more for the chat template
    place: str = field(default="", compare=False)  # for people: "chats.jsonl, line 17"

    @property
    def is_chat(self) -> bool:
        """Whether the assistant has already answered."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def label(self) -> str:
        """What error messages call it."""
        return self.place or f"record {self.id}"


def check_names(columns: Mapping[str, str], path: str, names: Sequence[str] = COLUMNS) -> None:
    """Refuse a recipe's `columns` (our name -> theirs) with a name that is none of ours.

    Args:
        names: ours.

    Raises:
        ValueError: an unknown name.
    """
    unknown = sorted(set(columns) - set(names))
    if unknown:
        raise ValueError(f"columns of {path!r}: unknown name {unknown[0]!r}; the names are {', '.join(names)}")


def check_found(columns: Mapping[str, str], found: Iterable[str], path: str, rows: int) -> None:
    """Refuse a recipe's `columns` that name a column of which the first `rows` rows know nothing.

    Raises:
        ValueError: such a column.
    """
    names = list(found)
    for ours, theirs in columns.items():
        if theirs not in names:
            raise ValueError(
                f"{path!r} has no column {theirs!r} (wanted as {ours}) in its first {rows} rows; its columns are "
                f"{', '.join(names)}"
            )


def parse_row(row: Any, columns: Mapping[str, str], place: str, default_id: str) -> Record:
    """The record of a row.

    Args:
        row: column -> value; a value of None is a column that is not there.
        columns: our column name -> theirs, for those that differ.
        place: for error messages, e.g. "chats.jsonl, line 17".
        default_id: for rows without a column id.

    Raises:
        ValueError: the row is no record; the message begins with `place`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: a row must be an object of columns, not {_short(row)}")
    names = _names(row, columns, place)
    values = {ours: row[theirs] for ours, theirs in names.items()}
    taken = set(names.values())
    answer, worked, identity = (values.get(key) for key in ("answer", "worked", "id"))
    return Record(
        id=default_id if identity is None else str(identity),
        messages=_chat(values, names, place),
        answer=None if answer is None else str(answer),
        metadata={key: value for key, value in row.items() if key not in taken and value is not None},
        worked=None if worked is None else str(worked),
        tools=_tools(values.get("tools"), place),
        template_kwargs=_template_kwargs(values.get("chat_template_kwargs"), place),
        place=place,
    )


def _names(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> dict[str, str]:
    """Our name -> theirs for each meaningful column that the row has; of the chat columns just one."""
    claimed = set(columns.values())
    names = {ours: columns.get(ours, ours) for ours in COLUMNS if ours in columns or ours not in claimed}
    names = {ours: theirs for ours, theirs in names.items() if row.get(theirs) is not None}
    chats = [ours for ours in CHAT_COLUMNS if ours in names]
    if len(chats) > 1:
        chats = [ours for ours in chats if ours in columns]  # the recipe says which
    if len(chats) != 1:
        found = [key for key, value in row.items() if value is not None]
        raise ValueError(
            f"{place}: needs a column messages or conversations (SFT) or prompt (RL, evaluation; with completion SFT), "
            f"and one only; it has {', '.join(found) or 'none'}; name yours, e.g. columns: {{prompt: "
            f"{found[0] if found else 'question'}}}"
        )
    others = set(CHAT_COLUMNS) - set(chats)
    if chats != ["prompt"]:
        others.add("completion")
    return {ours: theirs for ours, theirs in names.items() if ours not in others}


def _chat(values: Mapping[str, Any], names: Mapping[str, str], place: str) -> tuple[Message, ...]:
    if "messages" in values:
        return _messages(values["messages"], names["messages"], place)
    if "conversations" in values:
        return _sharegpt(values["conversations"], names["conversations"], place)
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(prompt, names["prompt"], place, or_text=True)
    if completion is None:
        return messages
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer = _messages(completion, names["completion"], place, or_text=True)
    if answer[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: {names['completion']} must end with the assistant's message, not with role {answer[-1]['role']!r}"
        )
    return (*messages, *answer)


def _messages(value: Any, column: str, place: str, or_text: bool = False) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        kind = "a list of {role, content} with texts" + (" or a text" if or_text else "")
        raise ValueError(f"{place}: {column} must be {kind}, not {_short(value)}")
    return tuple(_message(message, f"{place}: {column}[{number}]") for number, message in enumerate(value))


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place} must be {{role, content}} with texts, not {_short(message)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # a call without words; templates join the content to other text
    if not isinstance(content, str):
        raise ValueError(f"{place}.content must be a text, not {_short(content)}")
    # None stands for keys that other rows have: they are not part of this message.
    kept = {key: value for key, value in message.items() if value is not None}
    return {
        "role": message["role"],
        "content": content,
        **{k: v for k, v in kept.items() if k not in ("role", "content")},
    }


def _sharegpt(value: Any, column: str, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {column} must be a list of {{from, value}} with texts, not {_short(value)}")
    messages = []
    for number, turn in enumerate(value):
        where = f"{place}: {column}[{number}]"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
            cure = f"; if it has role and content, add columns: {{messages: {column}}}"
            raise ValueError(f"{where} must be {{from, value}} with texts, not {_short(turn)}{cure}")
        if turn["from"] not in SHAREGPT_ROLES:
            raise ValueError(f"{where}.from is {_short(turn['from'])}; it must be one of {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}.value must be a text, not {_short(turn.get('value'))}")
        others = {key: kept for key, kept in turn.items() if key not in ("from", "value") and kept is not None}
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **others})
    return tuple(messages)


def _tools(value: Any, place: str) -> tuple[Mapping[str, Any], ...] | None:
    tools = _decoded(value)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{place}: tools must be a list of JSON schemas, or its JSON text, not {_short(value)}")
    return tuple(tools) or None


def _template_kwargs(value: Any, place: str) -> Mapping[str, Any]:
    kwargs = _decoded(value)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{place}: chat_template_kwargs must be an object, or its JSON text, not {_short(value)}")
    if reserved := [key for key in kwargs if key in RESERVED_KWARGS]:
        raise ValueError(f"{place}: chat_template_kwargs cannot set {reserved[0]}; remove it")
    return dict(kwargs)


def _decoded(value: Any) -> Any:
    """A JSON text's value; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        return value


def _short(value: Any) -> str:
    """A value for an error message, cut to a glance."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
