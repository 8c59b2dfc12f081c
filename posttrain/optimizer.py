"""What an `optimizer` section makes: parameter groups and a schedule, as transformers' Trainer does."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler

from posttrain.recipe import OptimizerSection


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms and biases."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def schedule(optimizer: torch.optim.Optimizer, section: OptimizerSection, total_steps: int) -> Any:
    """transformers' schedule of that name, ending at min_learning_rate."""
    name: str = section.lr_scheduler_type
    settings: dict[str, float] = {}
    if name == "cosine":
        name, settings = "cosine_with_min_lr", {"min_lr": section.min_learning_rate}
    elif name == "constant":
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=section.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=settings or None,
    )
