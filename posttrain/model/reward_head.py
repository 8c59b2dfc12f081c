"""A policy with a head that gives one number: the reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from posttrain.disk import write_atomically
from posttrain.model.load import require_loadable, save_policy, set_experts_implementation
from rewards.learned import NORMALIZATION


def load_reward_model(
    path: str,
    *,
    head_init_std: float,
    seed: int,
    attn_implementation: str,
    experts_implementation: str,
    trust_remote_code: bool,
) -> Any:
    """A sequence classifier with one output from a policy's checkpoint, or a reward model's to go on with; float32.

    Args:
        path: of the checkpoint.
        head_init_std: standard deviation of a new head's weights; small, so that all scores start near 0.
        seed: of the new head.
        attn_implementation, experts_implementation, trust_remote_code: see docs/recipes.md.

    Raises:
        ValueError: the checkpoint lacks weights of the policy itself, which would be random, or is FP8.
    """
    require_loadable(path, trust_remote_code=trust_remote_code)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    lacking = sorted(info["missing_keys"])
    foreign = [name for name in lacking if name.startswith(f"{model.base_model_prefix}.")]
    if foreign or info["mismatched_keys"]:
        first = [*foreign, *sorted(info["mismatched_keys"])][0]
        raise ValueError(
            f"model.model_name_or_path: {path!r} has no fitting weights for {first}, which would be random; give a whole "
            f"checkpoint"
        )
    generator = torch.Generator().manual_seed(seed)
    for name in lacking:
        parameter = model.get_parameter(name)
        with torch.no_grad():
            # A bias starts at 0.
            values = torch.randn(parameter.shape, generator=generator) * (head_init_std if parameter.dim() > 1 else 0.0)
            parameter.copy_(values)
    set_experts_implementation(model, experts_implementation)
    return model


class RewardModelFiles:
    """Writes a reward model: weights, tokenizer and, once it is known, the normalisation of its scores."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.normalization: dict[str, float] | None = None  # mean, std, n

    def write(self, path: str, state_dict: dict[str, Any] | None = None) -> None:
        """
        Args:
            path: an existing directory.
            state_dict: all weights, where the model's own are spread over ranks.
        """
        save_policy(self._model, self._tokenizer, path, state_dict)
        if self.normalization is not None:
            write_atomically(Path(path) / NORMALIZATION, json.dumps(self.normalization))
