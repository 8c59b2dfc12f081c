"""Files and hub datasets as rows: raw, one after the other, each with its place.

A row of a JSONL file stays bytes until `Row.columns` parses it, so passing over rows costs little, and no row's columns
depend on another's. Local files are read here and not with `datasets.load_dataset`, which infers one type for a whole
file (and then fills keys that only other rows have) and names no line when it fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON: half of a pair, or a whole pair
KINDS = (".jsonl", ".json", ".parquet")
PARQUET_BATCH = 256  # rows decoded together


@dataclass(frozen=True, slots=True)
class Row:
    """One row, not yet parsed."""

    source: str  # the file as the recipe names it, or "owner/name"
    index: int  # 0, 1, ... within the source
    value: Any  # bytes of a JSONL line, else the columns
    line: int | None = None  # 1-based, of a JSONL file

    @property
    def place(self) -> str:
        """For people: "chats.jsonl, line 17" (from 1) or "chats.parquet, row 16" (from 0)."""
        return f"{self.source}, row {self.index}" if self.line is None else f"{self.source}, line {self.line}"

    def columns(self) -> Any:
        """The row parsed: column -> value.

        Raises:
            ValueError: a line that is not JSON.
        """
        if not isinstance(self.value, bytes):
            return self.value
        try:
            found = json.loads(self.value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.place}: not JSON ({_reason(error)}); write one object per line") from None
        if _SURROGATE.search(self.value):
            require_text(found, self.place)
        return found


@dataclass(frozen=True, slots=True)
class File:
    """A local file, and the name that its rows go by."""

    path: Path
    source: str


def find_files(path: str, split: str) -> list[File] | None:
    """The local files that `path` stands for, in order; None where it is a hub name.

    Args:
        path: a file, which is one split whatever its name; a folder, whose files of one kind that begin with the split's
            name are taken; or a hub name such as "owner/name".

    Raises:
        ValueError: nothing there, files of an unknown kind or of several.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        base = split.partition("[")[0]
        files = sorted(f for f in local.iterdir() if f.suffix in KINDS and f.name.startswith(base))
        if not files or len({f.suffix == ".parquet" for f in files}) > 1:
            raise ValueError(
                f"folder {path!r} must hold files of one kind named {base}*.jsonl or {base}*.parquet; "
                f"found {sorted(f.name for f in local.iterdir())[:8]}"
            )
        return [File(file, f"{path.rstrip('/')}/{file.name}") for file in files]
    if local.is_file():
        if local.suffix not in KINDS:
            raise ValueError(f"{path!r} is of an unknown kind; write it as one of {', '.join(KINDS)}")
        return [File(local, path)]
    if local.suffix in KINDS or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path):
        raise ValueError(
            f"data file {path!r} does not exist (looked in {Path.cwd()}); correct path, or create the file"
        )
    return None


def read_file(file: File) -> Iterator[Row]:
    """The rows of a local file, in order; blank lines are passed over.

    Raises:
        ValueError: not the kind of file that its name says. A JSONL line is judged only when it is parsed.
    """
    if file.path.suffix == ".parquet":
        return _parquet_rows(file)
    if file.path.suffix == ".json" and is_array(file):
        return _array_rows(file)
    return _line_rows(file)


def is_array(file: File) -> bool:
    """Whether a file is one JSON array, which has to be read whole."""
    with file.path.open("rb") as stream:
        return file.path.suffix == ".json" and stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _line_rows(file: File) -> Iterator[Row]:
    index = 0
    with file.path.open("rb") as stream:
        for line, value in enumerate(stream, 1):
            if line == 1:
                value = value.removeprefix(b"\xef\xbb\xbf")
            if value.strip():
                yield Row(file.source, index, value, line)
                index += 1


def _array_rows(file: File) -> Iterator[Row]:
    data = file.path.read_bytes()
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.source}: not JSON ({_reason(error)}); write one object per line") from None
    may_be_torn = _SURROGATE.search(data)
    for index, value in enumerate(rows):
        row = Row(file.source, index, value)
        if may_be_torn:
            require_text(value, row.place)
        yield row


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def require_text(value: Any, place: str) -> None:
    """Refuse a row with half of a surrogate pair, which JSON can write and neither tokenizers nor files can hold.

    Raises:
        ValueError: the message begins with `place`.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(f"{place}: {half!r} is half of a surrogate pair and no text; mend or remove the row") from None


def _parquet_rows(file: File) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
                for value in batch.to_pylist():
                    yield Row(file.source, index, without_none(value))
                    index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file.source}, after {index} rows: cannot be read as Parquet: {reason}") from error


def without_none(value: Any) -> Any:
    """A value without the keys that hold None: tables fill in the keys that only other rows have."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value


# --- all rows at once -------------------------------------------------------------------------------------------------


def all_rows(path: str, split: str, name: str | None, revision: str | None = None) -> Sequence[Row]:
    """Every row of a file, folder or hub dataset. `split` may carry slices, "train[:100]", "train[-10%:]".

    Args:
        path: see `find_files`.
        split: of a folder or hub dataset.
        name: configuration of a hub dataset.
        revision: of a hub dataset; None is the newest.

    Raises:
        ValueError: nothing there, no such split, or no row.
    """
    files = find_files(path, split)
    if files is None:
        dataset: Dataset = _load_from_hub(path, name, split, streaming=False, revision=revision)
        return [Row(path, index, without_none(row)) for index, row in enumerate(dataset)]
    rows = list(chain.from_iterable(map(read_file, files)))
    if not rows:
        raise ValueError(f"{path!r} is empty; write at least one record to it")
    return _sliced(rows, split, path)


def _sliced(rows: list[Row], split: str, path: str) -> list[Row]:
    if "[" not in split:
        return rows
    from datasets import ReadInstruction

    base = split.partition("[")[0]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"split {split!r} of {path!r}: {error}; write it like train[:100] or train[90%:]") from error
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _load_from_hub(path: str, name: str | None, split: str, *, streaming: bool, revision: str | None = None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{path!r} is neither a local file nor a hub dataset that can be reached; check the spelling and the "
            f"network, or give the path of a .jsonl or .parquet file ({error})"
        ) from error


# --- row by row -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shards:
    """Rows in parts that can be read one by one, each in its order: the files of a folder, the shards of a hub dataset."""

    parts: tuple[Any, ...]
    read: Callable[[Any], Iterator[Row]]  # picklable

    def rows(self) -> Iterator[Row]:
        """All rows, part after part."""
        return chain.from_iterable(map(self.read, self.parts))


def open_shards(path: str, split: str, name: str | None, size: int | None) -> Shards:
    """A file, folder or hub dataset to be read row by row, none of it held in memory.

    Args:
        split: may carry one slice of row numbers, "train[100:200]". A slice, or a size, makes one part of all.
        size: end after so many rows.

    Raises:
        ValueError: nothing there, a slice that needs the number of rows, or a JSON array.
    """
    base, start, stop = _row_numbers(split, size)
    files = find_files(path, base)
    if files is not None:
        for file in files:
            if is_array(file):
                raise ValueError(
                    f"{file.source} is one JSON array, which cannot be streamed; write one object per line"
                )
        shards = Shards(tuple(files), read_file)
    else:
        dataset: IterableDataset = _load_from_hub(path, name, base, streaming=True)
        shards = Shards(tuple(range(dataset.num_shards)), partial(_hub_rows, dataset, path))
    if start == 0 and stop is None:
        return shards
    return Shards((path,), partial(_between, shards, start, stop, size))


def _row_numbers(split: str, size: int | None) -> tuple[str, int, int | None]:
    """("train[5:20]", 10) -> ("train", 5, 15)."""
    found = re.fullmatch(r"(\w[\w.-]*)(?:\[(\d*):(\d*)\])?", split)
    if found is None:
        raise ValueError(
            f"split {split!r} cannot be streamed: its rows are not counted; write it like train or train[100:200]"
        )
    start = int(found[2] or 0)
    ends = [int(found[3])] if found[3] else []
    ends += [start + size] if size is not None else []
    return found[1], start, min(ends, default=None)


def _between(shards: Shards, start: int, stop: int | None, size: int | None, path: str) -> Iterator[Row]:
    count = 0
    for row in islice(shards.rows(), start, stop):
        yield row
        count += 1
    check_size(path, count, size)


def check_size(path: str, count: int, size: int | None) -> None:
    """Refuse a size that exceeds the records that are there.

    Raises:
        ValueError: fewer than `size` records.
    """
    if size is not None and size > count:
        raise ValueError(f"{path!r} has {count} records, fewer than size {size}; lower size")


def _hub_rows(dataset: IterableDataset, path: str, part: int) -> Iterator[Row]:
    source = path if dataset.num_shards == 1 else f"{path}/shard-{part}"
    for index, row in enumerate(dataset.shard(num_shards=dataset.num_shards, index=part)):
        yield Row(source, index, without_none(row))
