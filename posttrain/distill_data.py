"""The prompts of a distillation: read, freed of duplicates and evaluation problems before anything is paid for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.answers import sft_messages
from data.clean import Decontaminator, Deduplicator, Example
from data.mixture import check_unique
from data.records import Record
from posttrain.disk import write_atomically
from posttrain.recipe import DistillRecipe
from posttrain.records import EVAL_SEED, evaluation_records, load_records
from posttrain.types import Message


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt, and what the record says beside it."""

    record: Record  # its messages end before the answer
    original: Message | None  # the record's own response, where rows of the kind `original` are wanted

    @property
    def kind(self) -> str:
        """What the data card counts it under: task and level, or "problems"."""
        task, level = self.record.metadata.get("task", "problems"), self.record.metadata.get("level")
        return f"{task}/{level}" if level is not None else str(task)


@dataclass
class Problems:
    """The prompts to be answered, and what was left out."""

    asked: list[Problem]
    counts: dict[str, int]  # loaded, duplicates, contaminated, too_long
    decontaminator: Decontaminator | None  # for the answers
    contaminated: list[Example]  # all prompts that were left out, and the evaluation problem in each


def load_problems(recipe: DistillRecipe) -> Problems:
    """Read and clean the prompts.

    Raises:
        ValueError: a row that is no record, two of one id, tools, or a problem without the response that is wanted.
    """
    wants_original = "original" in recipe.output.kinds
    loaded = load_records(recipe.datasets, "train", recipe.seed)
    check_unique(loaded)
    counts = {"loaded": len(loaded)}
    problems = [to_problem(record, wants_original=wants_original) for record in loaded]
    if recipe.output.format == "parquet":
        _require_plain(problems)
    if recipe.selection.deduplicate:
        same = Deduplicator()
        problems = [problem for problem in problems if same.keeps(problem.record)]
        counts["duplicates"] = counts["loaded"] - len(problems)
    section, decontaminator, contaminated = recipe.selection.decontamination, None, []
    if section is not None:
        decontaminator = Decontaminator(evaluation_records(section.datasets, EVAL_SEED), section.ngram)
        found = [decontaminator.find(with_original(problem)) for problem in problems]
        problems = [problem for problem, example in zip(problems, found, strict=True) if example is None]
        contaminated = [example for example in found if example is not None]
        counts["contaminated"] = len(contaminated)
    return Problems(problems, counts, decontaminator, contaminated)


def write_contaminated(directory: Path, problems: Problems) -> None:
    """contaminated.jsonl: every prompt that was left out for holding an evaluation problem, and which one."""
    lines = [json.dumps(asdict(example)) + "\n" for example in problems.contaminated]
    if problems.decontaminator is not None:
        write_atomically(directory / "contaminated.jsonl", "".join(lines))


def to_problem(record: Record, *, wants_original: bool) -> Problem:
    """A record as a prompt; a finished chat without its last message, which is the record's own response.

    Raises:
        ValueError: tools or template options, nothing to ask, or no response where one is wanted.
    """
    if record.tools or record.template_kwargs:
        column = "tools" if record.tools else "chat_template_kwargs"
        raise ValueError(f"{record.label} has {column}, which teachers are not given; remove the column")
    original = sft_messages(record, record.worked is not None)[-1] if wants_original else None
    messages = record.messages[:-1] if record.is_chat else record.messages
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{record.label}: a prompt must end with a user message")
    return Problem(replace(record, messages=messages), original)


def with_original(problem: Problem) -> Record:
    """The prompt and, where it is wanted, the response as one chat."""
    if problem.original is None:
        return problem.record
    return replace(problem.record, messages=(*problem.record.messages, problem.original))


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The messages after a system prompt; a record's own follows in the same message."""
    if system_prompt is None:
        return tuple(messages)
    if messages[0]["role"] == "system":
        own = messages[0]["content"]
        return ({"role": "system", "content": f"{system_prompt}\n\n{own}"}, *messages[1:])
    return ({"role": "system", "content": system_prompt}, *messages)


def _require_plain(problems: Sequence[Problem]) -> None:
    """Parquet has one type for all messages."""
    for problem in problems:
        extra = [key for message in problem.record.messages for key in message if key not in ("role", "content")]
        if extra:
            raise ValueError(
                f"{problem.record.label}: a message has the key {extra[0]!r} beside role and content; set output.format: "
                f"jsonl"
            )


def shown(messages: Sequence[Message]) -> str:
    """The text of the last user message, for people."""
    return str(messages[-1]["content"])


def metadata_for_rewards(record: Record, finish_reason: str | None, completion_tokens: int | None) -> dict[str, Any]:
    """What a reward gets to see beside the answer; what is not known is left out."""
    known = {"finish_reason": finish_reason, "completion_length": completion_tokens}
    given = {name: value for name, value in known.items() if value is not None}
    return {**record.metadata, "messages": record.messages, **given}
