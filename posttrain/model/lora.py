"""LoRA for MoE policies: adapters on exactly what was asked for, merged into plain weights at the end.

peft, given names such as `gate_proj`, adapts the routed experts of a transformers MoE and silently leaves the shared
experts and the dense layers out; `all-linear` adapts the router as well. Here groups are resolved to the full names of this
model's modules and parameters, and what came of it is checked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from posttrain.errors import RunStopped
from posttrain.lora_section import LoraTarget

ADAPTER = "adapter"  # the folder of a checkpoint that holds them, in peft's format
_BLOCK = re.compile(r"\.layers\.\d+\.")
# The first pattern that a parameter's name matches says what it is.
_GROUPS = (
    ("mtp", r"(^|\.)mtp\."),
    ("norm", r"norm\w*\.(weight|bias)$"),
    ("embedding", r"embed\w*\.weight$|\bwte\."),
    ("head", r"lm_head\."),
    ("attention", r"\.(self_attn|attention|attn)\."),
    ("shared_experts", r"\.shared_experts?\."),
    ("routed_experts", r"\.experts\."),
    ("router", r"\.(gate|router)\.|shared_expert_gate"),
    ("dense_mlp", r"\.(mlp|feed_forward|block_sparse_moe)\."),
)


@dataclass(frozen=True, slots=True)
class Targets:
    """What can be adapted in one group: full names of linear modules, and of single parameters."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.modules or self.parameters)


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """A kind of parameter, its layers taken together."""

    group: str  # embedding, attention, routed_experts, shared_experts, dense_mlp, router, norm, head, mtp, other
    name: str  # with * for layer numbers
    count: int  # parameters, adapters left out
    tensors: int
    trainable: int  # parameters that train; of an adapted weight, its adapters'
    rank: int | None  # of the adapters on it


def find_targets(model: nn.Module) -> dict[str, Targets]:
    """What this model has, group by group; groups it lacks are empty."""
    modules: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    has_experts = any(group_of(name) == "routed_experts" for name, _ in model.named_parameters())
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if not _BLOCK.search(full) or parameter.dim() < 2:
                continue
            group = group_of(full)
            # peft rewrites the names of MLP modules where there are routed experts, and leaves parameters alone.
            by_module = isinstance(module, nn.Linear) and (group == "attention" or not has_experts)
            (modules if by_module else parameters).setdefault(group, []).append(name if by_module else full)
    return {
        name: Targets(tuple(modules.get(name, ())), tuple(parameters.get(name, ()))) for name in get_args(LoraTarget)
    }


def group_of(name: str) -> str:
    """What a parameter is, by its full name: see `ParameterRow.group`."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), "other")


def apply_lora(model: Any, *, r: int, alpha: float, dropout: float, targets: Sequence[str] | None) -> PeftModel:
    """Put adapters on a policy; everything else is frozen.

    Args:
        model: a causal language model of transformers; it is changed.
        r: rank.
        alpha: the adapters' product counts alpha / r.
        dropout: of the adapters' input; 0 where weights of experts are adapted.
        targets: groups, see `find_targets`; None stands for all that the model has but the router.

    Raises:
        ValueError: a group that this model does not have, dropout where there can be none, quantized experts, or something
            adapted or trained that was not asked for.
    """
    found = find_targets(model)
    if targets is None:
        targets = [name for name, group in found.items() if group and name != "router"]
    empty = [name for name in targets if not found[name]]
    if empty:
        there = ", ".join(name for name, group in found.items() if group)
        raise ValueError(
            f"lora.targets: {empty[0]} matches nothing in this {type(model).__name__}; it has {there}: leave {empty[0]} out"
        )
    modules = [name for target in targets for name in found[target].modules]
    parameters = [name for target in targets for name in found[target].parameters]
    if dropout and parameters:
        raise ValueError(
            f"lora.dropout={dropout:g}: adapters on {group_of(parameters[0])} of this model cannot have dropout; set it to "
            f"0, or leave that group out of lora.targets"
        )
    if getattr(model, "is_quantized", False) and parameters:
        raise ValueError(
            f"lora.quantization: adapters on {group_of(parameters[0])} of this model need weights that are not quantized; "
            f"leave that group out of lora.targets, or leave quantization out"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r, whatever its type
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()  # with gradient checkpointing, a gradient must enter the first layer
    _check(adapted, {*(f"{name}.weight" for name in modules), *parameters})
    return adapted


def _check(adapted: PeftModel, wanted: set[str]) -> None:
    found = set(adapter_ranks(adapted))
    if found != wanted:
        missing, extra = sorted(wanted - found)[:2], sorted(found - wanted)[:2]
        raise ValueError(
            f"peft adapted something else than was asked for: without adapters {missing}, adapted unasked {extra}; leave "
            f"that group out of lora.targets"
        )
    stray = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" not in name]
    if stray:
        raise ValueError(f"{stray[0]} would train beside the adapters; only adapters may")


def adapter_ranks(model: nn.Module) -> dict[str, int]:
    """Full name of each adapted weight, as in the policy without adapters -> rank of its adapters."""
    return {name: module.r[module.active_adapters[0]] for name, module in adapters(model)}


def adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers with the name of the weight that each adapts."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.r:
            key = getattr(module, "parameter_name", "weight")
            yield f"{_plain(name)}.{key}", module


def _plain(name: str) -> str:
    """A name inside a PeftModel as the policy alone has it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def trained_parameters(model: nn.Module) -> list[ParameterRow]:
    """What a model has and what of it trains, its layers taken together; with adapters and without alike."""
    totals: dict[tuple[str, str], Counter[str]] = {}
    ranks: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            row = totals.setdefault(_row(_plain(name)), Counter())
            row.update(count=parameter.numel(), tensors=1, trainable=parameter.numel() * parameter.requires_grad)
    for name, module in adapters(model):
        own = [p for key, p in module.named_parameters() if key.startswith("lora_") and p.requires_grad]
        totals[_row(name)].update(trainable=sum(p.numel() for p in own))
        ranks[_row(name)] = module.r[module.active_adapters[0]]
    return [
        ParameterRow(group, name, row["count"], row["tensors"], row["trainable"], ranks.get((group, name)))
        for (group, name), row in totals.items()
    ]


def _row(name: str) -> tuple[str, str]:
    return group_of(name), re.sub(r"\.\d+\.", ".*.", name)


def merge(model: PeftModel) -> Any:
    """The policy with its adapters added to its weights, and without them. The adapted model is used up."""
    return model.merge_and_unload()


def merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """All weights under the policy's own names with the adapters added, as `merge` would leave them. The model stays as it is:
    taking adapters off again after a merge would round its weights.
    """
    layers = dict(adapters(model))
    found = {}
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" in name:
            continue
        layer = layers.get(_plain(name))
        found[_plain(name)] = tensor if layer is None else tensor + layer.get_delta_weight(layer.active_adapters[0])
    return found


def save_adapter(model: PeftModel, path: str | Path) -> None:
    """Write the adapters alone, in peft's format."""
    model.save_pretrained(str(path))


def load_adapter(model: PeftModel, path: str | Path) -> None:
    """Put saved adapters back on a policy that has adapters of the same shape.

    Raises:
        ValueError: they are not those of this policy and recipe.
    """
    saved = load_peft_weights(str(path), device="cpu")
    result = set_peft_model_state_dict(model, saved)
    own = [name for name, _ in model.named_parameters() if ".lora_" in name]
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if result.unexpected_keys or missing or len(saved) != len(own):
        raise ValueError(
            f"the adapters in {path} are not those of this recipe ({len(saved)} tensors there, {len(own)} here); resume with "
            f"the recipe the run was started with"
        )


def quantization_config(name: str) -> Any:
    """transformers' configuration of 4-bit weights for QLoRA (Dettmers et al., 2023).

    Raises:
        RunStopped: bitsandbytes or a GPU is missing.
    """
    if name != "nf4":
        raise ValueError(f"quantization {name!r}; nf4 is the one there is")
    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        lacking = "a GPU" if find_spec("bitsandbytes") is not None else "the package bitsandbytes, and a GPU"
        raise RunStopped(f"lora.quantization: nf4 needs {lacking}; install it, or leave quantization out")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
