"""The journal: whatever a crash leaves of the last line, nothing that was promised is lost and nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import RunStopped
from posttrain.journal import Journal

HEADER = {"teacher": {"name": "t"}, "seed": 0}


def open_journal(path: Path, **header: object) -> Journal:
    return Journal(path, "id", {**HEADER, **header})


def test_rows_come_back_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    journal = open_journal(path)
    texts = ["plain", "two\nlines", "é 数 \U0001f600", "half \ud800", ""]
    journal.append({"id": str(number), "text": text} for number, text in enumerate(texts))
    journal.append([{"id": "1", "text": "again"}])
    journal.append([])
    journal.close()
    again = open_journal(path)
    assert list(again) == ["0", "1", "2", "3", "4"] and len(again) == 5 and "5" not in again
    assert [again.read(str(n))["text"] for n in range(5)] == ["plain", "again", *texts[2:]]
    again.append([{"id": "5", "text": "new"}])
    assert again.read("5")["text"] == "new" and again.read("0")["text"] == "plain"
    again.close()


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = open_journal(path)
    journal.append([{"id": "a", "text": "first {\\"}])
    before = path.stat().st_size
    journal.append([{"id": "b", "text": 'second "quoted" 数, } ] \ud800'}])
    journal.close()
    whole = path.read_bytes()
    for length in range(before, len(whole) + 1):
        path.write_bytes(whole[:length])
        torn = open_journal(path)
        is_whole = length >= len(whole) - 1  # all of the object is there, if not its newline
        assert list(torn) == (["a", "b"] if is_whole else ["a"]), length
        assert path.read_bytes() == (whole if is_whole else whole[:before])
        torn.append([{"id": "c", "text": "after"}])
        torn.close()
        again = open_journal(path)
        assert list(again) == (["a", "b", "c"] if is_whole else ["a", "c"])
        assert again.read("c")["text"] == "after"
        again.close()


def test_what_a_crash_cannot_have_done_is_said(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = open_journal(path)
    journal.append([{"id": "a"}, {"id": "b"}])
    with pytest.raises(RunStopped, match="written by another process"):
        open_journal(path)
    journal.close()
    with pytest.raises(RunStopped, match=r"made with seed=0, and now it is 1"):
        open_journal(path, seed=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-4] + b"\n" + lines[2])
    with pytest.raises(RunStopped, match="line 2 is damaged"):
        open_journal(path)
    path.write_bytes(b"")  # a file system that lost the content
    empty = open_journal(path)
    assert not len(empty) and json.loads(path.read_text()) == HEADER
    empty.close()
