"""Checkpoints of transformers' Trainer as this project's: whole or not there, with every routed expert in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class WholeCheckpoints(Base):
    """Put before a trainer class: `class MyTrainer(WholeCheckpoints, SFTTrainer)`, and call `_use_checkpoints`."""

    def _use_checkpoints(self, directory: Path, keep: int, write: Callable[[str, dict[str, Any] | None], None]) -> None:
        """
        Args:
            directory: the run's `checkpoints`.
            keep: how many of them to keep.
            write: puts the model's files into a directory, given all weights where they are spread over ranks.
        """
        self._checkpoints, self._keep, self._write = directory, keep, write

    def _cursor(self) -> dict[str, Any]:
        """JSON-able state of the data, kept with a checkpoint."""
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            written = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
            best = self.state.best_global_step
            checkpoint.adopt(written, self._checkpoints, step, self._cursor(), keep=self._keep, best=best)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            self._write(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model was loaded from there before it came here.

        The trainer would load fused tensors from a file of single experts, with `strict=False`: each expert would silently
        keep the weights it started with.
        """
