"""What LoRA adapters add to each weight of a checkpoint, without the model: one tensor at a time.

The adapters are put on a model without memory for its weights (torch's meta device), so that peft says what is on what; of the
routed experts, which the model holds fused, each expert's share is computed by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.model import lora

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class AdapterDeltas:
    """The products of saved adapters, float32.

    Args:
        adapter: a directory in peft's format, such as `checkpoints/latest/adapter`.
        checkpoint: the policy they were trained on: its config.json says of which shape the model is.
        trust_remote_code: whether the checkpoint's own code may run.

    Raises:
        ValueError: no such adapters, or not of this architecture.
    """

    def __init__(self, adapter: Path, checkpoint: Path, *, trust_remote_code: bool = False) -> None:
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"{adapter} holds no adapters: it has no adapter_config.json; give the folder that has it")
        config = copy.deepcopy(AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code))
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # shapes are wanted, not FP8 modules
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        try:
            section = LoraConfig.from_pretrained(str(adapter))
            section.base_model_name_or_path = None  # peft would warn that this is another one
            adapted = get_peft_model(model, section)
            _fill(adapted, load_peft_weights(str(adapter), device="cpu"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{adapter}: these adapters are not for {checkpoint}: {error}") from None
        self._deltas = dict(_deltas(adapted))

    def names(self) -> set[str]:
        """The weights that are changed, as a checkpoint names them."""
        return set(self._deltas)

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """What is added to a weight: float32, of its shape."""
        return self._deltas[name]()


def _fill(adapted: PeftModel, saved: Mapping[str, torch.Tensor]) -> None:
    """Give the adapters, which are as empty as the model, the saved tensors. peft's own loading would move them to the model's
    device, where nothing has a value.
    """
    names = {name.replace(".default.", "."): name for name, _ in adapted.named_parameters() if ".lora_" in name}
    if names.keys() != saved.keys():
        raise ValueError(f"{min(names.keys() ^ saved.keys())} is on one side only")
    adapted.load_state_dict({names[name]: tensor for name, tensor in saved.items()}, strict=False, assign=True)


def _deltas(adapted: PeftModel) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """For each adapted weight of a checkpoint, its name and what computes the delta."""
    for name, layer in lora.adapters(adapted):
        adapter = layer.active_adapters[0]
        fused = name.rpartition(".")[2]
        if fused not in _FUSED:
            yield name, partial(_matrix, layer, adapter)
            continue
        prefix = name.removesuffix(f".{fused}")
        outputs, _, _ = layer.get_delta_factors(adapter)
        parts = _FUSED[fused]
        rows = outputs.shape[1] // len(parts)
        for expert in range(len(outputs)):
            for number, part in enumerate(parts):
                own = slice(number * rows, (number + 1) * rows)
                yield f"{prefix}.{expert}.{part}.weight", partial(_expert, layer, adapter, expert, own)


def _matrix(layer: Any, adapter: str) -> torch.Tensor:
    """The delta of a matrix. Not peft's `get_delta_weight`: that moves it to where the weight is, and here there is none."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return (b.float() @ a.float()) * float(layer.scaling[adapter])


def _expert(layer: Any, adapter: str, expert: int, rows: slice) -> torch.Tensor:
    """The delta of one expert's projection, from factors [experts, out, rank] and [experts, rank, in]."""
    outputs_EOR, inputs_ERI, scaling = layer.get_delta_factors(adapter)
    return (outputs_EOR[expert, rows].float() @ inputs_ERI[expert].float()) * float(scaling)
