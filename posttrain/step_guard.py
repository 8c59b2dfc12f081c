"""Steps that are not taken: a loss or gradient norm that is no number, or a norm beyond the recipe's limit.

A step that is not taken changes neither weights nor optimizer state nor router bias. The schedule goes on: it follows the
steps of the run. After `optimizer.max_skipped_steps` of them in a row something is wrong that waiting does not mend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from posttrain.metrics import Metric
from posttrain.sections import OptimizerSection

SKIPPED = "skipped"  # metric: steps that were not taken
IN_A_ROW = "skipped_in_a_row"  # metric: of them, those without a good one since


class StepGuard:
    """Looks at each step of one optimizer before it is taken.

    Args:
        section: of the recipe.
        device: where losses are.
    """

    def __init__(self, section: OptimizerSection, device: torch.device | None = None) -> None:
        self._limit = math.inf if section.skip_grad_norm is None else section.skip_grad_norm
        self._patience = section.max_skipped_steps
        self._finite = torch.ones((), device=device)
        self.in_a_row = 0
        self.reason = ""  # why the last step was not taken

    def see(self, loss: torch.Tensor) -> None:
        """A microbatch's loss, a scalar; it is not waited for."""
        self._finite = torch.minimum(self._finite, torch.isfinite(loss.detach()).to(self._finite))

    def allows(self, grad_norm: float) -> bool:
        """Whether the step may be taken; the same on all ranks, which must all ask.

        Args:
            grad_norm: of the whole gradient, before clipping.
        """
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._finite, torch.distributed.ReduceOp.MIN)
        is_finite = bool(self._finite)
        self.forget()
        self.reason = ""
        if not math.isfinite(grad_norm):
            self.reason = f"the gradient norm is {grad_norm}"
        elif not is_finite:
            self.reason = "the loss is no number"
        elif grad_norm > self._limit:
            self.reason = f"the gradient norm is {grad_norm:.3g} (limit optimizer.skip_grad_norm={self._limit:g})"
        self.in_a_row = self.in_a_row + 1 if self.reason else 0
        return not self.reason

    def forget(self) -> None:
        """Leave out the losses since the last step, whose gradients are dropped."""
        self._finite = torch.ones_like(self._finite)

    @property
    def is_exhausted(self) -> bool:
        """Whether as many steps in a row were skipped as the recipe has patience for."""
        return self.in_a_row >= self._patience

    def metrics(self, prefix: str) -> dict[str, Metric]:
        """Of the step that was looked at last."""
        return {
            f"{prefix}/{SKIPPED}": Metric(float(bool(self.reason)), "sum"),
            f"{prefix}/{IN_A_ROW}": Metric(float(self.in_a_row), "last"),
        }


class SkipWatch:
    """What a loop does about steps that its learner did not take: after too many in a row it goes back, once, then stops.

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
