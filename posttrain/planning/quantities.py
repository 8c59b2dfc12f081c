"""Numbers with a unit, a formula and a source, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["bytes", "seconds", "flop", "tokens", "count", "share", "money"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """One number of a plan.

    Attributes:
        name: what it is.
        value: in `unit`.
        formula: how it was computed, with the numbers that went in.
        source: where those come from: the recipe's key, the code, a datasheet, a paper, an assumption.
    """

    name: str
    value: float
    unit: Unit
    formula: str
    source: str

    def line(self) -> str:
        """Name, value, formula and source on a line."""
        return f"  {self.name:<30} {written(self.value, self.unit):>12}  = {self.formula}  [{self.source}]"


def total(name: str, parts: Iterable[Quantity]) -> Quantity:
    """The sum of quantities of one unit.

    Raises:
        ValueError: of several units, or of none.
    """
    parts = list(parts)
    units = {part.unit for part in parts}
    if len(units) != 1:
        raise ValueError(f"{name}: a sum of {sorted(units) or 'nothing'}; add quantities of one unit")
    return Quantity(name, sum(part.value for part in parts), units.pop(), "sum of the lines above", "this plan")


def written(value: float, unit: Unit) -> str:
    """A value for people."""
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return duration(value)
    if unit == "share":
        return f"{value:.0%}"
    if unit == "money":
        return f"{value:,.0f}"
    if unit == "flop":
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def count(value: float) -> str:
    """A count for people: 671B, 1.3M."""
    for bound, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{letter}"
    return f"{value:.4g}"
