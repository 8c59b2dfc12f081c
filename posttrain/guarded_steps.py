"""TRL's trainers with a guard before each optimizer step (posttrain/step_guard.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from posttrain import checkpoint
from posttrain.disk import warn
from posttrain.errors import RunStopped
from posttrain.optimizer import set_hyperparameters
from posttrain.sections import OptimizerSection
from posttrain.skip_watch import SKIPPED, SkipWatch
from posttrain.step_guard import StepGuard
from posttrain.whole_checkpoints import WholeCheckpoints

_PREFIX = "train"  # of the guard's metrics


class GuardedSteps(WholeCheckpoints):
    """Put before a trainer class, and call `_use_checkpoints` and `_use_guard`.

    The trainer asks for the gradient norm after the backward passes and steps right afterwards, whatever it is. A step that
    must not be taken loses its gradients there, and an optimizer leaves parameters without gradient alone.

    After too many of them in a row, weights and optimizer are those of the newest checkpoint again, and the training goes on
    with the rows that come next. Where no step is taken from there either it ends.
    """

    def _use_guard(self, section: OptimizerSection, take_weights: Callable[[Path], None]) -> None:
        """
        Args:
            section: of the recipe.
            take_weights: puts those of a checkpoint of this run into the model in training.
        """
        self._section = section
        self._take_weights = take_weights
        self.guard = StepGuard(section, self.args.device)
        self._skipped = 0  # since the last log
        self.watch = SkipWatch(section, _PREFIX)
        self.add_callback(_AfterSkips(self))

    def _forget_step(self) -> None:
        """Leave out what was observed in the step that is not taken."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.see(loss)
        # The trainer adds losses up over steps, and its sum would never be a number again.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        if not self.guard.allows(float(found)):
            model.zero_grad(set_to_none=True)
            self._forget_step()
            self._skipped += 1
            if self.accelerator.is_main_process:
                warn(f"step {self.state.global_step + 1} was not taken: {self.guard.reason}")
        return found

    def go_back(self) -> bool:
        """To the newest checkpoint, from before the steps that were not taken. False: there is none."""
        self._settle(require=False)
        newest = checkpoint.newest_trained(self._checkpoints)
        if newest is None:
            return False
        schedule = self.lr_scheduler.state_dict()  # it follows the steps of the run, which go on
        self._take_weights(newest)
        super()._load_optimizer_and_scheduler(str(newest))
        self.lr_scheduler.load_state_dict(schedule)
        set_hyperparameters(self.optimizer, self.lr_scheduler, self._section)
        if self.accelerator.is_main_process:
            warn(
                f"{self.guard.in_a_row} steps in a row were not taken, so weights and optimizer are those of {newest.name} "
                f"again; the training goes on after step {self.state.global_step}"
            )
        self.guard.in_a_row = 0
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            set_hyperparameters(self.optimizer, self.lr_scheduler, self._section)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, f"{SKIPPED}_steps": self._skipped}
            self._skipped = 0
        super().log(logs, start_time)

    def require_progress(self, checkpoints: Path) -> None:
        """Call it after the training.

        Raises:
            RunStopped: it has ended because too many steps in a row were not taken.
        """
        if not self.guard.is_exhausted:
            return
        newest = checkpoint.newest_trained(checkpoints)
        go_on = "there is no checkpoint yet: start again"
        if newest is not None:
            go_on = f"{newest.name} is the newest checkpoint, from before them: go on from there with --resume"
        raise RunStopped(
            f"{self.guard.in_a_row} steps in a row were not taken, the last one at step {self.state.global_step}: "
            f"{self.guard.reason}; {go_on} and a lower optimizer.learning_rate (--allow-change optimizer.learning_rate), or "
            f"look at the data of those steps"
        )


class _AfterSkips(TrainerCallback):
    """No checkpoint of doubtful steps; after too many of them back, or an end."""

    def __init__(self, trainer: GuardedSteps) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        guard = self._trainer.guard
        if guard.in_a_row:
            control.should_save = False
        todo = self._trainer.watch.look(guard.metrics(_PREFIX))
        if todo == "stop" or (todo == "rollback" and not self._trainer.go_back()):
            control.should_log = control.should_training_stop = True
