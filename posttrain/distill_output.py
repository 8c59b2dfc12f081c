"""What a distillation writes: the rows for SFT, and every generation with all that is known about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from posttrain.distill_data import Problem, shown, with_system_prompt
from posttrain.recipe import DistillRecipe
from posttrain.selection import Answer
from posttrain.types import Message

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 1024


class RowWriter:
    """A Parquet or JSONL file, written piece by piece, that appears whole or not at all.

    Args:
        path: .parquet or .jsonl.
        schema: of its columns; rows have just these.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.count = 0
        self._partial = path.with_name(path.name + ".partial")
        self._schema = schema
        self._rows: list[Mapping[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RowWriter:
        import pyarrow.parquet as pq

        if self.path.suffix == ".parquet":
            self._file: Any = pq.ParquetWriter(self._partial, self._schema)
        else:
            self._file = self._partial.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._file.close()
        if error is None:
            self._partial.replace(self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        self.count += 1
        self._rows.append(row)
        if len(self._rows) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.path.suffix == ".parquet":
            if self._rows:
                self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        else:
            self._file.writelines(json.dumps(row) + "\n" for row in self._rows)
        self._rows = []


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- the dataset ------------------------------------------------------------------------------------------------------


def chat_type() -> pa.DataType:
    """Of a column of chats."""
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def dataset_schema(labels: Sequence[str]) -> pa.Schema:
    """Columns of a row for SFT: `messages`, and where they come from."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    columns = [
        ("id", text),
        ("messages", chat_type()),
        ("row_kind", text),  # response, system_response or original
        ("problem_kind", text),  # task and level
        ("prompt_id", text),
        ("sample_id", text),  # of the generation; null for an original
        ("teacher", text),
        ("teacher_version", text),
        ("generation_seed", number),
        ("completion_tokens", number),
        ("reward", pa.float64()),
        *((f"reward/{label}", pa.float64()) for label in labels),
    ]
    return pa.schema(columns)


def dataset_rows(problem: Problem, answers: Sequence[Answer], recipe: DistillRecipe) -> list[dict[str, Any]]:
    """The rows of one prompt: nothing if no answer is kept.

    Args:
        problem: the prompt.
        answers: decided.
        recipe: of the run; `output.kinds` says which rows there are.
    """
    kept = [answer for answer in answers if answer.is_kept]
    labels = [reward.label for reward in recipe.rewards]
    asked = problem.record.messages
    rows = []
    if kept and "original" in recipe.output.kinds:
        assert problem.original is not None
        nothing = dict.fromkeys(dataset_schema(labels).names)
        rows.append({**nothing, **_chat(problem, "original", (*asked, problem.original), problem.record.id)})
    for answer in kept:
        said = {"role": "assistant", "content": answer.generation.completion}
        for kind in recipe.output.kinds:
            if kind == "original":
                continue
            before = with_system_prompt(asked, recipe.system_prompt if kind == "system_response" else None)
            row = _chat(problem, kind, (*before, said), answer.generation.sample_id)
            rows.append({**row, **_origin(answer), **_scores(answer, labels)})
    return rows


def _chat(problem: Problem, kind: str, messages: Sequence[Message], source: str) -> dict[str, Any]:
    return {
        "id": f"{source}/{kind}",
        "messages": [dict(message) for message in messages],
        "row_kind": kind,
        "problem_kind": problem.kind,
        "prompt_id": problem.record.id,
    }


def _origin(answer: Answer) -> dict[str, Any]:
    generation = answer.generation
    return {
        "sample_id": generation.sample_id,
        "teacher": generation.teacher,
        "teacher_version": generation.teacher_version,
        "generation_seed": generation.seed,
        "completion_tokens": generation.completion_tokens,
    }


def _scores(answer: Answer, labels: Sequence[str]) -> dict[str, Any]:
    judgement = answer.judgement
    return {"reward": judgement.reward, **{f"reward/{label}": judgement.scores.get(label) for label in labels}}


# --- all generations --------------------------------------------------------------------------------------------------


def generations_schema(labels: Sequence[str]) -> pa.Schema:
    """Columns of a generation: all that is known about it."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    columns = [
        ("sample_id", text),
        ("prompt_id", text),
        ("number", number),
        ("problem_kind", text),
        ("prompt", text),  # the last user message
        ("answer", text),  # the reference
        ("completion", text),
        ("kept", pa.bool_()),
        ("reason", text),  # the first to reject it; null when kept
        ("reasons", pa.list_(text)),
        ("reason_details", pa.list_(text)),
        ("teacher_kind", text),
        ("teacher", text),
        ("teacher_version", text),
        ("sampling", text),  # JSON
        ("system_prompt", text),
        ("seed", number),
        ("prompt_digest", text),
        ("finish_reason", text),
        ("prompt_tokens", number),
        ("completion_tokens", number),
        ("reward", pa.float64()),
    ]
    for label in labels:
        columns += [(f"reward/{label}", pa.float64()), (f"status/{label}", text), (f"detail/{label}", text)]
    return pa.schema(columns)


def generation_row(
    problem: Problem, answer: Answer, labels: Sequence[str], common: Mapping[str, Any]
) -> dict[str, Any]:
    """A generation for `generations_schema`.

    Args:
        common: teacher_kind, sampling and system_prompt, which all have in common.
    """
    judgement = answer.judgement
    row = {
        **answer.generation.to_dict(),
        "problem_kind": problem.kind,
        "prompt": shown(problem.record.messages),
        "answer": problem.record.answer,
        "kept": answer.is_kept,
        "reason": answer.reasons[0][0] if answer.reasons else None,
        "reasons": [reason for reason, _ in answer.reasons],
        "reason_details": [detail for _, detail in answer.reasons],
        **common,
        **_scores(answer, labels),
    }
    for label in labels:
        row |= {f"status/{label}": judgement.statuses.get(label), f"detail/{label}": judgement.details.get(label)}
    return row
