"""Preference pairs: a chat with a better and a worse last answer.

    {"prompt": "4-1=", "chosen": "<think>...", "rejected": "<think>..."}       texts, or messages
    {"chosen": [{"role", "content"}, ...], "rejected": [...]}                   whole chats
    ... "margin": 0.5                                                           by how much the better one should win

Pairs of generated tasks have ground truth: the worse answer is the right one, corrupted in one known way.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from data.adapters import adapted, adapter_for, resolve_adapter
from data.answers import fraction_of
from data.corruption import CORRUPTIONS, Corruption, Solution, applicable, corrupt
from data.files import Row, all_rows, check_size
from data.records import CHAT_COLUMNS, Record, check_found, check_names, parse_row
from data.sources import task_records
from data.tasks import Split, get_task
from posttrain.types import Message

COLUMNS = ("prompt", "chosen", "rejected", "margin", "kind", "answer", "id")
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two chats that begin alike, of which the first one ends with the better answer."""

    id: str
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float = 0.0  # 0 or more: the scores should differ by more than this
    kind: str = "pairs"  # what is wrong with the rejected one, or where the pair is from
    answer: str | None = None  # the reference answer, for a verifier
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)  # for people: "pairs.jsonl, line 17"

    @property
    def label(self) -> str:
        """What error messages call it."""
        return self.place or f"pair {self.id}"


# --- generated --------------------------------------------------------------------------------------------------------


def task_pairs(
    task: str,
    levels: Sequence[int],
    split: Split,
    size: int,
    seed: int,
    *,
    kinds: Sequence[Corruption] = CORRUPTIONS,
    worked_fraction: float = 1.0,
) -> list[Pair]:
    """`size` generated problems, each with its right solution and a corrupted one. The same arguments give the same pairs.

    Args:
        task, levels, split, size, seed: see `data.sources.task_records`.
        kinds: of corruption; each pair draws one of those that its solution allows, and has it as `kind`.
        worked_fraction: share of the pairs whose answers have reasoning; the others answer directly.

    Raises:
        ValueError: no kind, kinds that direct answers do not allow, fewer than two different problems for `swapped`.
    """
    wrong = [kind for kind in kinds if kind not in CORRUPTIONS]
    if wrong or not kinds:
        raise ValueError(f"kinds={list(kinds)} must be one or more of {', '.join(CORRUPTIONS)}")
    family = get_task(task)
    records = task_records(task, levels, split, size, seed)
    pairs = []
    for place, record in enumerate(records):
        worked = fraction_of(f"worked/{seed}/{record.id}") < worked_fraction
        solution = _solution(record, worked=worked)
        rng = random.Random(f"corruption/{seed}/{record.id}")
        allowed = [kind for kind in kinds if applicable(kind, solution, family)]
        if not allowed:
            raise ValueError(
                f"kinds={list(kinds)}: none of them can be done to {solution.text!r}; add answer or format, or set "
                f"worked_fraction: 1"
            )
        kind = rng.choice(allowed)
        other = _different(records, place) if kind == "swapped" else solution
        rejected = corrupt(kind, solution, family, other, rng)
        pairs.append(_task_pair(record, solution, rejected, kind))
    return pairs


def _solution(record: Record, *, worked: bool) -> Solution:
    assert record.answer is not None and record.worked is not None  # every family has both
    return Solution(record.messages[-1]["content"], record.answer, record.worked if worked else "")


def _different(records: Sequence[Record], place: int) -> Solution:
    """The next problem's solution that is not the same as this one's."""
    for step in range(1, len(records)):
        candidate = records[(place + step) % len(records)]
        if candidate.worked != records[place].worked:
            return _solution(candidate, worked=True)
    raise ValueError("swapped reasoning needs at least two different problems; raise size")


def _task_pair(record: Record, solution: Solution, rejected: str, kind: Corruption) -> Pair:
    def chat(text: str) -> tuple[Message, ...]:
        return (*record.messages, {"role": "assistant", "content": text})

    metadata = {**record.metadata, "corruption": kind}
    return Pair(record.id, chat(solution.text), chat(rejected), 0.0, kind, record.answer, metadata)


# --- files ------------------------------------------------------------------------------------------------------------


def file_pairs(
    path: str,
    split: str,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    size: int | None = None,
    adapter: str | None = None,
) -> list[Pair]:
    """Pairs of a JSONL or Parquet file, of a folder of them, or of a hub dataset; see `data.sources.file_records`.

    Raises:
        ValueError: nothing there, missing columns, or a row that is no pair (file and row are named).
    """
    columns = columns or {}
    check_names(columns, path, COLUMNS)
    adapter = adapter_for(path, adapter, columns, "pairs")
    if adapter is not None:
        resolve_adapter(adapter, "pairs")
    rows: Sequence[Row] = all_rows(path, split, name)
    if adapter is not None:
        rows = list(islice(adapted(iter(rows), adapter, "pairs"), size))
        if not rows:
            raise ValueError(f"{path!r}: adapter {adapter} leaves every row out; choose another split or adapter")
    check_size(path, len(rows), size)
    values = [(row, row.columns()) for row in rows[:size]]
    if columns:
        found = dict.fromkeys(key for _, value in values if isinstance(value, Mapping) for key in value)
        check_found(columns, found, path, len(values))
    return [parse_pair(value, columns, row.place, f"{row.source}/{split}/{row.index}") for row, value in values]


def parse_pair(row: Any, columns: Mapping[str, str], place: str, default_id: str) -> Pair:
    """The pair of a row.

    A `chosen` or `rejected` that is a list of messages beginning with another role than the assistant is a whole chat, and
    a column prompt is then not used. A margin that is missing or None is 0.

    Args:
        row: column -> value; a value of None is a column that is not there.
        columns: our column name -> theirs, for those that differ.
        place: for error messages, e.g. "pairs.jsonl, line 17".
        default_id: for rows without a column id.

    Raises:
        ValueError: the row is no pair; the message begins with `place`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: a row must be an object of columns, not {row!r:.80}")
    names = {ours: columns.get(ours, ours) for ours in COLUMNS}
    for ours in ("tools", "chat_template_kwargs"):
        if row.get(ours) is not None:
            raise ValueError(f"{place}: it has {ours}, which only SFT uses; remove the column")
    chosen, rejected = (_chat(row, names, side, place, default_id) for side in SIDES)
    if chosen[0] != rejected[0] or len(chosen) < 2 or len(rejected) < 2:
        raise ValueError(
            f"{place}: {names['chosen']} and {names['rejected']} must be answers to the same prompt; put it in a column "
            f"prompt, or begin both chats with it"
        )
    if chosen == rejected:
        raise ValueError(f"{place}: {names['chosen']} and {names['rejected']} are the same; remove the row")
    kind, answer, identity = (row.get(names[ours]) for ours in ("kind", "answer", "id"))
    return Pair(
        id=default_id if identity is None else str(identity),
        chosen=chosen,
        rejected=rejected,
        margin=_margin(row.get(names["margin"]), names["margin"], place),
        kind="pairs" if kind is None else str(kind),
        answer=None if answer is None else str(answer),
        metadata={key: value for key, value in row.items() if key not in names.values() and value is not None},
        place=place,
    )


def _chat(
    row: Mapping[str, Any], names: Mapping[str, str], side: str, place: str, default_id: str
) -> tuple[Message, ...]:
    column = names[side]
    value = row.get(column)
    if value is None:
        found = [key for key, value in row.items() if value is not None]
        raise ValueError(
            f"{place}: needs the columns chosen and rejected, with prompt or as whole chats; it has "
            f"{', '.join(found) or 'none'}; name yours, e.g. columns: {{{side}: {found[0] if found else 'better'}}}"
        )
    first = value[0] if isinstance(value, list) and value else None
    form = "messages"
    if isinstance(first, Mapping) and "from" in first:
        form = "conversations"
    elif row.get(names["prompt"]) is not None and not _is_whole(first):
        form = "prompt"
    if form == "prompt":
        parts = {names["prompt"]: row[names["prompt"]], column: value}
        record = parse_row(parts, {"prompt": names["prompt"], "completion": column}, place, default_id)
    else:
        others = {ours: "" for ours in CHAT_COLUMNS if ours != form}  # a column of such a name means nothing here
        record = parse_row({column: value}, {form: column, **others}, place, default_id)
    if not record.is_chat:
        raise ValueError(f"{place}: {column} must end with the assistant's message")
    return record.messages


def _is_whole(first: Any) -> bool:
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _margin(value: Any, column: str, place: str) -> float:
    if value is None:
        return 0.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{place}: {column} must be a finite number of 0 or more, not {value!r:.60}")
    return float(value)
