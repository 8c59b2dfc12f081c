"""From a benchmark to its problems as chats: rows of the hub, of a local copy, or made here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import Row as FileRow
from data.files import all_rows, find_files, without_none
from eval.benchmarks.base import Benchmark, Hub, Loaded, Problem, Row
from posttrain.types import Message
from rewards.sandbox import Mode, SandboxUnavailableError, shared_pool


def load(
    benchmark: Benchmark,
    *,
    path: str | None = None,
    size: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    languages: Sequence[str] | None = None,
) -> Loaded:
    """The problems of a benchmark, in its order.

    Args:
        benchmark: which.
        path: a local copy with the same columns (a file, or a folder with a file for each split); None: the hub, or what
            the benchmark makes or a package ships.
        size: so many, the first ones; None is all.
        num_fewshot: worked examples before each; None: as the benchmark says.
        seed: of problems that are made.
        languages: of programs; the problems in others are left out. None: all of the benchmark's.

    Raises:
        ValueError: data that cannot be read, a column that is missing, fewer problems than `size`, or no worked examples
            where some are asked for.
    """
    shots = benchmark.num_fewshot if num_fewshot is None else num_fewshot
    left_out = 0
    if path is None and benchmark.generate is not None:
        problems = list(benchmark.generate(size, seed))
    else:
        problems, left_out = _from_rows(benchmark, path, size, languages)
    if not problems or (size is not None and len(problems) < size):
        raise ValueError(f"{benchmark.name} has {len(problems)} problems, fewer than size {size or 1}; lower size")
    before = _demonstrations(benchmark, path, shots) if shots else ()
    chats = tuple((*before, {"role": "user", "content": problem.prompt}) for problem in problems)
    return Loaded(tuple(problems), chats, left_out)


def _from_rows(
    benchmark: Benchmark, path: str | None, size: int | None, languages: Sequence[str] | None
) -> tuple[list[Problem], int]:
    if benchmark.problem is None:
        raise ValueError(f"{benchmark.name} makes its problems itself; remove path")
    problems, left_out = [], 0
    for place, row in rows(benchmark, path):
        missing = [column for column in benchmark.columns if column not in row]
        if missing:
            raise ValueError(
                f"{place}: {benchmark.name} needs the column {missing[0]!r}; the row has {', '.join(row)}; is this a copy of "
                f"{benchmark.hub.path if benchmark.hub else benchmark.name}?"
            )
        try:
            problem = benchmark.problem(row)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{place}: no row of {benchmark.name}: {type(error).__name__}: {error}") from error
        if problem is None or (languages is not None and problem.kind not in languages):
            left_out += 1
            continue
        problems.append(problem)
        if len(problems) == size:
            break
    return problems, left_out


def rows(benchmark: Benchmark, path: str | None, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of every row; a column `config` says which configuration of the hub it is of.

    Raises:
        ValueError: nothing there, or not readable.
    """
    assert benchmark.hub is not None  # a benchmark with rows says where they are
    wanted = split or benchmark.hub.split
    if path is not None and find_files(path, wanted) is not None:
        yield from ((row.place, _object(benchmark, row)) for row in all_rows(path, wanted, None))
        return
    for hub in (benchmark.hub, *(benchmark.more_hubs if path is None else ())):
        yield from _hub_rows(benchmark, hub, path, split or hub.split)


def _hub_rows(benchmark: Benchmark, hub: Hub, path: str | None, wanted: str) -> Iterator[tuple[str, Row]]:
    source = path or hub.path
    revision = hub.revision if source == hub.path else None
    if hub.files and source == hub.path:
        yield from _file_rows(benchmark, hub)
        return
    for config in hub.configs or (None,):
        for row in all_rows(source, wanted, config, revision):
            columns = _object(benchmark, row)
            yield row.place, columns if config is None else {"config": config, **columns}


def _object(benchmark: Benchmark, row: FileRow) -> Row:
    columns = row.columns()
    if not isinstance(columns, dict):
        raise ValueError(f"{row.place}: a row of {benchmark.name} must be an object of columns, not {columns!r:.80}")
    return columns


def _file_rows(benchmark: Benchmark, hub: Hub) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    merged: dict[Any, dict[str, Any]] = {}
    for file in hub.files:
        address = f"hf://datasets/{hub.path}{f'@{hub.revision}' if hub.revision else ''}/{file}"
        try:
            table = load_dataset("json", data_files=address, split="train")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} of {hub.path} cannot be read ({error}); check the network, or give path: a copy of it"
            ) from error
        for index, found in enumerate(table):
            row = without_none(found)
            if hub.join is None:
                yield f"{hub.path}/{file}, row {index}", row
            else:
                merged.setdefault(row[hub.join], {}).update(row)
    for key, row in merged.items():
        if all(column in row for column in benchmark.columns):
            yield f"{hub.path}, {hub.join} {key}", row


def _demonstrations(benchmark: Benchmark, path: str | None, count: int) -> tuple[Message, ...]:
    """Worked examples as turns of the chat."""
    hub = benchmark.hub
    if benchmark.demonstration is None or hub is None or hub.fewshot_split is None:
        raise ValueError(f"{benchmark.name} has no worked examples; set num_fewshot: 0")
    if path is not None and Path(path).is_file():
        raise ValueError(
            f"{benchmark.name} is {count}-shot and {path!r} is one split: give a folder with files {hub.fewshot_split}* and "
            f"{hub.split}*, or set num_fewshot: 0"
        )
    examples = list(islice(rows(benchmark, path, hub.fewshot_split), count))
    if len(examples) < count:
        raise ValueError(
            f"{benchmark.name}: {hub.fewshot_split} has {len(examples)} rows, fewer than num_fewshot {count}"
        )
    turns: list[Message] = []
    for asked, answered in map(benchmark.demonstration, (row for _, row in examples)):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return tuple(turns)


def check(
    benchmark: Benchmark,
    path: str | None,
    *,
    has_judge: bool,
    sandbox: Mode,
    languages: Sequence[str] | None = None,
) -> None:
    """Say before anything heavy what a benchmark lacks.

    Args:
        benchmark: which.
        path: of its data, see `load`.
        has_judge: whether the recipe names one.
        sandbox: its kind, see `rewards.sandbox`.
        languages: those of its programs that are asked for; None: all of them.

    Raises:
        ValueError: no judge, no sandbox, no compiler of a language, or no package that ships the data.
    """
    unknown = [name for name in languages or () if name not in benchmark.languages]
    if unknown:
        raise ValueError(
            f"{benchmark.name} has no problems in {unknown[0]!r}; "
            + (f"use some of {', '.join(benchmark.languages)}" if benchmark.languages else "remove languages")
        )
    if "judge" in benchmark.needs and not has_judge:
        raise ValueError(
            f"{benchmark.name} is graded by a language model: add eval.judge: {{model: ..., base_url: ...}}"
        )
    if "sandbox" in benchmark.needs:
        wanted = benchmark.languages if languages is None else languages
        try:
            for language in wanted or ("python",):
                shared_pool(sandbox, language=language)
        except SandboxUnavailableError as error:
            other = "choose languages" if benchmark.languages else "set eval.sandbox"
            raise ValueError(f"{benchmark.name} runs programs that the model wrote: {error}; or {other}") from error
    if benchmark.name == "humaneval" and path is None and benchmark.generate is not None:
        benchmark.generate(1, 0)
