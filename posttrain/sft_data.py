"""Chats to packed rows of token ids and labels, and rows to batches.

    chat -> tokenize_chat -> dropped, truncated or kept -> best-fit packing -> Rows (the collator)

A packed row holds several samples that cannot see each other: their position ids restart, and no attention mask is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data.loss_mask import tokenize_chat
from data.records import Record
from posttrain.errors import RunStopped
from posttrain.sft_recipe import LossOn, TooLong

IGNORED = -100  # the label of a token without loss
STREAM_WINDOW = 1024  # chats of a stream that are packed together


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of the chats. `capacity` is rows x max_length tokens."""

    chats: int = 0
    kept: int = 0
    too_long: int = 0  # left out for their length
    truncated: int = 0
    untrained: int = 0  # left out because no token of theirs has loss
    duplicates: int = 0
    contaminated: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    capacity: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    @property
    def fill(self) -> float:
        """Share of the rows that is not padding, 0 to 1."""
        return self.tokens / self.capacity if self.capacity else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fill": self.fill}


@dataclass(frozen=True, slots=True)
class RowMaker:
    """How chats become rows: the SFT recipe's `training` and `preparation`, and the tokenizer."""

    tokenizer: Any
    max_length: int
    packing: bool
    loss_on: LossOn
    too_long: TooLong

    def rows(self, chats: Iterable[Record]) -> tuple[list[dict[str, Any]], RowCounts]:
        """Tokenize and pack.

        Returns:
            Rows of `input_ids`, `labels` (the token itself where it has loss, else -100) and, when packed, `seq_lengths`.

        Raises:
            RunStopped: a chat is too long and `too_long` is "error".
        """
        samples, counts = [], RowCounts()
        for chat in chats:
            sample, count = self._sample(chat)
            counts += count
            if sample is not None:
                samples.append(sample)
        if not samples:
            return [], counts
        rows: Any = samples
        if self.packing:
            rows = pack_dataset(Dataset.from_list(samples), self.max_length, "bfd").to_list()
        return rows, replace(counts, rows=len(rows), capacity=len(rows) * self.max_length)

    def _sample(self, chat: Record) -> tuple[dict[str, list[int]] | None, RowCounts]:
        try:
            encoded = tokenize_chat(
                self.tokenizer,
                chat.messages,
                loss_on=self.loss_on,
                tools=chat.tools,
                template_kwargs=chat.template_kwargs,
            )
        except ValueError as error:
            raise ValueError(f"{chat.label}: {error}") from error
        ids, mask = encoded.ids, encoded.mask
        truncated = len(ids) > self.max_length
        if truncated and self.too_long == "error":
            raise RunStopped(
                f"chat {chat.id} has {len(ids)} tokens and training.max_length is {self.max_length}; raise it, or set "
                f"preparation.too_long to drop or truncate"
            )
        if truncated and self.too_long == "drop":
            return None, RowCounts(chats=1, too_long=1)
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        # Nothing predicts the first token of a sample.
        labels = [
            token if train and place else IGNORED for place, (token, train) in enumerate(zip(ids, mask, strict=True))
        ]
        trained = sum(label != IGNORED for label in labels)
        if not trained:
            return None, RowCounts(chats=1, truncated=int(truncated), untrained=1)
        counts = RowCounts(chats=1, kept=1, truncated=int(truncated), tokens=len(ids), trained_tokens=trained)
        return {"input_ids": list(ids), "labels": labels}, counts


def require_rows(rows: Sequence[Any], counts: RowCounts) -> None:
    """Refuse to train on nothing.

    Raises:
        RunStopped: no row.
    """
    if not rows:
        raise RunStopped(
            f"no chat to train on: of {counts.chats}, {counts.too_long} are longer than training.max_length, and "
            f"{counts.untrained} have no token with loss; raise training.max_length, or look at the chat template and "
            f"training.loss_on"
        )


class Rows(DataCollatorForLanguageModeling):
    """Rows side by side, [rows, tokens]; packed samples are told apart by position ids that restart.

    TRL's own collator lays packed rows end to end, which makes attention quadratic in the whole batch where no variable
    length kernel is at hand. There is no attention mask: with one, transformers would let packed samples see each other.
    """

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id=pad_token_id, return_position_ids=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]
        # The first token of a sample is predicted from the sample before it: not a loss anyone wants.
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch["row_lengths"] = lengths
        return batch


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a stream: the window to begin with, and how many of its rows were used already."""

    chats: int = 0  # chats before the window
    rows: int = 0  # rows before the window


class PackedStream:
    """Rows without end, made while training: windows of chats, each packed by itself.

    Whatever the stream's place, the rows from there on depend on the chats alone, so a run that goes on from a cursor
    sees exactly the rows it would have seen.
    """

    def __init__(
        self, open_chats: Callable[[int], Iterator[Record]], maker: RowMaker, *, window: int = STREAM_WINDOW
    ) -> None:
        """
        Args:
            open_chats: given n, the chats from the n-th on, without end.
            maker: of rows.
            window: chats packed together.
        """
        self.open_chats = open_chats
        self._maker = maker
        self._window = window
        self._start = Cursor()
        self._start_rows = 0
        self._cursors = [self._start]
        self.counts = RowCounts()

    def dataset(self) -> IterableDataset:
        """The rows as a dataset that a trainer takes; each iteration begins at the start."""
        return IterableDataset.from_generator(lambda: iter(self))

    def start_at(self, cursor: Cursor, rows: int) -> None:
        """Go on after `rows` rows; `cursor` is what `cursor_at(rows)` gave."""
        self._start, self._start_rows = cursor, rows
        self._cursors = [cursor]

    def cursor_at(self, rows: int) -> Cursor:
        """The last window that began with no more than `rows` rows before it."""
        return max((cursor for cursor in self._cursors if cursor.rows <= rows), key=lambda cursor: cursor.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        cursor = self._start
        self._cursors, self.counts = [cursor], RowCounts()
        used = self._start_rows - cursor.rows
        chats = self.open_chats(cursor.chats)
        while window := list(islice(chats, self._window)):
            rows, counts = self._maker.rows(window)
            self.counts += counts
            if self.counts.chats >= 2 * self._window:
                require_rows(range(self.counts.rows), self.counts)
            yield from rows[used:]
            used = 0
            cursor = Cursor(cursor.chats + len(window), cursor.rows + len(rows))
            self._cursors.append(cursor)
