"""Steps that are not taken: a loss or gradient norm that is no number, or a norm beyond the recipe's limit.

A step that is not taken changes neither weights nor optimizer state nor router bias. The schedule goes on: it follows the
steps of the run. After `optimizer.max_skipped_steps` of them in a row something is wrong that waiting does not mend.
"""

from __future__ import annotations

import math

import torch

from posttrain.metrics import Metric
from posttrain.sections import OptimizerSection
from posttrain.skip_watch import IN_A_ROW, SKIPPED


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
