"""Numbers that papers and model cards publish, beside those measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True, slots=True)
class Published:
    """One published number."""

    model: str
    value: float  # per cent
    source: str  # where it was read


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One benchmark of the published tables."""

    name: str
    metric: str  # as published
    numbers: tuple[Published, ...]


@cache
def published_rows() -> Mapping[str, PublishedRow]:
    """Row name -> row, in the order of the file.

    Raises:
        ValueError: the file is not what it should be.
    """
    tree = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    sources: dict[str, str] = tree["sources"]
    found: dict[str, PublishedRow] = {}
    for table in tree["tables"]:
        if table["source"] not in sources:
            raise ValueError(f"{FILE.name}: table of the unknown source {table['source']!r}")
        for name, row in table["rows"].items():
            values = row["values"]
            if len(values) != len(table["models"]):
                raise ValueError(f"{FILE.name}: {name}: {len(values)} values for {len(table['models'])} models")
            numbers = [
                Published(model, float(value), sources[table["source"]])
                for model, value in zip(table["models"], values, strict=True)
                if value is not None
            ]
            known = found.get(name, PublishedRow(name, row["metric"], ()))
            fresh = [n for n in numbers if n.model not in {old.model for old in known.numbers}]
            found[name] = PublishedRow(name, known.metric, (*known.numbers, *fresh))
    return found


def models(rows: Mapping[str, PublishedRow]) -> list[str]:
    """Every model that one of the rows has a number of, in their order."""
    return list(dict.fromkeys(number.model for row in rows.values() for number in row.numbers))


def comparison(results: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """A Markdown table: the measured benchmarks that have published numbers, beside those.

    Args:
        results: suite -> `EvalResult.to_dict()`.
        name: of the model that was evaluated.

    Returns:
        The table and notes on how each number was measured; empty where no benchmark has published numbers.
    """
    rows = published_rows()
    ours = {suite: result for suite, result in results.items() if result.get("published") in rows}
    if not ours:
        return ""
    shown = {str(result["published"]): rows[str(result["published"])] for result in ours.values()}
    columns = models(shown)
    lines = [
        f"| Benchmark (published metric) | {name} [95%] | n | {' | '.join(columns)} |",
        f"|---|---:|---:|{'---:|' * len(columns)}",
    ]
    notes = []
    for result in ours.values():
        row = rows[str(result["published"])]
        found, values = result["pass_at_1"], {number.model: f"{number.value:g}" for number in row.numbers}
        cells = [values.get(model, "-") for model in columns]
        own = f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
        lines.append(f"| {row.name} ({row.metric}) | {own} | {found['n']:.0f} | {' | '.join(cells)} |")
        drawn = (
            f"{result['num_samples']} sample(s), temperature {result['temperature']:g}, {result['num_fewshot']}-shot"
        )
        departs = f". Departs: {result['departs']}" if result["departs"] else ""
        departs += f". Languages: {', '.join(result['languages'])}" if result.get("languages") else ""
        limit = f", {result['max_completion_length']} tokens" if result.get("max_completion_length") else ""
        notes.append(f"- {row.name}: {result['metric']}, {drawn}{limit}{departs}.")
    sources = dict.fromkeys(number.source for row in shown.values() for number in row.numbers)
    return "\n".join([*lines, "", "Measured here:", "", *notes, "", f"Published numbers: {'; '.join(sources)}.", ""])
