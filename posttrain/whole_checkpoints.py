"""Checkpoints of transformers' Trainer as this project's: whole or not there, with every routed expert in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain import disk
from posttrain.saving import Saver

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class WholeCheckpoints(Base):
    """Put before a trainer class: `class MyTrainer(WholeCheckpoints, SFTTrainer)`, and call `_use_checkpoints`."""

    def _use_checkpoints(
        self,
        directory: Path,
        keep: int,
        write: Callable[[str, dict[str, Any] | None], None],
        made_with: Mapping[str, Any],
    ) -> None:
        """
        Args:
            directory: the run's `checkpoints`.
            keep: how many of them to keep.
            write: puts the model's files into a directory, given all weights where they are spread over ranks.
            made_with: what each checkpoint says of its recipe, see `posttrain.resume`.
        """
        self._checkpoints, self._write, self._made_with = directory, write, made_with
        self._saver = Saver(directory, keep)
        self._trouble: Exception | None = None  # a disk that was full during the present save

    def _cursor(self) -> dict[str, Any]:
        """JSON-able state of the data, kept with a checkpoint."""
        return {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        found = super().train(*args, **kwargs)
        self._settle(require=False)
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not if the checkpoint that the training goes on from was its last: the trainer looks only after a step."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: TRL's card would lie in the trainer's directory and not beside the model."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        written = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        if self.args.should_save:
            self._saver.settle()
            for left in written.parent.glob("checkpoint-*"):  # what a crash left must not get into this one
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._trouble = None
        with self._noting_trouble():
            super()._save_checkpoint(model, trial)
        failed = torch.tensor(float(self._trouble is not None), device=self.args.device)
        if torch.distributed.is_initialized():  # also the barrier after which all ranks have written
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
        if not self.args.should_save:
            return
        if failed:
            self._saver.give_up(step, written, self._trouble or OSError("another rank had no room to write"))
        else:
            progress = {**self._made_with, **self._cursor()}
            self._saver.adopt(written, step, progress, best=self.state.best_global_step)

    def _settle(self, *, require: bool) -> None:
        """Wait until what is being saved is there, on all ranks.

        Raises:
            RunStopped: with `require`, it could not be written.
        """
        if self.args.should_save:
            if require:
                self._saver.require()
            else:
                self._saver.settle()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _noting_trouble(self) -> Iterator[None]:
        """Ranks that go on write and wait for each other as if nothing had happened: the trouble is told afterwards."""
        try:
            yield
        except Exception as error:
            if not disk.is_full(error):
                raise
            self._trouble = self._trouble or error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        with self._noting_trouble():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if self.args.should_save:
                self._write(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._noting_trouble():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._noting_trouble():
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model was loaded from there before it came here.

        The trainer would load fused tensors from a file of single experts, with `strict=False`: each expert would silently
        keep the weights it started with.
        """
