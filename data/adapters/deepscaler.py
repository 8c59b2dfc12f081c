"""agentica-org/DeepScaleR-Preview-Dataset: `problem`, `answer`, and a `solution` that may be empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem with its answer and, where there is one, its worked solution."""
    solution = row.get("solution")
    worked = {"worked": solution.strip()} if isinstance(solution, str) and solution.strip() else {}
    return {"prompt": column(row, "problem"), "answer": str(column(row, "answer", (str, int, float))), **worked}
