"""Generated tasks, files and hub datasets as records, all at once or row by row.

`task_records` and `file_records` give lists, `task_source` and `file_source` the same records to be streamed
(`data.streams`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from data.adapters import adapted, adapter_for, resolve_adapter
from data.files import Row, all_rows, check_size, open_shards
from data.records import Record, check_found, check_names, parse_row
from data.tasks import Split, TaskItem, get_task

PEEK = 1000  # rows in which a renamed column must be found


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that are read part by part, and what makes a record of a row. Reading a row parses nothing."""

    name: str  # for people
    parts: tuple[Any, ...]
    read: Callable[[Any], Iterator[Any]]  # a part's rows, in order; picklable
    record: Callable[[Any], Record]


def task_records(task: str, levels: Sequence[int], split: Split, size: int, seed: int) -> list[Record]:
    """`size` generated problems; the levels take turns, so each gives size / len(levels), the first ones the rest.

    Raises:
        ValueError: unknown task, level or split, no or repeated levels, too few distinct evaluation problems.
    """
    family = _family(task, levels)
    records: list[Record | None] = [None] * size
    for turn, level in enumerate(levels):
        places = range(turn, size, len(levels))
        for index, (place, item) in enumerate(zip(places, family.items(level, split, len(places), seed), strict=True)):
            records[place] = _task_record(item, f"{task}/{level}/{split}/{seed}/{index}", split)
    return [record for record in records if record is not None]


def task_source(task: str, levels: Sequence[int], split: Split, size: int, seed: int) -> Source:
    """The records of `task_records`, each generated when it is asked for.

    Evaluation problems are generated at once, because they have to differ from each other.

    Raises:
        ValueError: see `task_records`.
    """
    if split != "train":
        records = task_records(task, levels, split, size, seed)
        return Source(task, (range(size),), iter, records.__getitem__)
    family = _family(task, levels)
    for level in levels:
        family.items(level, split, 0, seed)  # refuses unknown levels now and not in the middle of a run

    def record(place: int) -> Record:
        index, turn = divmod(place, len(levels))
        item = family.item(levels[turn], split, index, seed)
        return _task_record(item, f"{task}/{levels[turn]}/{split}/{seed}/{index}", split)

    return Source(task, (range(size),), iter, record)


def _family(task: str, levels: Sequence[int]) -> Any:
    if not levels or len(set(levels)) < len(levels):
        raise ValueError(f"levels of task {task!r} must be one or more different levels, got {list(levels)}")
    return get_task(task)


def _task_record(item: TaskItem, name: str, split: Split) -> Record:
    messages = ({"role": "user", "content": item.prompt},)
    return Record(name, messages, item.answer, {**item.metadata, "split": split}, item.worked)


def file_records(
    path: str,
    split: str,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    size: int | None = None,
    adapter: str | None = None,
) -> list[Record]:
    """Records of a JSONL or Parquet file, of a folder of them, or of a hub dataset. Local data never use the network.

    Args:
        path: a file, which is one split whatever its name; a folder, whose files `<split>*.jsonl` or
            `<split>*.parquet` are read; or a hub name such as "owner/name".
        split: may carry a slice, "train[:100]".
        columns: our column name -> theirs, for those that differ, e.g. {"answer": "solution"}.
        name: configuration of a hub dataset.
        size: take the first so many; None takes all.
        adapter: what turns their rows into ours (see `data.adapters`); None takes that of a known hub name, if no columns
            are mapped.

    Raises:
        ValueError: nothing there, no such split, missing columns, or a row that is no record (file and row are named).
    """
    columns = columns or {}
    check_names(columns, path)
    adapter = adapter_for(path, adapter, columns, "records")
    if adapter is not None:
        resolve_adapter(adapter, "records")
    rows: Sequence[Row] = all_rows(path, split, name)
    if adapter is not None:
        rows = list(islice(adapted(iter(rows), adapter, "records"), size))
        if not rows:
            raise ValueError(f"{path!r}: adapter {adapter} leaves every row out; choose another split or adapter")
    check_size(path, len(rows), size)
    _check_columns(columns, iter(rows), path)
    return [_file_record(columns, split, row) for row in rows[:size]]


def file_source(
    path: str,
    split: str,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    size: int | None = None,
    adapter: str | None = None,
) -> Source:
    """The records of `file_records`, read row by row; `split` may carry a slice of row numbers only.

    The rows of a hub dataset of several shards have their shard in their id.

    Raises:
        ValueError: see `file_records`; a row that is no record is found when its turn comes.
    """
    columns = columns or {}
    check_names(columns, path)
    adapter = adapter_for(path, adapter, columns, "records")
    if adapter is not None:
        resolve_adapter(adapter, "records")
        if size is not None:
            raise ValueError(
                f"size={size} of {path!r}, streamed through adapter {adapter}: rows may be left out, so they are not counted; "
                f"give a split like train[:{size}], which counts rows"
            )
    shards = open_shards(path, split, name, size)
    if next(shards.rows(), None) is None:
        raise ValueError(f"{path!r} is empty; write at least one record to it")
    _check_columns(columns, shards.rows(), path)
    read = shards.read if adapter is None else partial(_read_adapted, shards.read, adapter)
    return Source(path, shards.parts, read, partial(_file_record, columns, split))


def _read_adapted(read: Callable[[Any], Iterator[Row]], adapter: str, part: Any) -> Iterator[Row]:
    return adapted(read(part), adapter, "records")


def _check_columns(columns: Mapping[str, str], rows: Iterator[Row], path: str) -> None:
    """A renamed column that is in none of the first rows is a misspelt one."""
    if not columns:
        return
    found: dict[str, None] = {}
    count = 0
    for row in islice(rows, PEEK):
        values = row.columns()
        found.update(dict.fromkeys(values) if isinstance(values, Mapping) else {})
        count += 1
    check_found(columns, found, path, count)


def _file_record(columns: Mapping[str, str], split: str, row: Row) -> Record:
    return parse_row(row.columns(), columns, row.place, f"{row.source}/{split}/{row.index}")
