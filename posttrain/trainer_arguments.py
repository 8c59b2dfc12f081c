"""A recipe in the words of transformers' TrainingArguments, for every stage on a TRL trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain.sections import CheckpointSection, OptimizerSection, TrainerSection


def common_arguments(
    training: TrainerSection, optimizer: OptimizerSection, saving: CheckpointSection, *, seed: int, run_dir: Path
) -> dict[str, Any]:
    """What SFTConfig and RewardConfig are given alike."""
    return {
        "output_dir": str(run_dir / "trainer"),  # where a checkpoint is while it is written
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_train_epochs or 1,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "bf16": training.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "optim": training.optim,
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
        "max_grad_norm": optimizer.max_grad_norm,
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "save_strategy": "steps" if saving.save_steps else "no",
        "save_steps": saving.save_steps or 500,
        "report_to": "none",  # metrics.py is the one place that reports
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        **_schedule(optimizer),
    }


def _schedule(optimizer: OptimizerSection) -> dict[str, Any]:
    if optimizer.lr_scheduler_type == "cosine":
        floor = {"min_lr": optimizer.min_learning_rate}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": floor}
    name = "constant_with_warmup" if optimizer.lr_scheduler_type == "constant" else optimizer.lr_scheduler_type
    return {"lr_scheduler_type": name}
