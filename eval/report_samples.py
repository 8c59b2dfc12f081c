"""The samples of a run as blocks of columns, the way the page reads them.

A block holds some thousand completions in three parts, since each is needed at another time: the numbers that filters and the
list show, at once; the texts, when rows are on the screen or searched; what is kept of tokens, when one completion is open.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report_run import short

BLOCK = 2000  # completions
HEAD = 140  # characters of a prompt in the list
TOKEN_UNIT = 1e4  # logprobs and advantages are embedded as whole multiples of 1 / TOKEN_UNIT
GAP_UNIT = 1e7  # the same for learner less sampler, which is tiny where all is well
TEXTS = ("completion", "chosen", "rejected")
PROMPTS = ("prompt_id", "pair_id", "prompt")  # what tells prompts apart, the first that is there
KNOWN = {
    "prompt_id", "pair_id", "prompt", "completion", "answer", "reward", "score", "advantage", "policy_version",
    "finish_reason", "length", "completion_tokens", "problem_kind", "episode", "kind", "mode", "chosen",
    "rejected", "chosen_score", "rejected_score",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """What a page embeds at most; beyond it, groups that are evenly spread over the steps."""

    samples: int = 50_000
    characters: int = 64_000_000  # of completions
    tokens: int = 500_000  # of completions with token columns

    def among(self, runs: int) -> Budget:
        """An equal share for each of so many runs."""
        runs = max(1, runs)
        return Budget(self.samples // runs, self.characters // runs, self.tokens // runs)


@dataclass(slots=True)
class SampleBlock:
    """Columns of some completions; prompts are kept once."""

    rows: dict[str, Any]
    texts: dict[str, Any]
    tokens: dict[str, Any]


@dataclass(slots=True)
class Samples:
    """The blocks of a run, and how many completions there are in all."""

    total: int
    blocks: list[SampleBlock] = field(default_factory=list)


def read_samples(directory: Path, budget: Budget) -> Samples:
    """The samples of a run, evaluations first, then rollouts in the order of their steps."""
    return read_files(sample_files(directory), budget)


def sample_files(directory: Path) -> list[Path]:
    """Parquet files of a samples directory; none where it does not exist yet."""
    return sorted(directory.glob("*.parquet"), key=lambda file: (file.stem.startswith("step-"), file.stem))


def other_files(directory: Path) -> int:
    """How many files of samples are not of a step: evaluations, a teacher's answers."""
    return sum(not file.stem.startswith("step-") for file in sample_files(directory))


def read_files(files: Sequence[Path], budget: Budget) -> Samples:
    """The samples of some files; those without texts of completions are left out."""
    files = [file for file in files if _has_texts(file)]
    sizes = [_size(file) for file in files]
    total, characters = sum(count for count, _ in sizes), sum(size for _, size in sizes)
    share = min(1.0, budget.samples / max(1, total), budget.characters / max(1, characters))
    samples = Samples(total)
    builder, seen, tokens_left = _Builder(), 0, budget.tokens
    tokens_per_file = budget.tokens / max(1, len(files))
    for number, file in enumerate(files):
        # What a file does not use of its share is there for those after it.
        allowed = tokens_per_file * (number + 1) - (budget.tokens - tokens_left)
        rows: list[int] = []
        for group in _groups(_prompt_ids(file)):
            seen += 1
            if math.floor(seen * share) > math.floor((seen - 1) * share):
                rows += group
        for record in _records(file, rows):
            used = len(record.get("token_ids") or ())
            with_tokens = 0 < used <= allowed
            if with_tokens:
                allowed, tokens_left = allowed - used, tokens_left - used
            builder.add(record, file.stem, with_tokens=with_tokens)
            if builder.count >= BLOCK:
                samples.blocks.append(builder.build())
                builder = _Builder()
    if builder.count:
        samples.blocks.append(builder.build())
    return samples


def _has_texts(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = set(pq.read_schema(file).names)
    except pa.ArrowInvalid:  # it is still being written
        return False
    return bool(names & set(TEXTS)) and bool(names & set(PROMPTS))


def _size(file: Path) -> tuple[int, int]:
    """Completions of a file, and characters in them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = [name for name in TEXTS if name in pq.read_schema(file).names]
    table = pq.read_table(file, columns=names)
    return table.num_rows * len(names), sum(pc.sum(pc.utf8_length(table[name])).as_py() or 0 for name in names)


def _prompt_ids(file: Path) -> list[str]:
    """The prompt of each row."""
    import pyarrow.parquet as pq

    names = pq.read_schema(file).names
    name = next(name for name in PROMPTS if name in names)
    return [str(value) for value in pq.read_table(file, columns=[name])[name].to_pylist()]


def _groups(prompt_ids: Sequence[str]) -> Iterator[list[int]]:
    """Rows that are neighbours and of the same prompt."""
    for _, group in itertools.groupby(enumerate(prompt_ids), key=lambda pair: pair[1]):
        yield [row for row, _ in group]


def _records(file: Path, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Some rows of a file; a pair is two, the better and the worse answer."""
    import pyarrow.parquet as pq

    if not rows:
        return
    for row in pq.read_table(file).take(rows).to_pylist():
        if "chosen" not in row:
            yield row
            continue
        for mode in ("chosen", "rejected"):
            yield {**row, "completion": row[mode], "score": row[f"{mode}_score"], "mode": mode}


def _prompt_id(record: Mapping[str, Any]) -> str:
    return str(record.get("prompt_id", record.get("pair_id", record.get("prompt", ""))))


def _task(record: Mapping[str, Any]) -> str:
    """Where a problem comes from: its kind, or for older files what its id begins with."""
    return str(
        record.get("kind") or record.get("problem_kind") or _prompt_id(record).split("/train/")[0].split("/eval/")[0]
    )


class _Builder:
    """A block in the making."""

    def __init__(self) -> None:
        self.count = 0
        self._prompts: dict[str, int] = {}
        self._heads: dict[str, list[Any]] = {"id": [], "head": [], "answer": [], "task": []}
        self._prompt_texts: list[str] = []
        self._sources: dict[str, int] = {}
        names = ("prompt", "source", "reward", "advantage", "length", "finish", "version", "mode")
        self._columns: dict[str, list[Any]] = {name: [] for name in names}
        self._components: dict[str, list[Any]] = {}
        self._statuses: dict[str, dict[str, str]] = {}
        self._texts: list[str] = []
        self._episodes: dict[str, str] = {}
        self._extras: dict[str, dict[str, Any]] = {}
        self._tokens: dict[str, Any] = {}

    def add(self, record: Mapping[str, Any], source: str, *, with_tokens: bool) -> None:
        """Take a row of a file."""
        row, values = str(self.count), self._columns
        values["prompt"].append(self._prompt(record))
        values["source"].append(self._sources.setdefault(source, len(self._sources)))
        values["reward"].append(short(record.get("reward", record.get("score"))))
        values["advantage"].append(short(record.get("advantage")))
        values["length"].append(record.get("length", record.get("completion_tokens")))
        values["finish"].append(record.get("finish_reason"))
        values["version"].append(record.get("policy_version"))
        values["mode"].append(record.get("mode"))
        self._texts.append(record.get("completion") or "")
        if record.get("episode"):
            self._episodes[row] = record["episode"]
        extra = {}
        for name, value in record.items():
            family, _, rest = name.partition("/")
            if family == "reward" and rest:
                self._components.setdefault(rest, [None] * self.count).append(short(value))
            elif family == "status" and rest:
                if value not in (None, "ok"):
                    self._statuses.setdefault(rest, {})[row] = value
            elif name not in KNOWN and not name.startswith("token_") and value not in (None, "", []):
                extra[name] = ", ".join(map(str, value)) if isinstance(value, list) else short(value)
        if extra:
            self._extras[row] = extra
        for column in self._components.values():
            column.extend([None] * (self.count + 1 - len(column)))
        if with_tokens:
            self._tokens[row] = _tokens(record)
        self.count += 1

    def _prompt(self, record: Mapping[str, Any]) -> int:
        name = _prompt_id(record)
        if name not in self._prompts:
            self._prompts[name] = len(self._prompts)
            text = str(record.get("prompt") or "")
            answer = record.get("answer")
            for key, value in (("id", name), ("head", text[:HEAD]), ("answer", answer), ("task", _task(record))):
                self._heads[key].append(value)
            self._prompt_texts.append(text)
        return self._prompts[name]

    def build(self) -> SampleBlock:
        """The block."""
        # Columns of one value, or of none, are written as that value.
        values = {name: column[0] if len(set(column)) == 1 else column for name, column in self._columns.items()}
        rows = {
            "count": self.count,
            "prompts": self._heads,
            "sources": list(self._sources),
            "columns": values,
            "components": self._components,
            "statuses": self._statuses,
            "tokens": [int(row) for row in self._tokens],
        }
        texts = {
            "completions": self._texts, "prompts": self._prompt_texts, "episodes": self._episodes, "extras": self._extras
        }  # fmt: skip
        return SampleBlock(rows, texts, self._tokens)


def _tokens(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a completion's tokens, as whole numbers (see TOKEN_UNIT and GAP_UNIT)."""
    sampler, learner = record["token_logprobs"], record.get("token_learner_logprobs")
    reference, advantages = record.get("token_ref_logprobs"), record.get("token_advantages")
    found = {"texts": record["token_texts"], "ids": record["token_ids"], "logprob": _whole(sampler, TOKEN_UNIT)}
    if learner:
        found["gap"] = _whole([a - b for a, b in zip(learner, sampler, strict=True)], GAP_UNIT)
        if reference:
            found["reference"] = _whole([a - b for a, b in zip(learner, reference, strict=True)], TOKEN_UNIT)
    if advantages:
        found["advantage"] = _whole(advantages, TOKEN_UNIT)
    return found


def _whole(values: Sequence[float], unit: float) -> list[int | None]:
    return [round(value * unit) if math.isfinite(value) else None for value in values]
