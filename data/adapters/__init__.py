"""Adapters: functions that turn a row of a published dataset into a row with our columns.

    def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None

What comes back is a row as `data.records.parse_row` or `data.pairs.parse_pair` reads it; other columns are metadata, which
rewards see. None leaves the row out: there is nothing in it to learn from. What is not as expected is a ValueError, which
`column` raises with the name of the column; file and row are put in front of it here.

An adapter is named in the recipe: a shipped one by its name, one's own as `module:function` or `path/to/file.py:function`.
The hub names below need no naming.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from data.files import Row

Makes = Literal["records", "pairs"]
Adapter = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Shipped:
    """An adapter of this package: `data.adapters.<name>:adapt`."""

    name: str
    makes: Makes
    hub_names: tuple[str, ...]  # datasets with exactly these columns


SHIPPED = (
    Shipped("dapo_math", "records", ("BytedTsinghua-SIA/DAPO-Math-17k",)),
    Shipped("deepscaler", "records", ("agentica-org/DeepScaleR-Preview-Dataset",)),
    Shipped("gsm8k", "records", ("openai/gsm8k",)),
    Shipped("helpsteer3", "pairs", ("nvidia/HelpSteer3",)),
    Shipped("numina_math", "records", ("AI-MO/NuminaMath-CoT",)),
    Shipped("openr1_math", "records", ("open-r1/OpenR1-Math-220k",)),
    Shipped("ultrafeedback", "pairs", ("HuggingFaceH4/ultrafeedback_binarized",)),
    Shipped("verifiable_coding", "records", ("open-r1/verifiable-coding-problems-python",)),
)


def adapter_for(path: str, named: str | None, columns: Mapping[str, str], makes: Makes) -> str | None:
    """The adapter of a dataset: the one that the recipe names, else that of its hub name; None for rows as they are.

    A recipe that maps columns itself wants no adapter.
    """
    if named is not None or columns:
        return named
    found = [shipped.name for shipped in SHIPPED if path in shipped.hub_names and shipped.makes == makes]
    return found[0] if found else None


@cache
def resolve_adapter(spec: str, makes: Makes) -> Adapter:
    """The function that a recipe names.

    Args:
        spec: a shipped name, `module:function` or `path/to/file.py:function`.
        makes: what is wanted of it.

    Raises:
        ValueError: nothing of that name, or a shipped one that makes something else.
    """
    if ":" in spec or spec.endswith(".py"):
        from rewards.resolve import find

        function: Adapter = find(spec, "adapter", "function")
        if not callable(function):
            raise ValueError(f"adapter {spec!r} is no function; name one that takes a row")
        return function
    shipped = {one.name: one for one in SHIPPED}
    if spec not in shipped:
        raise ValueError(
            f"adapter {spec!r} is unknown; the shipped ones are {', '.join(shipped)}; your own is named module:function or "
            f"path/to/file.py:function"
        )
    if shipped[spec].makes != makes:
        fits = ", ".join(name for name, one in shipped.items() if one.makes == makes)
        raise ValueError(f"adapter {spec!r} makes {shipped[spec].makes}, and {makes} are wanted here: {fits}")
    adapt: Adapter = importlib.import_module(f"data.adapters.{spec}").adapt
    return adapt


def adapted(rows: Iterator[Row], spec: str, makes: Makes) -> Iterator[Row]:
    """The rows with our columns; those that the adapter leaves out are not there. Indices and places stay the source's.

    Raises:
        ValueError: a row that is not as the adapter expects; the message begins with its place.
    """
    adapt = resolve_adapter(spec, makes)
    for row in rows:
        value = row.columns()
        if not isinstance(value, Mapping):
            raise ValueError(f"{row.place}: a row must be an object of columns, not {value!r:.80}")
        try:
            made = adapt(value)
        except ValueError as error:
            raise ValueError(f"{row.place}: adapter {spec}: {error}") from error
        if made is None:
            continue
        if not isinstance(made, Mapping):
            raise ValueError(f"{row.place}: adapter {spec} must return an object of columns or None, not {made!r:.80}")
        yield Row(row.source, row.index, made, row.line)


def column(row: Mapping[str, Any], path: str, kind: type | tuple[type, ...] = str) -> Any:
    """The value of a column, or of a field inside of one.

    Args:
        path: e.g. "problem" or "reward_model.ground_truth".
        kind: what it must be.

    Raises:
        ValueError: it is not there or of another kind.
    """
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise ValueError(f"needs the column {path}; the row has {', '.join(map(str, row)) or 'none'}")
        value = value[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"column {path} must be {' or '.join(one.__name__ for one in kinds)}, not {value!r:.80}")
    return value


def metadata(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the columns that the row has."""
    return {name: row[name] for name in names if row.get(name) is not None}
