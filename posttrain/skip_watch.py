"""What a stage does about optimizer steps that were not taken (posttrain/step_guard.py says which)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.metrics import Metric
from posttrain.sections import OptimizerSection

SKIPPED = "skipped"  # metric: steps that were not taken
IN_A_ROW = "skipped_in_a_row"  # metric: of them, those without a good one since


class SkipWatch:
    """After too many steps in a row that were not taken the run goes back, once, and then stops.

    Args:
        section: of the recipe.
        prefix: of the metrics of the guard.
    """

    def __init__(self, section: OptimizerSection, prefix: str) -> None:
        self._patience = section.max_skipped_steps
        self._prefix = prefix
        self._went_back = False
        self.in_a_row = 0  # steps that were skipped since the last that was taken

    def look(self, metrics: Mapping[str, Metric]) -> str:
        """What to do: "" (nothing), "rollback" or "stop".

        Args:
            metrics: of all optimizer steps of a batch; without the guard's no step was tried.
        """
        found = metrics.get(f"{self._prefix}/{IN_A_ROW}")
        if found is None:
            return ""
        skipped, self.in_a_row = metrics[f"{self._prefix}/{SKIPPED}"].value, int(found.value)
        if not skipped or not self.in_a_row:
            self._went_back = False
        if self.in_a_row < self._patience:
            return ""
        self.in_a_row = 0
        if self._went_back:
            return "stop"
        self._went_back = True
        return "rollback"

    def state(self) -> dict[str, Any]:
        """JSON-able, for `restore`."""
        return {"in_a_row": self.in_a_row, "went_back": self._went_back}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.in_a_row, self._went_back = int(state["in_a_row"]), bool(state["went_back"])
