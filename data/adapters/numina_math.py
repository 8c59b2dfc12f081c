r"""AI-MO/NuminaMath-CoT: `problem`, `solution` with the answer in a \boxed{}, `source`, `messages` of the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata
from rewards.extract import last_boxed


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A problem with its boxed answer and its worked solution; proofs, which have no box, are left out."""
    problem, solution = column(row, "problem"), column(row, "solution")
    answer = last_boxed(solution)
    if answer is None or not answer.strip():
        return None
    return {"prompt": problem, "answer": answer.strip(), "worked": solution.strip(), **metadata(row, "source")}
