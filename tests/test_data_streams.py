"""Records without end: every epoch whole, the order fixed by the seed, going on exactly where one left off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data.clean import Deduplicator
from data.records import Record
from data.sources import Source, file_records, file_source, task_records, task_source
from data.streams import shuffled, stream_records

ROOT = Path(__file__).parent.parent


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "answer": text}) + "\n" for text in texts))
    return str(path)


def parquet(path: Path, texts: list[str]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "answer": texts}), path, row_group_size=4)
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """7 rows in one JSONL file, 11 in three Parquet files, 5 generated problems."""
    (tmp_path / "folder").mkdir()
    for number, texts in enumerate((["p0", "p1", "p2", "p3"], ["p4"], ["p5", "p6", "p7", "p8", "p9", "p10"])):
        parquet(tmp_path / "folder" / f"train-{number}.parquet", texts)
    return [
        file_source(lines(tmp_path / "a.jsonl", [f"a{n}" for n in range(7)]), "train"),
        file_source(str(tmp_path / "folder"), "train"),
        task_source("products", [1, 2], "train", 5, seed=0),
    ]


def ids(records: Iterator[Record], count: int) -> list[str]:
    return [record.id for record in islice(records, count)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_epoch_holds_every_record_once_and_the_next_has_another_order(sources: list[Source], number: int) -> None:
    size = (7, 11, 5)[number]
    stream = stream_records([sources[number]], [1.0], seed=1, buffer=4)
    epochs = [ids(stream, size) for _ in range(4)]
    assert all(len(set(epoch)) == size and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert ids(stream_records([sources[number]], [1.0], seed=2, buffer=4), size) != epochs[0]


def test_streamed_records_are_those_of_the_lists(sources: list[Source], tmp_path: Path) -> None:
    def epoch(source: Source, size: int) -> list[Record]:
        return sorted(islice(stream_records([source], [1.0], seed=0), size), key=lambda record: record.id)

    def listed(records: list[Record]) -> list[Record]:
        return sorted(records, key=lambda record: record.id)

    assert epoch(sources[0], 7) == listed(file_records(str(tmp_path / "a.jsonl"), "train"))
    assert epoch(sources[1], 11) == listed(file_records(str(tmp_path / "folder"), "train"))
    assert epoch(sources[2], 5) == listed(task_records("products", [1, 2], "train", 5, seed=0))
    assert epoch(task_source("products", [2], "eval", 9, 0), 9) == listed(task_records("products", [2], "eval", 9, 0))


def test_every_place_can_be_gone_on_from(sources: list[Source]) -> None:
    weights = [3.0, 1.0, 2.0]
    whole = list(islice(stream_records(sources, weights, seed=4, buffer=3), 80))
    assert [record.id.startswith("products") for record in whole].count(True) == pytest.approx(80 / 3, abs=4)
    for skip in [*range(31), 47, 60]:
        rest = stream_records(sources, weights, seed=4, skip=skip, buffer=3)
        assert list(islice(rest, 20)) == whole[skip : skip + 20], skip


def test_skipping_parses_nothing(sources: list[Source]) -> None:
    parsed: list[Any] = []

    def counted(source: Source) -> Source:
        def record(row: Any) -> Record:
            parsed.append(row)
            return source.record(row)

        return replace(source, record=record)

    stream = stream_records([counted(source) for source in sources], [1.0, 1.0, 1.0], seed=0, skip=1000)
    assert len(list(islice(stream, 5))) == len(parsed) == 5


def test_a_stream_reads_no_more_than_its_buffer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = Source("numbers", (0,), LoggedRows(log), lambda row: Record(str(row), ({"role": "user", "content": "x"},)))
    stream = stream_records([source], [1.0], seed=0, buffer=50)
    seen = ids(stream, 1)
    assert log.stat().st_size == 50  # of a million rows
    seen += ids(stream, 199)
    assert log.stat().st_size <= 250
    assert len(set(seen)) == 200 and max(map(int, seen)) < 250
    assert seen != sorted(seen, key=int)


class LoggedRows:
    """A million rows; each one read leaves a byte in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, _part: int) -> Iterator[int]:
        for n in range(1_000_000):
            with self.log.open("a") as log:
                log.write(".")
            yield n


def test_another_process_gives_the_same_order(sources: list[Source], tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from itertools import islice\n"
        "from data.sources import file_source, task_source\n"
        "from data.streams import stream_records\n"
        "a, folder = sys.argv[2:]\n"
        "sources = [file_source(a, 'train'), file_source(folder, 'train'), task_source('products', [1, 2], 'train', 5, 0)]\n"
        "print(*[r.id for r in islice(stream_records(sources, [1, 1, 1], 9, buffer=4), 60)], sep='\\n')\n"
    )
    arguments = [str(ROOT), str(tmp_path / "a.jsonl"), str(tmp_path / "folder")]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.split() == ids(stream_records(sources, [1, 1, 1], 9, buffer=4), 60)


def test_what_is_left_out_stays_out_and_its_twin_stays_in(tmp_path: Path) -> None:
    one = file_source(lines(tmp_path / "one.jsonl", ["a", "b", "A", "c"]), "train")  # "A" repeats "a"
    two = file_source(lines(tmp_path / "two.jsonl", ["d", "B", "e"]), "train")  # "B" repeats "b" of the other

    def open_stream(skip: int) -> tuple[Iterator[Record], Deduplicator]:
        judge = Deduplicator()
        return stream_records([one, two], [2.0, 1.0], seed=3, keep=judge.keeps, skip=skip), judge

    stream, judge = open_stream(0)
    whole = list(islice(stream, 120))
    texts = Counter(record.messages[0]["content"].lower() for record in whole)
    assert set(texts) == set("abcde")
    assert len({record.id for record in whole}) == 5  # of each pair always the same one
    assert (judge.report().kept, judge.report().dropped) == (5, 2)
    from_two = sum("two.jsonl" in record.id for record in whole)
    assert from_two == pytest.approx(40, abs=2)  # the weights hold for what is kept
    for skip in (1, 4, 5, 9, 50, 99):
        rest, judge = open_stream(skip)
        assert list(islice(rest, 20)) == whole[skip : skip + 20], skip
        assert judge.report().dropped == 2 or skip < 9


def test_cleaning_that_refuses_nothing_changes_nothing(sources: list[Source]) -> None:
    plain = list(islice(stream_records(sources, [1.0, 2.0, 1.0], seed=3, buffer=4), 50))
    for skip in (0, 13):
        kept = stream_records(sources, [1.0, 2.0, 1.0], seed=3, keep=lambda _: True, skip=skip, buffer=4)
        assert list(islice(kept, 20)) == plain[skip : skip + 20]


def test_a_stream_that_has_nothing_says_so(tmp_path: Path) -> None:
    source = file_source(lines(tmp_path / "a.jsonl", ["a", "b"]), "train")
    with pytest.raises(ValueError, match=r"a.jsonl' has no record that is not left out"):
        next(stream_records([source], [1.0], 0, keep=lambda _: False))
    empty = Source("nothing", (), iter, lambda row: row)
    for skip in (0, 3):
        with pytest.raises(ValueError, match="'nothing' has no record"):
            next(stream_records([empty], [1.0], 0, skip=skip))
    with pytest.raises(ValueError, match="a weight for each"):
        stream_records([source], [], 0)


def test_slices_and_sizes_of_a_stream(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [str(n) for n in range(10)])

    def epoch(split: str, size: int | None = None) -> str:
        rows = shuffled(file_source(path, split, size=size), 0, 0)
        return "".join(sorted(json.loads(row.value)["prompt"] for row in rows))

    assert [epoch("train[2:5]"), epoch("train[7:]"), epoch("train[:3]")] == ["234", "789", "012"]
    assert [epoch("train", 4), epoch("train[6:]", 2), epoch("train[2:5]", 3)] == ["0123", "67", "234"]
    with pytest.raises(ValueError, match=r"has 10 records, fewer than size 11; lower size"):
        epoch("train", 11)
    with pytest.raises(ValueError, match=r"has 3 records, fewer than size 4; lower size"):
        epoch("train[2:5]", 4)
    for split in ("train[:10%]", "train[-3:]", "a+b"):
        with pytest.raises(ValueError, match=r"cannot be streamed: its rows are not counted; write it like train or"):
            epoch(split)


def test_errors_of_streams_name_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: prompt must be a list .* or a text, not 3"):
        ids(stream_records([file_source(str(tmp_path / "a.jsonl"), "train")], [1.0], 0), 2)
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n{"prom')
    with pytest.raises(ValueError, match=r"b.jsonl, line 2: not JSON"):
        ids(stream_records([file_source(str(tmp_path / "b.jsonl"), "train")], [1.0], 0), 2)
    (tmp_path / "c.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(
        ValueError, match=r"c.json is one JSON array, which cannot be streamed; write one object per line"
    ):
        file_source(str(tmp_path / "c.json"), "train")
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"d.jsonl' is empty"):
        file_source(str(tmp_path / "d.jsonl"), "train")
    with pytest.raises(ValueError, match=r"no column 'ask' \(wanted as prompt\) in its first 2 rows"):
        file_source(str(tmp_path / "a.jsonl"), "train", {"prompt": "ask"})
    with pytest.raises(ValueError, match="has no level 9"):
        task_source("products", [9], "train", 3, 0)


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader of `datasets` reads the files; only where they come from is another place."""
    import datasets

    files = [parquet(tmp_path / f"{n}.parquet", [f"{n}-{k}" for k in range(3)]) for n in range(2)]
    real = datasets.load_dataset

    def local(path: str, name: str | None, *, split: str, streaming: bool, revision: str | None) -> Any:
        assert (path, name, revision) == ("owner/name", "main", None)
        cache = str(tmp_path / "cache")
        return real("parquet", data_files={"train": files}, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr("datasets.load_dataset", local)
    eager = file_records("owner/name", "train[:4]", name="main")
    assert [(r.id, r.answer) for r in eager] == [
        (f"owner/name/train[:4]/{n}", text) for n, text in enumerate(("0-0", "0-1", "0-2", "1-0"))
    ]
    assert eager[2].place == "owner/name, row 2"
    source = file_source("owner/name", "train", name="main")
    whole = list(islice(stream_records([source], [1.0], 0, buffer=2), 18))
    assert {r.id: r.answer for r in whole} == {
        f"owner/name/shard-{n}/train/{k}": f"{n}-{k}" for n in range(2) for k in range(3)
    }
    for skip in (1, 5, 6, 8):
        assert list(islice(stream_records([source], [1.0], 0, skip=skip, buffer=2), 6)) == whole[skip : skip + 6]
    part = file_source("owner/name", "train[2:]", name="main", size=2)
    assert {r.answer for r in islice(stream_records([part], [1.0], 0), 4)} == {"0-2", "1-0"}
