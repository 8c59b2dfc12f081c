"""A recipe's `datasets` list as records: all at once for GRPO and SFT, or without end for SFT.

datasets -> records -> finished chats -> clean -> mixed (load_chats) or blended without end (stream_chats)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from data.answers import fraction_of, sft_record, sft_records
from data.clean import Decontaminator, Deduplicator, chat_key
from data.mixture import blend, mixture, mixture_weights
from data.records import Record
from data.sources import Source, file_records, file_source, task_records, task_source
from data.streams import stream_records
from data.tasks import Split
from posttrain.sections import DatasetSection, EvalSection, RecipeError
from posttrain.sft_recipe import PreparationSection

EVAL_SEED = EvalSection.model_fields["seed"].default  # of the generated problems that training chats are cleaned of
AS_THEY_ARE = PreparationSection()
Judge = Deduplicator | Decontaminator


@contextmanager
def data_errors(key: str) -> Iterator[None]:
    """Faults of data as faults of the recipe that names them: one line for the user, and no traceback.

    Args:
        key: of the recipe, e.g. "datasets".

    Raises:
        RecipeError: for each ValueError in the block.
    """
    try:
        yield
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error


@dataclass(frozen=True, slots=True)
class PreparedChats:
    """Chats to train on, and how they came about."""

    records: list[Record]
    report: dict[str, Any]  # JSON-able; see `load_chats`


class ChatStream(Iterator[Record]):
    """Chats without end, and what cleaning has left out so far."""

    def __init__(self, records: Iterator[Record], judges: dict[str, Judge]) -> None:
        self._records = records
        self._judges = judges

    def __next__(self) -> Record:
        with data_errors("datasets"):
            return next(self._records)

    def report(self) -> dict[str, Any]:
        """`duplicates`, `contaminated` and `examples` as in `load_chats`; a source is judged in its first epoch."""
        return _cleaning(self._judges)


def load_records(sections: Sequence[DatasetSection], split: str, seed: int) -> list[Record]:
    """Records of all sources, mixed.

    Without weights everything is used, evenly spread. With a weight on any source the sources are mixed in proportion to
    their weights until one is used up.

    Args:
        split: for sources that do not name their own.
    """
    sources = [section_records(section, split, seed) for section in sections]
    weights = source_weights(sections, [len(records) for records in sources])
    return mixture(list(zip(sources, weights, strict=True)), seed)


def load_chats(
    sections: Sequence[DatasetSection],
    seed: int,
    preparation: PreparationSection = AS_THEY_ARE,
    *,
    split: Literal["train", "eval"] = "train",
) -> PreparedChats:
    """Finished chats of all sources, cleaned, then mixed as in `load_records` or by temperature.

    Args:
        split: for sources that do not name their own; of files, "eval" is the split test.

    Returns:
        The chats and a report: `chats` (how many), `sources` (one by one: name, loaded, duplicates, contaminated, weight,
        used, share of the mixture, unused), `duplicates` and `contaminated` (how many were left out) and `examples` of
        both.

    Raises:
        ValueError: a row that is no chat, a row that two sources share, or a source of which nothing is left.
    """
    sources = [
        _finished(section, section_records(section, source_split(section, split), seed), seed) for section in sections
    ]
    _check_different(sources)
    rows: list[dict[str, Any]] = [
        {"name": source_name(section), "loaded": len(records), "duplicates": 0, "contaminated": 0}
        for section, records in zip(sections, sources, strict=True)
    ]
    judges = _judges(preparation)
    for name, judge in judges.items():
        for number, records in enumerate(sources):
            sources[number] = [record for record in records if judge.keeps(record)]
            rows[number][name] = len(records) - len(sources[number])
    for row, records in zip(rows, sources, strict=True):
        if not records:
            raise ValueError(
                f"nothing to train on is left of {row['name']}: {row}; correct the data, or remove the source"
            )
    weights = source_weights(sections, [len(records) for records in sources], preparation.mixture_temperature)
    mixed = list(blend([[(n, record) for record in records] for n, records in enumerate(sources)], weights, seed))
    used = Counter(n for n, _ in mixed)
    for n, row in enumerate(rows):
        row |= {"weight": weights[n] / sum(weights), "used": used[n], "share": used[n] / len(mixed)}
        row["unused"] = len(sources[n]) - used[n]
    return PreparedChats([record for _, record in mixed], {"chats": len(mixed), "sources": rows, **_cleaning(judges)})


def stream_chats(
    sections: Sequence[DatasetSection], seed: int, preparation: PreparationSection = AS_THEY_ARE, skip: int = 0
) -> ChatStream:
    """Finished chats without end, read while training, blended by weight; see `data.streams`.

    The same arguments give the same chats in the same order, also in another process.

    Args:
        skip: go on after so many chats, without tokenizing or parsing them (with cleaning: parsed and judged again).

    Raises:
        ValueError: several sources without a weight, or a source that cannot be streamed; while iterating, a row that is
            no chat.
    """
    if len(sections) > 1 and not _is_weighted(sections):
        raise ValueError(
            "preparation.streaming: several datasets are blended by weight, since their sizes are not known; give each "
            "one a weight"
        )
    judges = _judges(preparation)
    keep: Callable[[Record], bool] | None = None
    if judges:
        keep = partial(_passes, tuple(judges.values()))
    weights = [section.weight for section in sections]
    records = stream_records([_chat_source(section, seed) for section in sections], weights, seed, keep=keep, skip=skip)
    return ChatStream(records, judges)


def validation_split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out chats, each in the order of the records; about `fraction` of the different ones are held out.

    A hash of the normalised chat and the seed decides, so equal chats are on the same side, and a chat stays on its side
    whatever is added, left out or reordered.

    Raises:
        ValueError: a fraction outside 0..1, or one that leaves a side empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out must be between 0 and 1, got {fraction}")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[fraction_of(f"validation/{seed}/{chat_key(record)}") < fraction].append(record)
    if not all(sides):
        raise ValueError(
            f"fraction {fraction} of {len(records)} chats leaves {len(sides[0])} to train on and {len(sides[1])} held out; "
            f"change the fraction, or give validation.datasets"
        )
    return sides


def section_records(section: DatasetSection, split: str, seed: int) -> list[Record]:
    """Records of one source, in its order."""
    if section.task is not None:
        assert section.size is not None  # the recipe requires it
        return task_records(section.task, section.levels, task_split(section, split), section.size, seed)
    assert section.path is not None
    wanted = section.split or split
    return file_records(section.path, wanted, section.columns, section.name, section.size, section.adapter)


def evaluation_records(sections: Sequence[DatasetSection], seed: int) -> list[Record]:
    """Held-out problems, in the order of the recipe: of tasks the split eval, of files test, unless they name another."""
    return [record for section in sections for record in section_records(section, source_split(section, "eval"), seed)]


def source_name(section: DatasetSection) -> str:
    """What reports call a source."""
    return section.path or f"{section.task} {list(section.levels)}"


def _chat_source(section: DatasetSection, seed: int) -> Source:
    if section.task is not None:
        assert section.size is not None
        split = task_split(section, "train")
        source = task_source(section.task, section.levels, split, section.size, seed)
    else:
        assert section.path is not None
        split_name = section.split or "train"
        source = file_source(section.path, split_name, section.columns, section.name, section.size, section.adapter)

    def chat(row: Any) -> Record:
        return sft_record(
            source.record(row),
            worked_fraction=section.worked_fraction,
            careless_fraction=section.careless_fraction,
            seed=seed,
        )

    return replace(source, record=chat)


def source_split(section: DatasetSection, split: Literal["train", "eval"]) -> str:
    """The split that a source without one of its own is read from: of files, "eval" is the split test."""
    return "test" if split == "eval" and section.path is not None else split


def _finished(section: DatasetSection, records: Sequence[Record], seed: int) -> list[Record]:
    return sft_records(
        records, worked_fraction=section.worked_fraction, careless_fraction=section.careless_fraction, seed=seed
    )


def task_split(section: DatasetSection, split: str) -> Split:
    """The split of a generated task. Raises ValueError for one that it does not have."""
    wanted = section.split or split
    if wanted == "train":
        return "train"
    if wanted == "eval":
        return "eval"
    raise ValueError(f"split {wanted!r} of task {section.task!r}: generated tasks have train and eval")


def source_weights(
    sections: Sequence[DatasetSection], sizes: Sequence[int], temperature: float | None = None
) -> list[float]:
    """The recipe's weights; without them the sizes, which use everything, or what a temperature makes of the sizes."""
    if _is_weighted(sections):
        return [section.weight for section in sections]
    return [float(size) for size in sizes] if temperature is None else mixture_weights(sizes, temperature)


def _is_weighted(sections: Sequence[DatasetSection]) -> bool:
    return any("weight" in section.model_fields_set for section in sections)


def _judges(preparation: PreparationSection) -> dict[str, Judge]:
    """By the name of what each leaves out. Duplicates first: the second look is the dearer one."""
    judges: dict[str, Judge] = {}
    if preparation.deduplicate:
        judges["duplicates"] = Deduplicator()
    if preparation.decontamination is not None:
        evaluation = evaluation_records(preparation.decontamination.datasets, EVAL_SEED)
        judges["contaminated"] = Decontaminator(evaluation, preparation.decontamination.ngram)
    return judges


def _passes(judges: Sequence[Judge], record: Record) -> bool:
    return all(judge.keeps(record) for judge in judges)


def _cleaning(judges: dict[str, Judge]) -> dict[str, Any]:
    reports = {name: judge.report().to_dict() for name, judge in judges.items()}
    return {
        "duplicates": reports["duplicates"]["dropped"] if "duplicates" in reports else 0,
        "contaminated": reports["contaminated"]["dropped"] if "contaminated" in reports else 0,
        "examples": {name: report["examples"] for name, report in reports.items()},
    }


def _check_different(sources: Sequence[Sequence[Record]]) -> None:
    """Refuse a row that stands in two sources. Ids that a file gives its rows may repeat: SFT has no use for them."""
    owner: dict[str, int] = {}
    for number, records in enumerate(sources):
        for record in records:
            if owner.setdefault(record.label, number) != number:
                raise ValueError(
                    f"{record.label} is in two of the datasets; give them different seeds, splits or files"
                )
