"""What the SFT stage hangs on its trainer: the end of a step, the log, a polite stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from posttrain.interrupt import StopRequest
from posttrain.metrics import Metric, MetricsLog
from posttrain.model.balance import RouterBalance
from posttrain.model.mtp_objective import MtpObjective
from posttrain.progress import Progress
from posttrain.router_log import RouterLog


class EndStep(TrainerCallback):
    """Moves the routers' correction bias after each optimizer step."""

    def __init__(self, balance: RouterBalance, objective: MtpObjective | None) -> None:
        self._balances = [balance, *([objective.balance] if objective else [])]

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for balance in self._balances:
            balance.end_step()


class LogLoads(TrainerCallback):
    """The load of each expert to router.jsonl, whenever the trainer logs its loss."""

    def __init__(self, log: RouterLog, take_loads: Callable[[], list[list[int]]]) -> None:
        self._log = log
        self._take_loads = take_loads

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if "loss" in (logs or {}):
            self._log.log(state.global_step, self._take_loads())


class LogSteps(TrainerCallback):
    """The trainer's numbers to metrics.jsonl and to the progress display: one line a step, held-out loss included."""

    def __init__(self, log: MetricsLog | None, progress: Progress) -> None:
        self._log = log  # None on ranks but the first
        self._progress = progress
        self._pending: tuple[int, dict[str, Metric]] = (0, {})

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.set_total(state.max_steps)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever `logging_steps` is, a run ends with its numbers

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        metrics = {
            _metric_name(name): Metric(float(value), "mean")
            for name, value in (logs or {}).items()
            if _is_number(value)
        }
        if self._log is None or not ("train/loss" in metrics or "validation/loss" in metrics):
            return
        if state.global_step != self._pending[0]:
            self._flush()
        self._pending = (state.global_step, {**self._pending[1], **metrics})
        self._progress.update(state.global_step, self._pending[1])
        if "validation/loss" in metrics or not control.should_evaluate:
            self._flush()  # before the step's checkpoint, from which a killed run goes on behind this line

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush()
        if self._log is not None:
            self._log.close()

    def _flush(self) -> None:
        step, metrics = self._pending
        if metrics and self._log is not None:
            self._log.log(step, metrics)
        self._pending = (step, {})


def _metric_name(name: str) -> str:
    if "/" in name:
        return name
    return f"validation/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class EarlyStopping(EarlyStoppingCallback):
    """transformers', whose count of evaluations without a better loss goes on where the checkpoint left it."""

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept: Any = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True  # it was killed after its last step


class StopOnRequest(TrainerCallback):
    """Ends the training after the present step when a signal asked for it."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = torch.tensor(float(bool(self._stop)), device=args.device)
        if torch.distributed.is_initialized():  # the signal may reach one rank a step before another
            torch.distributed.all_reduce(stop)
        if stop:
            self._stop.requested = True
            control.should_training_stop = True
