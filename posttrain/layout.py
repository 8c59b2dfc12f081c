"""How a policy is laid out over the devices of a sampler or the ranks of the learner, and what cannot be. Imports no torch.

With `sampler.tensor_parallel_size: n` each of n devices holds n-th parts of attention heads and of MLPs; with
`sampler.enable_expert_parallel` it holds whole experts instead of a part of each. With `learner.expert_parallel_size: n`
groups of n ranks divide the experts of each layer, with `learner.context_parallel_size: n` each row of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from posttrain.grpo_sections import LearnerSection
from posttrain.planning.shapes import architecture_of
from posttrain.sections import ModelSection, RecipeError, SamplerSection

_KEY = "sampler.tensor_parallel_size"
_GROUPS = "learner.expert_parallel_size"
_CONTEXT = "learner.context_parallel_size"
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # as config.json of one kind or the other says it


def require_layout(config: Mapping[str, Any], devices: int, *, expert_parallel: bool) -> None:
    """Refuse a policy that does not divide by the devices; vLLM would say so after minutes, in a log of its workers.

    Args:
        config: of the policy, names as in its config.json (those of `posttrain.architectures.Architecture` are the same).
        devices: of a sampler.
        expert_parallel: whether experts stay whole.

    Raises:
        RecipeError, which is a ValueError: what does not divide, and the numbers of devices that would do.
    """
    experts = _experts_of(config)
    if expert_parallel and not experts:
        raise RecipeError(
            "sampler.enable_expert_parallel=true: the policy is dense and has no experts to spread; set it to false"
        )
    divided = _divided(config, experts, expert_parallel=expert_parallel)
    for name, size in divided.items():
        if size % devices:
            fitting = math.gcd(*divided.values())
            allowed = ", ".join(str(n) for n in range(1, min(fitting, 64) + 1) if fitting % n == 0)
            raise RecipeError(
                f"{_KEY}={devices}: the policy's {name}={size} is no multiple of it; use one of {allowed}"
            )
    keys = config.get("num_key_value_heads") or devices
    # MLA's latent belongs to all heads and is on every device. Fewer heads than devices are copied.
    if not config.get("kv_lora_rank") and keys % devices and devices % keys:
        raise RecipeError(
            f"{_KEY}={devices}: the policy's num_key_value_heads={keys} neither divides by it nor divides it; use a number "
            f"that divides {keys}, or a multiple of {keys}"
        )


def require_node(devices: int, per_node: int) -> None:
    """Refuse a sampler of more devices than a node has: its workers share the node's memory.

    Raises:
        RecipeError: too many.
    """
    if devices > per_node:
        raise RecipeError(
            f"{_KEY}={devices}: a sampler is on one node, which has {per_node} GPU(s); set it to {per_node} at most, with "
            f"more of sampler.num_workers"
        )


def require_expert_groups(num_experts: int, size: int) -> None:
    """Refuse groups of ranks over which the experts of a layer do not divide.

    Args:
        num_experts: of a layer; 0 is a dense policy.
        size: of a group.

    Raises:
        RecipeError: and which sizes would do.
    """
    if not num_experts:
        raise RecipeError(f"{_GROUPS}={size}: the policy is dense and has no experts to divide; set it to 1")
    if num_experts % size:
        allowed = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise RecipeError(
            f"{_GROUPS}={size}: a layer's {num_experts} experts are no multiple of it; use one of {allowed}"
        )


def require_context_groups(config: Mapping[str, Any], size: int) -> None:
    """Refuse groups of ranks over which attention does not divide, or of a kind that sees other than all tokens before.

    Args:
        config: of the policy, names as in its config.json.
        size: of a group.

    Raises:
        RecipeError: and which sizes would do.
    """
    if config.get("sliding_window") or "linear_attention" in (config.get("layer_types") or ()):
        raise RecipeError(
            f"{_CONTEXT}={size}: the policy has layers that do not see all tokens before (sliding window, linear attention); "
            f"set it to 1"
        )
    heads = config.get("num_attention_heads") or 0
    # MLA's latent becomes keys of all heads before attention.
    keys = heads if config.get("kv_lora_rank") else config.get("num_key_value_heads") or heads
    if heads % size or keys % size:
        fitting = math.gcd(heads, keys)
        allowed = ", ".join(str(n) for n in range(1, fitting + 1) if fitting % n == 0)
        raise RecipeError(
            f"{_CONTEXT}={size}: the policy has {heads} heads of queries and {keys} of keys, which are no multiples of it; "
            f"use one of {allowed}"
        )


def check_layout(model: ModelSection, sampler: SamplerSection | None, learner: LearnerSection | None = None) -> None:
    """Both for a recipe, as far as the policy's shape is known before its files are there.

    Raises:
        RecipeError: see there.
    """
    devices = sampler is not None and (sampler.tensor_parallel_size > 1 or sampler.enable_expert_parallel)
    groups = learner is not None and max(learner.expert_parallel_size, learner.context_parallel_size) > 1
    if not devices and not groups:
        return
    try:
        shape = architecture_of(model)
    except RecipeError:  # of a kind that plans do not know; sampler and learner look at the model itself
        return
    if shape is None:
        return
    if sampler is not None and devices:
        require_layout(asdict(shape), sampler.tensor_parallel_size, expert_parallel=sampler.enable_expert_parallel)
    if learner is not None and learner.context_parallel_size > 1:
        require_context_groups(asdict(shape), learner.context_parallel_size)
    if learner is not None and learner.expert_parallel_size > 1:
        require_expert_groups(shape.num_experts, learner.expert_parallel_size)


def _experts_of(config: Mapping[str, Any]) -> int:
    return next((config[name] for name in _EXPERTS if config.get(name)), 0)


def _divided(config: Mapping[str, Any], experts: int, *, expert_parallel: bool) -> dict[str, int]:
    """What every device gets an equal part of."""
    width, shared = config.get("moe_intermediate_size") or 0, config.get("n_shared_experts") or 0
    sizes = {
        "num_attention_heads": config.get("num_attention_heads") or 0,
        "intermediate_size": config.get("intermediate_size") or 0,
        "number of routed experts": experts if expert_parallel else 0,
        "moe_intermediate_size": width if experts and not expert_parallel else 0,
        "moe_intermediate_size x n_shared_experts": width * shared,
    }
    return {name: size for name, size in sizes.items() if size}
