"""Problems with a reference answer as finished chats, for SFT."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from data.chat import format_answer
from data.corruption import other_number
from data.records import Record
from posttrain.types import Message


def sft_messages(record: Record, worked: bool, answer: str | None = None) -> tuple[Message, ...]:
    """The chat to train on: a finished chat as it is, a problem with its worked or its direct answer.

    Args:
        record: a chat or a problem.
        worked: with the worked solution.
        answer: in place of the reference.

    Raises:
        ValueError: a problem without reference answer, or `worked` for one without worked solution.
    """
    if record.is_chat:
        return record.messages
    if record.answer is None:
        raise ValueError(f"{record.label}: no assistant message, completion or answer; SFT needs one of them")
    if worked and record.worked is None:
        raise ValueError(f"{record.label}: no worked solution; add a column worked, or train on direct answers")
    content = format_answer(record.worked if worked else None, answer or record.answer)
    return (*record.messages, {"role": "assistant", "content": content})


def sft_record(record: Record, *, worked_fraction: float, seed: int, careless_fraction: float = 0.0) -> Record:
    """A problem as a finished chat, with the worked solution or the direct answer; a finished chat as it is.

    A share of `worked_fraction` of the problems gets the worked solution. Which ones depends on the record's id and the
    seed alone, so it survives reordering and mixing. Problems without a worked solution get the direct answer, and of the
    direct answers a share of `careless_fraction` is a number nearby, as guesses are in text that nobody checked.

    Raises:
        ValueError: a record with neither answer nor assistant message, or a careless answer for one that is no whole number.
    """
    worked = record.worked is not None and fraction_of(f"{seed}/{record.id}") < worked_fraction
    guess = None
    if not worked and not record.is_chat and fraction_of(f"careless/{seed}/{record.id}") < careless_fraction:
        guess = _guess(record, seed)
    return replace(record, messages=sft_messages(record, worked, guess))


def _guess(record: Record, seed: int) -> str:
    try:
        return other_number(record.answer or "", random.Random(f"careless/{seed}/{record.id}"))
    except ValueError:
        raise ValueError(
            f"{record.label}: careless_fraction needs answers that are whole numbers, and this one is {record.answer!r}; "
            f"leave it out"
        ) from None


def sft_records(
    records: Sequence[Record], *, worked_fraction: float, seed: int, careless_fraction: float = 0.0
) -> list[Record]:
    """`sft_record` of each.

    Raises:
        ValueError: a fraction outside 0..1, or what `sft_record` raises.
    """
    for name, value in (("worked_fraction", worked_fraction), ("careless_fraction", careless_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    options = {"worked_fraction": worked_fraction, "careless_fraction": careless_fraction}
    return [sft_record(record, seed=seed, **options) for record in records]


def fraction_of(key: str) -> float:
    """A number in [0, 1) that only depends on the text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
