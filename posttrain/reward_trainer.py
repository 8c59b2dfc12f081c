"""TRL's RewardTrainer for MoE reward models: whole checkpoints, and held-out pairs scored as a reward scores them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import RewardTrainer

from data.tasks import task_names
from posttrain.guarded_steps import GuardedSteps
from posttrain.model.reward_head import RewardModelFiles
from posttrain.reward_data import EncodedPair
from posttrain.reward_metrics import ScoredPair, accuracy, bradley_terry_mean
from posttrain.sections import OptimizerSection
from rewards import task_answer
from rewards.learned import raw_scores


class RewardModelTrainer(GuardedSteps, RewardTrainer):
    """The loss is TRL's: -log sigmoid(chosen - rejected - margin), plus centring; the rest is ours.

    Args:
        files: writes the reward model.
        checkpoints: the run's directory of checkpoints.
        keep: how many to keep.
        made_with: what they say of their recipe, see `posttrain.resume`.
        section: of the recipe, for the optimizer.
        take_weights: puts those of a checkpoint of this run into the reward model.
        held_out: pairs to measure on.
        score_batch_size: chats scored together.
        **settings: RewardTrainer's.
    """

    def __init__(
        self,
        *,
        files: RewardModelFiles,
        checkpoints: Path,
        keep: int,
        made_with: Mapping[str, Any],
        section: OptimizerSection,
        take_weights: Callable[[Path], None],
        held_out: Sequence[EncodedPair],
        score_batch_size: int,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._use_checkpoints(checkpoints, keep, files.write, made_with)
        self._use_guard(section, take_weights)
        self._files = files
        self._held_out = held_out
        self._score_batch_size = score_batch_size

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and accuracy on the held-out pairs, whatever batches they come in; each rank scores them all."""
        scored = self.score_held_out()
        share = accuracy(scored)
        assert share is not None  # the stage refuses an empty set
        found = {
            f"{metric_key_prefix}_loss": bradley_terry_mean(scored),
            f"{metric_key_prefix}_accuracy": share["value"],
        }
        self.model.eval()  # the log names its metrics by the mode
        self.log(found)
        self.model.train()
        control: Any = getattr(self, "control")  # noqa: B009  # its type is not known where TRL is not followed
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, found)
        return found

    def score_held_out(self) -> list[ScoredPair]:
        """The held-out pairs with the present weights' scores."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        sequences = [ids for pair in self._held_out for ids in (pair.chosen_ids, pair.rejected_ids)]
        scores = raw_scores(model, sequences, self._score_batch_size)
        model.train(was_training)
        return [
            _scored(pair, chosen, rejected)
            for pair, chosen, rejected in zip(self._held_out, scores[::2], scores[1::2], strict=True)
        ]

    def save_last(self, normalization: dict[str, float] | None) -> Path:
        """The present step as a whole checkpoint, with the normalisation once the run is finished.

        Raises:
            RunStopped: the disk is full.
        """
        self._files.normalization = normalization
        self._save_checkpoint(self.model, None)
        self._settle(require=True)
        return self._checkpoints / f"step-{self.state.global_step}"

    def last_metrics(self) -> dict[str, float]:
        """Loss and accuracy of the last logged training steps."""
        logged = [line for line in self.state.log_history if "loss" in line]
        return {name: logged[-1][name] for name in ("loss", "accuracy")} if logged else {}


def _scored(encoded: EncodedPair, chosen: float, rejected: float) -> ScoredPair:
    pair = encoded.pair
    task = pair.metadata.get("task")
    verdicts: list[bool | None] = [None, None]
    if pair.answer is not None and task in task_names():
        texts = (pair.chosen[-1]["content"], pair.rejected[-1]["content"])
        verdicts = [task_answer.score(text, pair.answer, task) == 1.0 for text in texts]
    lengths = len(encoded.chosen_ids), len(encoded.rejected_ids)
    return ScoredPair(chosen, rejected, pair.margin, pair.kind, *lengths, *verdicts)


def sample_rows(pairs: Sequence[EncodedPair], scored: Sequence[ScoredPair]) -> list[dict[str, Any]]:
    """Held-out pairs with their scores, to look at."""
    return [
        {
            "pair_id": encoded.pair.id,
            "kind": encoded.pair.kind,
            "prompt": json.dumps([dict(message) for message in encoded.pair.chosen[:-1]]),
            "chosen": encoded.pair.chosen[-1]["content"],
            "rejected": encoded.pair.rejected[-1]["content"],
            "chosen_score": scores.chosen,
            "rejected_score": scores.rejected,
            "chosen_right": scores.chosen_right,
            "rejected_right": scores.rejected_right,
        }
        for encoded, scores in zip(pairs, scored, strict=True)
    ]
