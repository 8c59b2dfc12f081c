"""Problems with a reference answer as finished chats, for SFT."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from data.chat import format_answer
from data.records import Record
from posttrain.types import Message


def sft_messages(record: Record, worked: bool) -> tuple[Message, ...]:
    """The chat to train on: a finished chat as it is, a problem with its worked or its direct answer.

    Raises:
        ValueError: a problem without reference answer, or `worked` for one without worked solution.
    """
    if record.is_chat:
        return record.messages
    if record.answer is None:
        raise ValueError(f"{record.label}: no assistant message, completion or answer; SFT needs one of them")
    if worked and record.worked is None:
        raise ValueError(f"{record.label}: no worked solution; add a column worked, or train on direct answers")
    content = format_answer(record.worked if worked else None, record.answer)
    return (*record.messages, {"role": "assistant", "content": content})


def sft_record(record: Record, *, worked_fraction: float, seed: int) -> Record:
    """A problem as a finished chat, with the worked solution or the direct answer; a finished chat as it is.

    A share of `worked_fraction` of the problems gets the worked solution. Which ones depends on the record's id and the
    seed alone, so it survives reordering and mixing. Problems without a worked solution get the direct answer.

    Raises:
        ValueError: a record with neither answer nor assistant message.
    """
    worked = record.worked is not None and fraction_of(f"{seed}/{record.id}") < worked_fraction
    return replace(record, messages=sft_messages(record, worked))


def sft_records(records: Sequence[Record], *, worked_fraction: float, seed: int) -> list[Record]:
    """`sft_record` of each.

    Raises:
        ValueError: `worked_fraction` outside 0..1, or a record with neither answer nor assistant message.
    """
    if not 0 <= worked_fraction <= 1:
        raise ValueError(f"worked_fraction must be between 0 and 1, got {worked_fraction}")
    return [sft_record(record, worked_fraction=worked_fraction, seed=seed) for record in records]


def fraction_of(key: str) -> float:
    """A number in [0, 1) that only depends on the text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
