"""Records from tasks and files, mixing, order and exact resume."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from data.answers import sft_messages, sft_records
from data.chat import build_tokenizer
from data.prompts import PromptStream, to_prompts
from data.records import Record
from data.sources import file_records, task_records

CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any use of the network fails loudly; the cache of `datasets` is thrown away."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local file reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make(count: int, prefix: str = "r") -> list[Record]:
    return [
        Record(f"{prefix}/{n}", ({"role": "user", "content": f"{n}+0="},), str(n), {}, f"{n}+0={n}")
        for n in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_task_records_take_turns_over_levels() -> None:
    records = task_records("chain_sum", [1, 3], "train", 5, seed=2)
    assert [record.metadata["level"] for record in records] == [1, 3, 1, 3, 1]
    assert [record.id for record in records[:3]] == [
        f"chain_sum/{p}" for p in ("1/train/2/0", "3/train/2/0", "1/train/2/1")
    ]
    assert records[0].metadata == {"task": "chain_sum", "level": 1, "split": "train"}
    assert records == task_records("chain_sum", [1, 3], "train", 5, seed=2)
    assert records[:3] == task_records("chain_sum", [1, 3], "train", 3, seed=2)
    assert records[0].messages != task_records("chain_sum", [1, 3], "train", 5, seed=3)[0].messages


def test_task_records_of_both_splits_share_nothing() -> None:
    train = {r.messages[0]["content"] for r in task_records("products", [1, 2, 3], "train", 900, seed=0)}
    held_out = [r.messages[0]["content"] for r in task_records("products", [2, 3], "eval", 100, seed=0)]
    assert len(set(held_out)) == 100
    assert not train & set(held_out)


def test_task_records_refuse_bad_levels() -> None:
    for levels in ([], [1, 1]):
        with pytest.raises(ValueError, match="one or more different levels"):
            task_records("chain_sum", levels, "train", 4, seed=0)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rl_files(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1=", "answer": 2, "source": "a"},
        {"prompt": "1+2=", "answer": 3, "source": None},
    ]
    path = str(tmp_path / f"problems.{kind}")
    if kind == "jsonl":
        write_jsonl(Path(path), rows)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    first, second = file_records(path, "test")
    assert first.messages == ({"role": "user", "content": "1+1="},)
    assert (first.answer, first.metadata, first.worked) == ("2", {"source": "a"}, None)
    assert second.metadata == {}
    assert first.id != second.id
    assert file_records(path, "test[1:]")[0].answer == "3"
    assert len(file_records(path, "train", size=1)) == 1


@pytest.mark.usefixtures("offline")
def test_sft_file_and_message_prompts(tmp_path: Path) -> None:
    chats = file_records(write_jsonl(tmp_path / "sft.jsonl", [{"messages": CHAT}]), "train")
    assert chats[0].messages == tuple(CHAT)
    assert chats[0].is_chat
    problems = file_records(write_jsonl(tmp_path / "rl.jsonl", [{"prompt": CHAT[:1], "answer": "2"}]), "train")
    assert problems[0].messages == (CHAT[0],)
    assert not problems[0].is_chat


@pytest.mark.usefixtures("offline")
def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1=", "solution": "2", "how": "1+1=2", "key": 7}])
    columns = {"prompt": "question", "answer": "solution", "worked": "how", "id": "key"}
    assert file_records(path, "train", columns) == [Record("7", (CHAT[0],), "2", {}, "1+1=2")]


@pytest.mark.usefixtures("offline")
def test_a_folder_gives_the_files_of_the_split(tmp_path: Path) -> None:
    for name, count in (("train-0.jsonl", 2), ("train-1.jsonl", 3), ("test.jsonl", 4)):
        write_jsonl(tmp_path / name, [{"prompt": "1"}] * count)
    assert len(file_records(str(tmp_path), "train")) == 5
    assert len(file_records(str(tmp_path), "test")) == 4
    with pytest.raises(ValueError, match=r"must hold files of one kind named validation\*.jsonl"):
        file_records(str(tmp_path), "validation")


@pytest.mark.usefixtures("offline")
def test_file_errors_say_the_cure(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"question": "1+1=", "prompt": "x"}])
    with pytest.raises(ValueError, match="does not exist .*; correct path, or create the file"):
        file_records(str(tmp_path / "nope.jsonl"), "train")
    with pytest.raises(ValueError, match="no column 'ask'.*its columns are question, prompt"):
        file_records(good, "train", {"prompt": "ask"})
    with pytest.raises(ValueError, match="unknown name 'promt'; the names are messages, conversations, prompt"):
        file_records(good, "train", {"promt": "question"})
    with pytest.raises(ValueError, match="has 1 records, fewer than size 2"):
        file_records(good, "train", size=2)
    with pytest.raises(ValueError, match="q.jsonl, line 1: needs a column messages .* prompt"):
        file_records(write_jsonl(tmp_path / "q.jsonl", [{"question": "1"}]), "train")
    with pytest.raises(ValueError, match="is empty"):
        file_records(write_jsonl(tmp_path / "empty.jsonl", []), "train")
    with pytest.raises(ValueError, match="must be a list of {role, content} with texts or a text, not 3"):
        file_records(write_jsonl(tmp_path / "n.jsonl", [{"prompt": 3}]), "train")
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match="bad.jsonl, line 1: not JSON"):
        file_records(str(tmp_path / "bad.jsonl"), "train")
    (tmp_path / "table.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="unknown kind; write it as one of .jsonl"):
        file_records(str(tmp_path / "table.csv"), "train")


def test_hub_errors_say_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def not_found(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'owner/nothing' doesn't exist")

    monkeypatch.setattr("datasets.load_dataset", not_found)
    with pytest.raises(ValueError, match="neither a local file nor a hub dataset"):
        file_records("owner/nothing", "train")


def test_sft_messages() -> None:
    record = make(1)[0]
    assert sft_messages(record, worked=True)[-1]["content"] == "<think>0+0=0</think><answer>0</answer>"
    assert sft_messages(record, worked=False)[-1] == {
        "role": "assistant",
        "content": "<think></think><answer>0</answer>",
    }
    assert sft_messages(Record("c", tuple(CHAT)), worked=True) == tuple(CHAT)
    with pytest.raises(ValueError, match="record p: no worked solution"):
        sft_messages(Record("p", (CHAT[0],), "2"), worked=True)
    with pytest.raises(ValueError, match="record p: no assistant message, completion or answer"):
        sft_messages(Record("p", (CHAT[0],)), worked=False)


def test_careless_answers_are_numbers_nearby() -> None:
    records = task_records("letter_counting", [2], "train", 400, seed=0)
    chats = sft_records(records, worked_fraction=0.5, careless_fraction=0.4, seed=0)
    wrong, direct = 0, 0
    for record, chat in zip(records, chats, strict=True):
        text = chat.messages[-1]["content"]
        number = int(text.split("<answer>")[1].split("<")[0])
        is_direct = text.startswith("<think></think>")
        direct += is_direct
        assert record.answer is not None
        if number != int(record.answer):
            wrong += 1
            assert is_direct and 1 <= abs(number - int(record.answer)) <= 3 and number >= 0
    assert wrong / direct == pytest.approx(0.4, abs=0.08)
    assert chats == sft_records(records, worked_fraction=0.5, careless_fraction=0.4, seed=0)
    with pytest.raises(
        ValueError, match=r"careless_fraction needs answers that are whole numbers, and this one is 'x'"
    ):
        sft_records([Record("r", records[0].messages, "x")], worked_fraction=0.0, careless_fraction=1.0, seed=0)


def test_worked_fraction_is_kept_and_survives_reordering() -> None:
    records = make(2000)

    def worked_ids(order: list[Record], fraction: float, seed: int = 1) -> set[str]:
        chats = sft_records(order, worked_fraction=fraction, seed=seed)
        assert all(chat.is_chat for chat in chats)
        return {chat.id for chat in chats if "<think></think>" not in chat.messages[-1]["content"]}

    assert 540 < len(worked_ids(records, 0.3)) < 660  # 600 expected, deviation 20
    assert worked_ids(records, 0.3) == worked_ids(records[::-1], 0.3)
    assert worked_ids(records, 0.3) != worked_ids(records, 0.3, seed=2)
    assert worked_ids(records, 0.3) < worked_ids(records, 0.6)
    assert (len(worked_ids(records, 0.0)), len(worked_ids(records, 1.0))) == (0, 2000)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        sft_records(records, worked_fraction=1.5, seed=0)


def test_to_prompts_keeps_order_and_content(tokenizer: Any) -> None:
    records = task_records("letter_counting", [1], "eval", 4, seed=0)
    prompts = to_prompts(records, tokenizer)
    for prompt, record in zip(prompts, records, strict=True):
        assert (prompt.id, prompt.answer, prompt.metadata) == (record.id, record.answer, record.metadata)
        expected = f"<bos><|user|>{record.messages[0]['content']}<|assistant|>"
        assert tokenizer.decode(list(prompt.token_ids)) == expected
    with pytest.raises(ValueError, match="record c ends with the assistant's message"):
        to_prompts([Record("c", tuple(CHAT))], tokenizer)
    for others in ({"tools": ({"name": "add"},)}, {"template_kwargs": {"thinking": True}}):
        with pytest.raises(ValueError, match="record p has .*, which only SFT uses; remove the column"):
            to_prompts([Record("p", (CHAT[0],), **others)], tokenizer)


def test_stream_gives_each_record_once_per_epoch_in_new_order(tokenizer: Any) -> None:
    stream = PromptStream(make(20), tokenizer, seed=3)
    epochs = [[prompt.id for prompt in stream.take(20)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(record.id for record in make(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [prompt.id for prompt in PromptStream(make(20), tokenizer, seed=3).take(20)]
    assert epochs[0] != [prompt.id for prompt in PromptStream(make(20), tokenizer, seed=4).take(20)]


@pytest.mark.parametrize("before", [0, 3, 7, 14, 23])  # 7 records: in an epoch, at its end, epochs later
def test_stream_resumes_exactly(tokenizer: Any, before: int) -> None:
    stream = PromptStream(make(7), tokenizer, seed=3)
    stream.take(before)
    state = json.loads(json.dumps(stream.state()))
    expected = stream.take(18)
    fresh = PromptStream(make(7), tokenizer, seed=3)
    fresh.take(5)
    fresh.restore(state)
    assert fresh.take(18) == expected


def test_stream_refuses_a_cursor_of_other_data(tokenizer: Any) -> None:
    state = PromptStream(make(7), tokenizer, seed=3).state()
    for other in (PromptStream(make(8), tokenizer, seed=3), PromptStream(make(7), tokenizer, seed=4)):
        with pytest.raises(ValueError, match="resume with the recipe the run was started with"):
            other.restore(state)
    with pytest.raises(ValueError, match="two records have the id 'r/0'"):
        PromptStream(make(2) + make(1), tokenizer, seed=0)
    with pytest.raises(ValueError, match="at least one record"):
        PromptStream([], tokenizer, seed=0)
