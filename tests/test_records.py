"""A recipe's datasets as chats: cleaned, mixed, streamed, split; and what the report says of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean import chat_key
from data.records import Record
from posttrain.records import evaluation_records, load_chats, load_records, stream_chats, validation_split
from posttrain.sections import DatasetSection
from posttrain.sft_recipe import PreparationSection


def chats(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "completion": f"{text}!"}) + "\n" for text in texts))
    return str(path)


def texts(records: list[Record]) -> list[str]:
    return [record.messages[0]["content"] for record in records]


def preparation(**keys: Any) -> PreparationSection:
    return PreparationSection.model_validate(keys)


def test_without_weights_everything_is_used(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", [f"a{n}" for n in range(20)])
    sections = (DatasetSection(path=path), DatasetSection(task="products", levels=(1, 2), size=60))
    prepared = load_chats(sections, seed=0)
    assert all(record.is_chat for record in prepared.records)
    assert prepared.report == json.loads(json.dumps(prepared.report))
    assert prepared.report == {
        "chats": 80,
        "sources": [
            row(path, loaded=20, weight=0.25, used=20, share=0.25),
            row("products [1, 2]", loaded=60, weight=0.75, used=60, share=0.75),
        ],
        "duplicates": 0,
        "contaminated": 0,
        "examples": {},
    }
    assert load_chats(sections, seed=0) == prepared
    assert load_chats(sections, seed=1).records != prepared.records


def row(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "duplicates": 0, "contaminated": 0, "unused": 0, **values}


def test_what_weights_and_temperature_leave_unused_is_reported(tmp_path: Path) -> None:
    big, small = (chats(tmp_path / f"{n}.jsonl", [f"{n}/{k}" for k in range(n)]) for n in (1600, 100))
    weighted = (DatasetSection(path=big, weight=1), DatasetSection(path=small, weight=3))
    counts = [(r["weight"], r["used"], r["unused"]) for r in load_chats(weighted, seed=0).report["sources"]]
    assert counts == [(0.25, pytest.approx(33, abs=2), pytest.approx(1567, abs=2)), (0.75, 100, 0)]
    plain = (DatasetSection(path=big), DatasetSection(path=small))
    prepared = load_chats(plain, 0, preparation(mixture_temperature=2))  # square roots: 40 to 10
    first, second = prepared.report["sources"]
    assert (first["weight"], second["weight"]) == (0.8, 0.2)
    assert (first["used"], second["used"]) == (pytest.approx(400, abs=5), 100)
    assert first["used"] + first["unused"] == 1600
    assert first["share"] == pytest.approx(0.8, abs=0.01)
    assert prepared.report["chats"] == len(prepared.records) == first["used"] + 100


def test_cleaning(tmp_path: Path) -> None:
    one = chats(tmp_path / "one.jsonl", ["a", "b", "A", "e in sleepless"])
    two = chats(tmp_path / "two.jsonl", ["B", "c", "d"])
    (tmp_path / "test").mkdir()
    chats(tmp_path / "test" / "test-0.jsonl", ["E in sleepless?"])
    sections = (DatasetSection(path=one), DatasetSection(path=two))
    clean = preparation(deduplicate=True, decontamination={"datasets": [{"path": str(tmp_path / "test")}]})
    prepared = load_chats(sections, 0, clean)
    assert sorted(texts(prepared.records)) == ["a", "b", "c", "d"]
    assert prepared.report["sources"] == [
        row(one, loaded=4, duplicates=1, contaminated=1, weight=0.5, used=2, share=0.5),
        row(two, loaded=3, duplicates=1, weight=0.5, used=2, share=0.5),
    ]
    assert (prepared.report["duplicates"], prepared.report["contaminated"]) == (2, 1)
    assert prepared.report["examples"] == {
        "duplicates": [
            {"id": f"{one}/train/2", "text": "A", "problem": None},
            {"id": f"{two}/train/0", "text": "B", "problem": None},
        ],
        "contaminated": [
            {"id": f"{one}/train/3", "text": "e in sleepless", "problem": f"{tmp_path}/test/test-0.jsonl/test/0"}
        ],
    }
    json.dumps(prepared.report)
    with pytest.raises(ValueError, match=r"nothing to train on is left of .*bad.jsonl.*'contaminated': 1"):
        load_chats((DatasetSection(path=chats(tmp_path / "bad.jsonl", ["e in sleepless?"])),), 0, clean)


def test_generated_tasks_are_clean_of_their_evaluation() -> None:
    """The split rule keeps them apart; decontamination must not take training problems for evaluation problems."""
    train = DatasetSection(task="letter_counting", levels=(1, 2), size=300)
    held_out = {"task": "letter_counting", "levels": [1, 2], "size": 100}
    clean = preparation(decontamination={"datasets": [held_out]})
    assert load_chats((train,), 0, clean).report["contaminated"] == 0
    leak = DatasetSection(task="letter_counting", levels=(1, 2), size=100, split="eval")
    with pytest.raises(ValueError, match=r"nothing to train on is left of letter_counting \[1, 2\]"):
        load_chats((leak,), 1234, clean)  # the seed of evaluations
    [section] = clean.decontamination.datasets if clean.decontamination else ()
    assert {r.metadata["split"] for r in evaluation_records([section], 0)} == {"eval"}


def test_one_row_in_two_sources_is_refused(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is in two of the datasets"):
        load_chats((DatasetSection(path=path), DatasetSection(path=path)), 0)


def test_validation_chats_come_from_the_evaluation_split(tmp_path: Path) -> None:
    chats(tmp_path / "train.jsonl", ["a"])
    chats(tmp_path / "test.jsonl", ["b"])
    sections = (DatasetSection(path=str(tmp_path)), DatasetSection(task="products", levels=(2,), size=5))
    found = load_chats(sections, 0, split="eval").records
    assert "b" in texts(found) and "a" not in texts(found)
    assert {record.metadata.get("split") for record in found} == {None, "eval"}
    assert all(record.is_chat for record in found)


def test_records_of_all_sources_for_rl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "1", "answer": 1}\n{"prompt": "2", "answer": 2}\n')
    sections = (DatasetSection(path=str(tmp_path / "a.jsonl")), DatasetSection(task="products", size=4))
    found = load_records(sections, "train", 0)
    assert Counter(record.is_chat for record in found) == {False: 6}


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streamed_chats_are_those_that_are_loaded(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", [f"a{n}" for n in range(6)])
    task = DatasetSection(task="products", levels=(1, 2), size=30, worked_fraction=0.5, weight=5)
    sections = (DatasetSection(path=path, weight=1), task)
    loaded = {record.id: record for record in load_chats(sections, seed=3).records}
    streamed = list(islice(stream_chats(sections, seed=3), 36))
    assert sum(record.id in loaded for record in streamed) >= 34  # the list ends at the first source's end
    assert all(loaded[record.id] == record for record in streamed if record.id in loaded)
    assert {"<think></think>" in record.messages[-1]["content"] for record in streamed if record.answer} == {
        True,
        False,
    }


def test_streamed_chats_are_cleaned_and_go_on_anywhere(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", ["a", "b", "A", "c", "e in sleepless?"])
    other = chats(tmp_path / "b.jsonl", ["B", "d"])
    test = chats(tmp_path / "test.jsonl", ["E in sleepless"])
    sections = (DatasetSection(path=path, weight=2), DatasetSection(path=other, weight=1))
    clean = preparation(streaming=True, deduplicate=True, decontamination={"datasets": [{"path": test}]})
    stream = stream_chats(sections, 0, clean)
    whole = list(islice(stream, 40))
    assert {text.lower() for text in texts(whole)} == set("abcd")
    report = stream.report()
    assert (report["duplicates"], report["contaminated"]) == (2, 1)
    assert report["examples"]["contaminated"][0]["problem"] == f"{test}/test/0"
    for skip in range(25):
        assert list(islice(stream_chats(sections, 0, clean, skip), 15)) == whole[skip : skip + 15]
        plain = list(islice(stream_chats(sections, 0), 40))
        assert list(islice(stream_chats(sections, 0, skip=skip), 15)) == plain[skip : skip + 15]


def test_streams_of_several_sources_need_weights(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", ["a"])
    sections = (DatasetSection(path=path), DatasetSection(task="products", size=4))
    with pytest.raises(ValueError, match="give each one a weight"):
        stream_chats(sections, 0)
    assert len(list(islice(stream_chats(sections[:1], 0), 3))) == 3


# --- the validation split ---------------------------------------------------------------------------------------------


def records(names: list[str]) -> list[Record]:
    turns = ("user", "assistant")
    return [Record(str(n), tuple({"role": role, "content": name} for role in turns)) for n, name in enumerate(names)]


def test_the_split_is_about_the_fraction_and_depends_on_the_seed() -> None:
    made = records([str(n) for n in range(4000)])
    train, held_out = validation_split(made, 0.1, seed=0)
    assert 343 < len(held_out) < 457  # 400 expected, deviation 19
    assert len(train) + len(held_out) == 4000
    other = validation_split(made, 0.1, seed=1)[1]
    both = {record.id for record in held_out} & {record.id for record in other}
    assert 20 < len(both) < 60  # 40 expected by chance


@given(st.permutations(list(range(60))), st.integers(0, 3), st.integers(10, 60))
@settings(deadline=None)
def test_a_chat_stays_on_its_side(order: list[int], seed: int, count: int) -> None:
    names = [f"chat {n // 3}" + " " * (n % 3) for n in range(60)]  # threes that are equal but for spaces
    made = records(names)
    held_out = {record.id for record in validation_split(made, 0.4, seed)[1]}
    train, again = validation_split([made[n] for n in order], 0.4, seed)
    assert {record.id for record in again} == held_out
    assert [record.id for record in train] == [str(n) for n in order if str(n) not in held_out]
    assert not {chat_key(record) for record in train} & {chat_key(record) for record in again}
    part = [record for record in made[:count] if record.id in held_out]
    if 0 < len(part) < count:
        assert validation_split(made[:count], 0.4, seed)[1] == part  # whatever else there is


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction 0.01 of 3 chats leaves 3 to train on and 0 held out"):
        validation_split(records(["a", "b", "c"]), 0.01, 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        validation_split(records(["a"]), 1.0, 0)
