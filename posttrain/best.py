"""Which checkpoint of a run did best on held-out problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BestCheckpoint:
    """The step with the highest pass@1 so far; of equal ones the first. Goes into every checkpoint, so resuming keeps it."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._value = 0.0

    def take(self, step: int, value: float) -> bool:
        """Whether `value`, measured at `step`, is the highest so far; then it is remembered."""
        if self.step is not None and value <= self._value:
            return False
        self.step, self._value = step, value
        return True

    def state(self) -> dict[str, Any]:
        """JSON-able, see `restore`."""
        return {"step": self.step, "value": self._value}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.step, self._value = state["step"], float(state["value"])
