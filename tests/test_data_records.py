"""The columns that a row may have, and errors that name file and row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.records import Record, parse_row
from data.sources import file_records

USER = {"role": "user", "content": "4-1="}
ASSISTANT = {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"default": None}}}}}
GOOD = {"messages": [USER, ASSISTANT]}


def parse(row: Any, columns: dict[str, str] | None = None) -> Record:
    return parse_row(row, columns or {}, "chats.jsonl, line 17", "default")


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, (SYSTEM, USER, ASSISTANT)),
        ({"prompt": "4-1=", "completion": "3"}, (USER, ASSISTANT)),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, (SYSTEM, USER, ASSISTANT)),
        ({"prompt": "4-1=", "completion": [ASSISTANT, USER, ASSISTANT]}, (USER, ASSISTANT, USER, ASSISTANT)),
        ({"prompt": "4-1=", "completion": None}, (USER,)),
        ({"prompt": "4-1=", "messages": None}, (USER,)),
        ({"conversations": turns(("system", "Be brief."), ("human", "4-1="), ("gpt", "3"))}, (SYSTEM, USER, ASSISTANT)),
        ({"conversations": turns(("user", "4-1="), ("assistant", "3"))}, (USER, ASSISTANT)),
        (
            {"conversations": turns(("human", "4-1="), ("tool", "3"), ("gpt", "3"))},
            (USER, {"role": "tool", "content": "3"}, ASSISTANT),
        ),
    ],
)
def test_every_form_of_a_chat(row: dict[str, Any], messages: tuple[dict[str, str], ...]) -> None:
    record = parse(row)
    assert record.messages == messages
    assert record.is_chat == (messages[-1] == ASSISTANT)
    assert (record.id, record.place, record.metadata) == ("default", "chats.jsonl, line 17", {})


def test_a_completion_beside_other_chat_columns_is_metadata() -> None:
    assert parse({**GOOD, "completion": "x"}).metadata == {"completion": "x"}


def test_the_recipe_decides_between_several_chat_columns() -> None:
    row = {"prompt": "other", "messages": [USER, ASSISTANT], "talk": turns(("human", "4-1="))}
    assert parse(row, {"messages": "messages"}).messages == (USER, ASSISTANT)
    assert parse(row, {"messages": "messages"}).metadata == {"prompt": "other", "talk": row["talk"]}
    assert parse(row, {"conversations": "talk"}).messages == (USER,)
    assert parse({"conversations": [USER, ASSISTANT]}, {"messages": "conversations"}).messages == (USER, ASSISTANT)


def test_a_column_is_not_taken_under_its_own_name_beside_another() -> None:
    record = parse({"answer": "4-1=", "solution": "3"}, {"prompt": "answer"})
    assert (record.messages, record.answer, record.metadata) == ((USER,), None, {"solution": "3"})


def test_tools_and_template_kwargs_stay_with_the_row() -> None:
    plain = parse(GOOD)
    assert (plain.tools, plain.template_kwargs) == (None, {})
    for tools in ([TOOL], json.dumps([TOOL])):
        assert parse({**GOOD, "tools": tools}).tools == (TOOL,)
    for nothing in (None, [], "[]", ""):
        assert parse({**GOOD, "tools": nothing}).tools is None
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert parse({**GOOD, "chat_template_kwargs": kwargs}).template_kwargs == {"enable_thinking": False}
    assert parse({**GOOD, "tools": [TOOL], "source": "x"}).metadata == {"source": "x"}


def test_a_tool_call_needs_no_words() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    assert parse({"messages": [USER, call]}).messages[1] == {**call, "content": ""}
    del call["content"]
    assert parse({"messages": [USER, call]}).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([USER], "a row must be an object of columns, not [{'role'"),
        ({"question": "x"}, "needs a column messages or conversations (SFT) or prompt"),
        ({"question": "x"}, "it has question; name yours, e.g. columns: {prompt: question}"),
        ({"prompt": "x", **GOOD}, "and one only; it has prompt, messages"),
        ({"messages": "x"}, "messages must be a list of {role, content} with texts, not 'x'"),
        ({"messages": []}, "messages must be a list of {role, content} with texts, not []"),
        ({"prompt": 3}, "prompt must be a list of {role, content} with texts or a text, not 3"),
        ({"messages": [USER, "x"]}, "messages[1] must be {role, content} with texts, not 'x'"),
        ({"messages": [{"content": "x"}]}, "messages[0] must be {role, content} with texts, not {'content': 'x'}"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be a text, not None"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content must be a text, not ['x']"),
        ({"prompt": "x", "completion": 3}, "completion must be a list of {role, content} with texts or a text, not 3"),
        (
            {"prompt": "x", "completion": [USER]},
            "completion must end with the assistant's message, not with role 'user'",
        ),
        ({"conversations": "x"}, "conversations must be a list of {from, value} with texts, not 'x'"),
        ({"conversations": [USER]}, "if it has role and content, add columns: {messages: conversations}"),
        ({"conversations": turns(("bot", "x"))}, "conversations[0].from is 'bot'; it must be one of human, user, gpt,"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value must be a text, not None"),
        ({**GOOD, "tools": "add"}, "tools must be a list of JSON schemas, or its JSON text, not 'add'"),
        ({**GOOD, "tools": ["add"]}, "tools must be a list of JSON schemas, or its JSON text, not ['add']"),
        ({**GOOD, "chat_template_kwargs": 1}, "chat_template_kwargs must be an object, or its JSON text, not 1"),
        ({**GOOD, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs cannot set tokenize; remove it"),
        ({"messages": "y" * 500}, "not 'yyyyyyyyyy"),
    ],
)
def test_what_is_wrong_with_a_row(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('chats.jsonl, line 17: ')}.*{re.escape(message)}") as caught:
        parse(row)
    assert len(str(caught.value)) < 300


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 1000) -> str:
    import pyarrow
    import pyarrow.parquet

    names = {name: None for row in rows for name in row}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([names | row for row in rows]), path, row_group_size=group)
    return str(path)


BAD = {"messages": [{"role": "user", "content": None}]}


@pytest.mark.parametrize("wrong", [json.dumps(BAD), "{not json", '{"messages": 3}', "\xff"])
def test_jsonl_errors_name_file_and_line(tmp_path: Path, wrong: str) -> None:
    lines(tmp_path / "train-0.jsonl", [GOOD] * 5)
    path = tmp_path / "train-1.jsonl"
    rows = [GOOD] * 3 + [""] + [GOOD] * 12 + [wrong] + [GOOD]  # the 17th line, with a blank one before it
    path.write_bytes("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 17: "):
        file_records(str(path), "train")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 17: "):
        file_records(str(tmp_path), "train")


def test_parquet_errors_name_file_and_row(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [GOOD] * 300)
    bad = parquet(tmp_path / "train-1.parquet", [GOOD] * 16 + [BAD] + [GOOD] * 4, group=7)
    for path in (bad, str(tmp_path)):
        with pytest.raises(ValueError, match=f"^{re.escape(bad)}, row 16: messages\\[0\\].content must be a text"):
            file_records(path, "train")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"no.parquet, after 0 rows: cannot be read as Parquet"):
        file_records(str(tmp_path / "no.parquet"), "train")


def test_json_arrays_and_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([GOOD, {"prompt": "x", "completion": "y"}], indent=1))
    assert [len(record.messages) for record in file_records(str(path), "train")] == [2, 2]
    path.write_text(json.dumps([GOOD, BAD], indent=1))
    with pytest.raises(ValueError, match=r"chats.json, row 1: messages\[0\].content must be a text"):
        file_records(str(path), "train")
    path.write_text("[{},")
    with pytest.raises(ValueError, match=r"chats.json: not JSON \("):
        file_records(str(path), "train")
    lines(path, [GOOD, "{"])  # lines in a file called .json
    with pytest.raises(ValueError, match=r"chats.json, line 2: not JSON"):
        file_records(str(path), "train")


def test_sft_names_the_row_that_has_no_answer(tmp_path: Path) -> None:
    from data.answers import sft_records

    path = lines(tmp_path / "a.jsonl", [{"prompt": "1", "answer": "1", "id": "p"}, {"prompt": "2", "id": "q"}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: no assistant message, completion or answer"):
        sft_records(file_records(path, "train"), worked_fraction=1.0, seed=0)


def test_rows_do_not_mix_in_tables(tmp_path: Path) -> None:
    """A table gives each struct the keys of all rows; a record has its own only, at any depth."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    rows = [
        {"messages": [USER, call], "tools": [{"name": "add", "parameters": {"a": {"type": "number"}}}]},
        {"messages": [USER, ASSISTANT], "tools": [{"name": "sub", "parameters": {"b": {"type": "string"}}}], "x": 1},
        {"messages": [USER, {**ASSISTANT, "reasoning_content": "r"}], "chat_template_kwargs": {"thinking": True}},
    ]
    for path in (lines(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)):
        records = file_records(path, "train")
        assert [list(record.messages) for record in records] == [row["messages"] for row in rows]
        assert [record.tools for record in records] == [tuple(rows[0]["tools"]), tuple(rows[1]["tools"]), None]
        assert [record.template_kwargs for record in records] == [{}, {}, {"thinking": True}]
        assert [record.metadata for record in records] == [{}, {"x": 1}, {}]


def test_lines_keep_what_a_table_cannot(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "tools": [TOOL]},
        {**GOOD, "extra": [1, "two", None]},
        {"prompt": "x", "completion": "y", "extra": 3},
    ]
    first, second, third = file_records(lines(tmp_path / "a.jsonl", rows), "train")
    assert first.tools == (TOOL,)  # its "default": None included
    assert (second.metadata, third.metadata) == ({"extra": [1, "two", None]}, {"extra": 3})


def test_slices_and_ids(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": str(n)} for n in range(10)])

    def texts(split: str) -> str:
        return "".join(record.messages[0]["content"] for record in file_records(path, split))

    expected = {"train[:3]": "012", "train[-2:]": "89", "train[50%:]": "56789", "train[2:4]+train[8:]": "2389"}
    assert {split: texts(split) for split in expected} == expected
    assert file_records(path, "train[2:]")[0].id == f"{path}/train[2:]/2"
    with pytest.raises(ValueError, match=r"split 'train\[x\]' of .*write it like train\[:100\]"):
        file_records(path, "train[x]")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", json.dumps(GOOD)), ("b.json", json.dumps([GOOD]))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(file_records(str(tmp_path / name), "train")) == 1
