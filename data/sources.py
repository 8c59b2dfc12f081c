"""Descriptions of data to records, and records to what a stage consumes.

`task_records` and `file_records` make records, `mixture` blends several lists of them, `sft_dataset` gives a dataset of
chats to train on, `PromptStream` an endless shuffled stream of prompts with an exact cursor, `to_prompts` prompts in
evaluation order.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.chat import format_answer, render_prompt
from data.tasks import Split, get_task
from posttrain.types import Message, Prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # file ending -> loader of `datasets`
COLUMNS = ("messages", "prompt", "answer", "worked", "id")  # the columns with a meaning; all others are metadata


@dataclass(frozen=True, slots=True)
class Record:
    """One problem, or one finished chat when the last message is the assistant's."""

    id: str  # unique within a source and stable, e.g. "chain_sum/2/train/0/17" (task, level, split, seed, index)
    messages: tuple[Message, ...]
    answer: str | None = None  # the reference answer that rewards see
    metadata: Mapping[str, Any] = field(default_factory=dict)
    worked: str | None = None  # a written-out solution, without tags

    @property
    def is_chat(self) -> bool:
        """Whether the assistant has already answered."""
        return self.messages[-1]["role"] == "assistant"


def task_records(task: str, levels: Sequence[int], split: Split, size: int, seed: int) -> list[Record]:
    """`size` generated problems; the levels take turns, so each gives size / len(levels), the first ones the rest.

    Raises:
        ValueError: unknown task, level or split, no or repeated levels, too few distinct evaluation problems.
    """
    family = get_task(task)
    if not levels or len(set(levels)) < len(levels):
        raise ValueError(f"levels of task {task!r} must be one or more different levels, got {list(levels)}")
    records: list[Record | None] = [None] * size
    for turn, level in enumerate(levels):
        places = range(turn, size, len(levels))
        for index, (place, item) in enumerate(zip(places, family.items(level, split, len(places), seed), strict=True)):
            records[place] = Record(
                id=f"{task}/{level}/{split}/{seed}/{index}",
                messages=({"role": "user", "content": item.prompt},),
                answer=item.answer,
                metadata={**item.metadata, "split": split},
                worked=item.worked,
            )
    return [record for record in records if record is not None]


def file_records(
    path: str,
    split: str,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    size: int | None = None,
) -> list[Record]:
    """Records of a JSONL or Parquet file, of a folder of them, or of a hub dataset. Local data never use the network.

    Args:
        path: a file, which is one split whatever its name; a folder, whose files `<split>*.jsonl` or
            `<split>*.parquet` are read; or a hub name such as "owner/name".
        split: may carry a slice, "train[:100]".
        columns: our column name -> theirs, for those that differ, e.g. {"answer": "solution"}.
        name: configuration of a hub dataset.
        size: take the first so many; None takes all.

    Raises:
        ValueError: nothing there, no such split, missing columns, or a row that is no record.
    """
    dataset = _load(path, split, name)
    theirs = _column_names(dataset.column_names, columns or {}, path)
    if size is not None:
        if size > len(dataset):
            raise ValueError(f"{path!r} split {split!r} has {len(dataset)} records, fewer than size {size}; lower size")
        dataset = dataset.select(range(size))
    return [_record(row, theirs, f"{path}/{split}/{index}") for index, row in enumerate(dataset)]


def _load(path: str, split: str, name: str | None) -> Dataset:
    local = Path(path).expanduser()
    base_split = split.partition("[")[0]
    if local.is_dir():
        files = sorted(f for f in local.iterdir() if f.suffix in FORMATS and f.name.startswith(base_split))
        if not files or len({FORMATS[f.suffix] for f in files}) > 1:
            raise ValueError(
                f"folder {path!r} must hold files of one kind named {base_split}*.jsonl or {base_split}*.parquet; "
                f"found {sorted(f.name for f in local.iterdir())[:8]}"
            )
        return _load_files(files, split, path)
    if local.is_file():
        if local.suffix not in FORMATS:
            raise ValueError(f"{path!r} is of an unknown kind; write it as one of {', '.join(FORMATS)}")
        return _load_files([local], split, path)
    if local.suffix in FORMATS or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path):
        raise ValueError(
            f"data file {path!r} does not exist (looked in {Path.cwd()}); correct path, or create the file"
        )
    return _load_from_hub(path, split, name)


def _load_files(files: Sequence[Path], split: str, path: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not any(f.stat().st_size for f in files):
        raise ValueError(f"{path!r} is empty; write at least one record to it")
    try:
        return load_dataset(
            FORMATS[files[0].suffix], data_files={split.partition("[")[0]: [str(f) for f in files]}, split=split
        )
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"cannot read {path!r} as {FORMATS[files[0].suffix]}: {reason}") from error


def _load_from_hub(path: str, split: str, name: str | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name, split=split)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{path!r} is neither a local file nor a hub dataset that can be reached; check the spelling and the "
            f"network, or give the path of a .jsonl or .parquet file ({error})"
        ) from error


def _column_names(found: Sequence[str], columns: Mapping[str, str], path: str) -> dict[str, str]:
    """Our name -> theirs for each meaningful column that is there."""
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"columns of {path!r}: unknown name {unknown[0]!r}; the names are {', '.join(COLUMNS)}")
    for ours, theirs in columns.items():
        if theirs not in found:
            raise ValueError(
                f"{path!r} has no column {theirs!r} (wanted as {ours}); its columns are {', '.join(found)}"
            )
    names = {ours: columns.get(ours, ours) for ours in COLUMNS}
    names = {ours: theirs for ours, theirs in names.items() if theirs in found}
    if ("messages" in names) == ("prompt" in names):
        raise ValueError(
            f"{path!r} needs a column messages (SFT) or prompt (RL, evaluation), and not both; its columns are "
            f"{', '.join(found)}; name yours, e.g. columns: {{prompt: {found[0] if found else 'question'}}}"
        )
    return names


def _record(row: Mapping[str, Any], names: Mapping[str, str], default_id: str) -> Record:
    values = {ours: row[theirs] for ours, theirs in names.items()}
    taken = set(names.values())
    chat = values["messages"] if "messages" in values else values["prompt"]
    if isinstance(chat, str) and "prompt" in values:
        chat = [{"role": "user", "content": chat}]
    if (
        not isinstance(chat, list)
        or not chat
        or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in chat)
        or not all(isinstance(m.get("content"), str) for m in chat)
    ):
        column = names["messages"] if "messages" in names else names["prompt"]
        kind = "a list of {role, content} with texts" + (" or a text" if "prompt" in values else "")
        raise ValueError(f"record {default_id}: {column} must be {kind}, not {chat!r}")
    answer, worked, identity = (values.get(key) for key in ("answer", "worked", "id"))
    return Record(
        id=default_id if identity is None else str(identity),
        # `datasets` fills the keys that other rows have with None: they are not part of this message.
        messages=tuple({key: value for key, value in message.items() if value is not None} for message in chat),
        answer=None if answer is None else str(answer),
        metadata={key: value for key, value in row.items() if key not in taken and value is not None},
        worked=None if worked is None else str(worked),
    )


def sft_messages(record: Record, worked: bool) -> tuple[Message, ...]:
    """The chat to train on: a finished chat as it is, a problem with its worked or its direct answer.

    Raises:
        ValueError: a problem without reference answer, or `worked` for one without worked solution.
    """
    if record.is_chat:
        return record.messages
    if record.answer is None:
        raise ValueError(f"record {record.id} has no assistant message and no answer; SFT needs one of them")
    if worked and record.worked is None:
        raise ValueError(f"record {record.id} has no worked solution; add a column worked, or train on direct answers")
    content = format_answer(record.worked if worked else None, record.answer)
    return (*record.messages, {"role": "assistant", "content": content})


def sft_records(records: Sequence[Record], *, worked_fraction: float, seed: int) -> list[Record]:
    """Each problem as a finished chat, a share of them with the worked solution; finished chats stay as they are.

    The choice depends on the record's id and the seed alone, so it survives reordering and mixing. Problems without a
    worked solution get the direct answer.

    Raises:
        ValueError: `worked_fraction` outside 0..1, or a record with neither answer nor assistant message.
    """
    if not 0 <= worked_fraction <= 1:
        raise ValueError(f"worked_fraction must be between 0 and 1, got {worked_fraction}")
    chats = []
    for record in records:
        worked = record.worked is not None and _fraction_of(f"{seed}/{record.id}") < worked_fraction
        chats.append(Record(record.id, sft_messages(record, worked), record.answer, record.metadata, record.worked))
    return chats


def sft_dataset(records: Sequence[Record], *, worked_fraction: float, seed: int) -> Dataset:
    """A `datasets.Dataset` with the column `messages`, in the order of the records. See `sft_records`."""
    from datasets import Dataset

    chats = sft_records(records, worked_fraction=worked_fraction, seed=seed)
    return Dataset.from_list([{"messages": [dict(message) for message in chat.messages]} for chat in chats])


def _fraction_of(key: str) -> float:
    """A number in [0, 1) that only depends on the text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def mixture(sources: Sequence[tuple[Sequence[Record], float]], seed: int) -> list[Record]:
    """Blend sources in proportion to their weights, evenly spread, until one of them is used up.

    Each source keeps its order and no record is used twice. Any stretch of n records holds n * weight / sum(weights)
    records of a source, give or take one or two.

    Raises:
        ValueError: no source, an empty one, a weight that is not positive, or an id that two records share.
    """
    if not sources or any(not records for records, _ in sources):
        raise ValueError("a mixture needs at least one source, and at least one record in each")
    if any(not 0 < weight < float("inf") for _, weight in sources):
        raise ValueError(f"weights of a mixture must be positive, got {[weight for _, weight in sources]}")
    if len(sources) == 1:
        return list(sources[0][0])
    rng = random.Random(seed)
    # Record k of a source with weight w gets a random place in [k/w, (k+1)/w): one record per 1/w of the way.
    end = min(len(records) / weight for records, weight in sources)
    placed = []
    for number, (records, weight) in enumerate(sources):
        for k, record in enumerate(records):
            place = (k + rng.random()) / weight
            if place < end:
                placed.append((place, number, k, record))
    placed.sort(key=lambda entry: entry[:3])
    mixed = [record for *_, record in placed]
    _check_unique(mixed)
    return mixed


def _check_unique(records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"two records have the id {record.id!r}; give the sources different seeds, splits or ids")
        seen.add(record.id)


def to_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A problem rendered to tokens.

    Raises:
        ValueError: the record is a finished chat.
    """
    if record.is_chat:
        raise ValueError(f"record {record.id} ends with the assistant's message; a prompt must end with the user's")
    ids = render_prompt(tokenizer, record.messages)
    return Prompt(record.id, record.messages, ids, record.answer, record.metadata)


def to_prompts(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
    """The problems rendered to tokens, in their order. Raises ValueError on a finished chat."""
    return tuple(to_prompt(record, tokenizer) for record in records)


class PromptStream:
    """Prompts without end: each epoch is a new shuffle of all records, the same for the same seed.

    `state()` is a small JSON-able cursor; a stream over the same records that restores it goes on with exactly the
    prompts that would have come next.
    """

    def __init__(self, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Raises ValueError when there is no record or two share an id."""
        if not records:
            raise ValueError("a prompt stream needs at least one record; got none")
        _check_unique(records)
        self._records = tuple(records)
        self._tokenizer = tokenizer
        self._seed = seed
        contents = "\n".join(f"{record.id}\t{record.messages[-1]['content']}" for record in records)
        self._fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self._epoch = 0
        self._position = 0  # records of this epoch already given out
        self._order = self._shuffled()

    def take(self, n: int) -> tuple[Prompt, ...]:
        """The next `n` prompts. Within an epoch all are different; ids repeat from one epoch to the next."""
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        return tuple(to_prompt(self._next(), self._tokenizer) for _ in range(n))

    def state(self) -> dict[str, Any]:
        """The cursor: epoch, position in it, and what they refer to."""
        return {
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

    def _next(self) -> Record:
        if self._position == len(self._records):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        record = self._records[self._order[self._position]]
        self._position += 1
        return record

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._records)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order
