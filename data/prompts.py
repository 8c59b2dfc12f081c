"""Problems as prompts: in evaluation order, or shuffled without end and with an exact cursor."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.chat import render_prompt
from data.mixture import check_unique
from data.records import Record
from posttrain.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def to_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A problem rendered to tokens.

    Raises:
        ValueError: the record is a finished chat, or has tools or template options, which prompts do not have.
    """
    if record.is_chat:
        raise ValueError(f"{record.label} ends with the assistant's message; a prompt must end with the user's")
    if record.tools or record.template_kwargs:
        column = "tools" if record.tools else "chat_template_kwargs"
        raise ValueError(f"{record.label} has {column}, which only SFT uses; remove the column")
    try:
        ids = render_prompt(tokenizer, record.messages)
    except ValueError as error:
        raise ValueError(f"{record.label}: {error}") from error
    return Prompt(record.id, record.messages, ids, record.answer, record.metadata)


def to_prompts(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
    """The problems rendered to tokens, in their order. Raises ValueError on a finished chat."""
    return tuple(to_prompt(record, tokenizer) for record in records)


class PromptStream:
    """Prompts without end: each epoch is a new shuffle of all records, the same for the same seed.

    `state()` is a small JSON-able cursor; a stream over the same records that restores it goes on with exactly the
    prompts that would have come next.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        is_wanted: Callable[[str], bool] | None = None,
        by_level: bool = False,
    ) -> None:
        """
        Args:
            records: the problems.
            tokenizer: renders them.
            seed: of the shuffles.
            is_wanted: asked with a record's id whenever its turn comes; others are passed over.
            by_level: each epoch goes from the lowest `level` in the records' metadata to the highest, shuffled within one.

        Raises:
            ValueError: there is no record, two share an id, or one lacks the level that is asked for.
        """
        if not records:
            raise ValueError("a prompt stream needs at least one record; got none")
        check_unique(records)
        self._records = tuple(records)
        self._tokenizer = tokenizer
        self._seed = seed
        self._is_wanted = is_wanted
        self._by_level = by_level
        unlevelled = [record.label for record in records if by_level and "level" not in record.metadata]
        if unlevelled:
            raise ValueError(f"{unlevelled[0]} has no `level` to order it by; add that column, or leave the order out")
        contents = "\n".join(f"{record.id}\t{record.messages[-1]['content']}" for record in records)
        self._fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self._epoch = 0
        self._position = 0  # records of this epoch already given out
        self._returned: list[str] = []  # ids to give out first
        self._order = self._shuffled()

    def take(self, n: int) -> tuple[Prompt, ...]:
        """The next `n` prompts. Within an epoch all are different; ids repeat from one epoch to the next.

        Raises:
            ValueError: n is negative, or no record is wanted any more.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        return tuple(to_prompt(self._next(), self._tokenizer) for _ in range(n))

    def state(self, unused: Sequence[str] = ()) -> dict[str, Any]:
        """The cursor: epoch, position in it, and what they refer to.

        Args:
            unused: ids of prompts that were given out and that a restored stream is to give out again, first of all.
        """
        return {
            "unused": [*unused, *self._returned],
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a cursor that `state` gave.

        Raises:
            ValueError: the cursor belongs to other records or to another seed.
        """
        if state["fingerprint"] != self._fingerprint or state["seed"] != self._seed:
            raise ValueError(
                f"the saved data cursor (seed {state['seed']}, records {state['fingerprint']}) does not fit this data "
                f"(seed {self._seed}, records {self._fingerprint}); resume with the recipe the run was started with"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()
        self._returned = list(state.get("unused", ()))

    def _next(self) -> Record:
        if self._returned:
            wanted = self._returned.pop(0)
            return next(record for record in self._records if record.id == wanted)
        # From anywhere in an epoch, twice as many records hold each of them at least once.
        for _ in range(2 * len(self._records)):
            record = self._advance()
            if self._is_wanted is None or self._is_wanted(record.id):
                return record
        raise ValueError(f"none of the {len(self._records)} records is wanted any more")

    def _advance(self) -> Record:
        if self._position == len(self._records):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        record = self._records[self._order[self._position]]
        self._position += 1
        return record

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._records)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        if self._by_level:
            order.sort(key=lambda index: self._records[index].metadata["level"])
        return order
