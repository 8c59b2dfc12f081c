"""What the reward model stage puts together: model, pairs and trainer, and the proof of what it saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback
from trl import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference

from data.templates import set_chat_template
from posttrain.errors import RunStopped
from posttrain.learner_parallel import load_weights
from posttrain.model import load
from posttrain.model.reward_head import RewardModelFiles, load_reward_model
from posttrain.records import data_errors
from posttrain.reward_data import PairSets, load_pairs, set_pad_token
from posttrain.reward_metrics import ScoredPair
from posttrain.reward_model_recipe import RewardModelRecipe
from posttrain.reward_trainer import RewardModelTrainer
from posttrain.run_dir import RunDir
from posttrain.trainer_arguments import common_arguments
from rewards.learned import RewardModel, raw_scores, read_reward_model

LARGEST_RELOAD_GAP = 1e-4  # of a score, float32
COMPARED_PAIRS = 16


@dataclass(frozen=True)
class RewardJob:
    """Everything loaded and ready to train."""

    model: Any
    tokenizer: Any
    pairs: PairSets
    is_main: bool


def load_job(recipe: RewardModelRecipe, last: Path | None, ranks: PartialState) -> RewardJob:
    """Load model and pairs.

    Args:
        recipe: of the run.
        last: the run's own checkpoint to go on from, None at the start.
        ranks: of this run.

    Raises:
        RunStopped: nothing to train on, no padding token of its own, or a way to spread weights that is not known here.
        ValueError: a row that is no pair, or a checkpoint that lacks weights.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise RunStopped("a reward model is trained with plain data parallelism; start the ranks without FSDP")
    path = str(last or recipe.model.model_name_or_path)
    tokenizer = load.load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.training.chat_template is not None:
        set_chat_template(tokenizer, recipe.training.chat_template)
    set_pad_token(tokenizer, recipe.training.pad_token)
    with data_errors("datasets"):
        pairs = load_pairs(recipe, tokenizer)
    model = load_model(recipe, path)
    return RewardJob(model, tokenizer, pairs, ranks.is_main_process)


def load_model(recipe: RewardModelRecipe, path: str) -> Any:
    """A policy's checkpoint with a new head, or a reward model's."""
    return load_reward_model(
        path,
        head_init_std=recipe.training.head_init_std,
        seed=recipe.seed,
        attn_implementation=recipe.model.attn_implementation,
        experts_implementation=recipe.model.experts_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def build_trainer(
    recipe: RewardModelRecipe, run_dir: RunDir, job: RewardJob, made_with: Mapping[str, Any] | None = None
) -> RewardModelTrainer:
    """The trainer, ready to run. `made_with` goes into its checkpoints, see `posttrain.resume`."""
    from datasets import Dataset

    trainer = RewardModelTrainer(
        files=RewardModelFiles(job.model, job.tokenizer),
        checkpoints=run_dir.checkpoints,
        keep=recipe.checkpoint.save_total_limit,
        made_with=made_with or {},
        section=recipe.optimizer,
        take_weights=lambda path: load_weights(job.model, load_model(recipe, str(path)).state_dict()),
        held_out=job.pairs.held_out,
        score_batch_size=recipe.validation.batch_size,
        model=job.model,
        processing_class=job.tokenizer,
        args=trainer_arguments(recipe, run_dir.path),
        train_dataset=Dataset.from_list([pair.row() for pair in job.pairs.train]),
        # The trainer asks for one; RewardModelTrainer.evaluate scores the held-out pairs themselves.
        eval_dataset=Dataset.from_list([pair.row() for pair in job.pairs.held_out]),
        data_collator=DataCollatorForPreference(pad_token_id=job.tokenizer.pad_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_arguments(recipe: RewardModelRecipe, run_dir: Path) -> RewardConfig:
    """The recipe in TRL's words."""
    training, validation = recipe.training, recipe.validation
    watching = {"eval_strategy": "steps", "eval_steps": validation.eval_steps} if validation.eval_steps else {}
    return RewardConfig(
        **common_arguments(training, recipe.optimizer, recipe.checkpoint, seed=recipe.seed, run_dir=run_dir),
        max_length=None,  # reward_data.py has left out what is too long, and counted it
        center_rewards_coefficient=training.center_rewards_coefficient or None,
        **watching,
    )


def reload_gap(saved: Path, scored: list[ScoredPair], job: RewardJob, recipe: RewardModelRecipe) -> float:
    """Largest difference between the scores in training and those of the saved files, read as rewards.learned reads them.

    Raises:
        RunStopped: it is too large: the files are not the model.
    """
    device = next(job.model.parameters()).device
    reread: RewardModel = read_reward_model(str(saved), recipe.model.experts_implementation)
    pairs = job.pairs.held_out[:COMPARED_PAIRS]
    sequences = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    found = torch.tensor(raw_scores(reread.model.to(device), sequences, recipe.validation.batch_size))
    wanted = torch.tensor([score for pair in scored[:COMPARED_PAIRS] for score in (pair.chosen, pair.rejected)])
    gap = float((found - wanted).abs().max())
    if not gap <= LARGEST_RELOAD_GAP * max(1.0, float(wanted.abs().max())):
        raise RunStopped(
            f"the scores of {saved}, read from its files, differ from those in training by {gap:.1e}: weights were lost on "
            f"the way; keep the run directory and look at its model.safetensors"
        )
    return gap
