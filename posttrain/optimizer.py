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


def set_hyperparameters(optimizer: Any, scheduler: Any, section: OptimizerSection) -> None:
    """The recipe's numbers in an optimizer and a schedule whose state was restored, which holds those it was saved with.

    Args:
        optimizer: with groups as `decay_groups` or transformers' Trainer makes them.
        scheduler: its schedule, a `LambdaLR`.
        section: of the recipe.
    """
    numbers = {
        "initial_lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
    }
    for number, group in enumerate(optimizer.param_groups):
        for name, value in numbers.items():
            # Adafactor's eps are two numbers of its own.
            if name in group and isinstance(group[name], (tuple, list)) == isinstance(value, tuple):
                group[name] = value
        group["weight_decay"] = section.weight_decay if number == 0 else 0.0
        group["lr"] = section.learning_rate * scheduler.lr_lambdas[number](scheduler.last_epoch)
    scheduler.base_lrs = [section.learning_rate for _ in optimizer.param_groups]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


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
