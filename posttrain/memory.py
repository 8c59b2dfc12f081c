"""How much memory a training process will need, roughly, and how much there is."""

from __future__ import annotations

import os
from typing import Any

import torch

from posttrain.recipe import SftRecipe

# Bytes of optimizer state per trained parameter.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adafactor": 0, "sgd": 0}


def expected_memory(recipe: SftRecipe, policy: Any, vocabulary: int, teacher: Any = None) -> dict[str, int]:
    """Bytes of one process, by purpose.

    Weights, gradients and optimizer state are exact; activations are an estimate for a decoder with dense attention masks:
    per layer and token about 16 hidden states and 4 MLP widths, and two attention matrices; with gradient checkpointing one
    layer of that and a hidden state for each other. Logits are not counted: the loss works on slices of them.

    Args:
        recipe: of the run.
        policy: the model with its adapters.
        vocabulary: tokens.
        teacher: the model that is learnt from, if there is one.
    """
    training, config = recipe.training, policy.config
    parameters = list(policy.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    tokens = training.per_device_train_batch_size * training.max_length
    layers, hidden = config.num_hidden_layers, config.hidden_size
    width = 2 if training.bf16 else 4
    mlp = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 4 * hidden)
    active = getattr(config, "num_experts_per_tok", 1) or 1
    attention = 2 * config.num_attention_heads * training.max_length
    per_layer = tokens * (16 * hidden + 4 * mlp * active + attention) * width
    kept = per_layer + layers * tokens * hidden * width if training.gradient_checkpointing else layers * per_layer
    beside = {}
    if teacher is not None and recipe.teacher is not None:
        # Its activations are one layer's at a time; of logits there are the two models' and what is made of them.
        beside["teacher"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
        beside["teacher"] += min(tokens, recipe.teacher.logits_chunk) * vocabulary * 4 * 6
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": trained * 4,
        "optimizer": trained * OPTIMIZER_BYTES[training.optim],
        "activations": kept,
        "loss": 256 * vocabulary * 4 * 3,
        **beside,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what torch says, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def available_memory() -> int:
    """Bytes that are free: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
