"""Records without end: sources read row by row, shuffled with a bounded buffer, blended by weight.

    stream_records([file_source("chats.jsonl", "train"), task_source(...)], weights=[3, 1], seed=0)

The order depends on the sources, the weights and the seed alone. When a source ends it begins again, in another order;
its records keep their ids. `skip` goes on after so many records without parsing the rows before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from data.mixture import turns
from data.records import Record
from data.sources import Source

BUFFER = 10_000  # rows that are shuffled at a time; their text is what a stream holds in memory


def shuffled(source: Source, seed: int, epoch: int, buffer: int = BUFFER) -> Iterator[Any]:
    """The rows of one epoch, each once: the parts in a random order, their rows shuffled within a buffer."""
    from datasets import IterableDataset

    rows = IterableDataset.from_generator(_rows, gen_kwargs={"parts": list(source.parts), "read": source.read})
    # One part feeds the buffer at a time: several are read by threads, at ten times the cost for a row.
    rows = rows.shuffle(seed=seed, buffer_size=buffer, max_buffer_input_shards=1)
    rows.set_epoch(epoch)
    return (example["row"] for example in rows)


def _rows(parts: Sequence[Any], read: Callable[[Any], Iterator[Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for row in read(part):
            yield {"row": row}


class EndlessSource:
    """The records of one source, epoch after epoch."""

    def __init__(
        self,
        source: Source,
        seed: int,
        *,
        keep: Callable[[Record], bool] | None = None,
        skip: int = 0,
        buffer: int = BUFFER,
    ) -> None:
        """
        Args:
            keep: asked once for each record, in the first epoch; what it refuses is left out of all epochs.
            skip: records to pass over; needs `keep` to be None, for only parsed records can be judged.

        Raises:
            ValueError: both `keep` and `skip`.
        """
        if keep is not None and skip:
            raise ValueError(f"skip={skip} would pass over records that keep has to see")
        self._source = source
        self._seed = seed
        self._keep = keep
        self._buffer = buffer
        self._left_out: set[str] = set()
        self.epoch = 0  # epochs that have ended
        self._records = self._run(skip)

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def __next__(self) -> Record:
        return next(self._records)

    def _run(self, skip: int) -> Iterator[Record]:
        rows = self._skipped(skip) if skip else self._epoch_rows()
        given = skip
        while True:
            for row in rows:
                record = self._source.record(row)
                if self._is_kept(record):
                    given += 1
                    yield record
            if not given:
                raise ValueError(f"{self._source.name!r} has no record that is not left out; a stream needs one")
            self.epoch += 1
            rows = self._epoch_rows()

    def _epoch_rows(self) -> Iterator[Any]:
        return shuffled(self._source, self._seed, self.epoch, self._buffer)

    def _skipped(self, skip: int) -> Iterator[Any]:
        """The rows of the epoch that row `skip` falls into, from that row on."""
        rows = self._epoch_rows()
        size = _pass(rows, skip)
        if size < skip:  # the first epoch is over, and so its size is known
            if not size:
                raise ValueError(f"{self._source.name!r} has no record; a stream needs one")
            self.epoch, skip = divmod(skip, size)
            rows = self._epoch_rows()
            _pass(rows, skip)
        return rows

    def _is_kept(self, record: Record) -> bool:
        if self._keep is None:
            return True
        if self.epoch:
            return record.label not in self._left_out
        if kept := self._keep(record):
            return kept
        self._left_out.add(record.label)
        return False


def _pass(rows: Iterator[Any], count: int) -> int:
    """How many of the next `count` rows there were."""
    return sum(1 for _ in islice(rows, count))


def stream_records(
    sources: Sequence[Source],
    weights: Sequence[float],
    seed: int,
    *,
    keep: Callable[[Record], bool] | None = None,
    skip: int = 0,
    buffer: int = BUFFER,
) -> Iterator[Record]:
    """Sources blended without end, in proportion to their weights (see `data.mixture.turns`).

    Args:
        keep: e.g. `data.clean.Deduplicator.keeps`; what it refuses is left out before blending, so the shares hold.
        skip: go on after so many records. Rows are read but not parsed, at most one epoch and a part of another; with
            `keep`, the records before are made and judged.
        buffer: rows of a source that are shuffled at a time.

    Raises:
        ValueError: no source, or a weight that is not positive; while iterating, a row that is no record or a source
            that has none.
    """
    if not sources or len(sources) != len(weights):
        raise ValueError(
            f"a stream needs at least one source and a weight for each; got {len(sources)}, {list(weights)}"
        )
    order = turns(weights, seed)
    passed = Counter(islice(order, skip)) if keep is None else Counter()
    endless = [
        EndlessSource(source, seed, keep=keep, skip=passed[number], buffer=buffer)
        for number, source in enumerate(sources)
    ]
    records = (next(endless[number]) for number in order)
    return records if keep is None else islice(records, skip, None)
