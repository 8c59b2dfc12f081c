"""A recipe's `datasets` list as records."""

from __future__ import annotations

from collections.abc import Sequence

from data.sources import Record, file_records, mixture, sft_records, task_records
from posttrain.recipe import DatasetSection


def load_records(sections: Sequence[DatasetSection], split: str, seed: int) -> list[Record]:
    """Records of all sources, mixed.

    Without weights everything is used, evenly spread. With a weight on any source the sources are mixed in proportion to
    their weights until one is used up.

    Args:
        split: for sources that do not name their own.
    """
    return _mix(sections, [section_records(section, split, seed) for section in sections], seed)


def load_chats(sections: Sequence[DatasetSection], seed: int) -> list[Record]:
    """Like `load_records` for SFT: every record ends with the assistant's message."""
    sources = [
        sft_records(section_records(section, "train", seed), worked_fraction=section.worked_fraction, seed=seed)
        for section in sections
    ]
    return _mix(sections, sources, seed)


def section_records(section: DatasetSection, split: str, seed: int) -> list[Record]:
    """Records of one source, in its order."""
    if section.task is not None:
        assert section.size is not None  # the recipe requires it
        wanted = section.split or split
        if wanted not in ("train", "eval"):
            raise ValueError(f"split {wanted!r} of task {section.task!r}: generated tasks have train and eval")
        return task_records(section.task, section.levels, wanted, section.size, seed)  # type: ignore[arg-type]
    assert section.path is not None
    return file_records(section.path, section.split or split, section.columns, section.name, section.size)


def _mix(sections: Sequence[DatasetSection], sources: list[list[Record]], seed: int) -> list[Record]:
    weighted = any("weight" in section.model_fields_set for section in sections)
    weights = [
        section.weight if weighted else float(len(records)) for section, records in zip(sections, sources, strict=True)
    ]
    return mixture(list(zip(sources, weights, strict=True)), seed)
