"""Reading a checkpoint into a model that is spread over ranks, and writing one from it, with no rank ever holding the whole.

A model is made without weights (`outline`), spread (posttrain/learner_parallel.py), and then filled: each rank reads from the
files only what it keeps, a layer's experts one by one. It is written in as many files as it has parts, each by the rank that
has gathered that part, so all ranks must see the directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig

from posttrain.errors import RunStopped
from posttrain.model.checkpoint_files import shard_name, write_shard
from posttrain.model.load import checkpoint_tensors, require_loadable, set_experts_implementation
from posttrain.model.mtp_files import index_files, tensor_files

T = TypeVar("T")
_LAYER = re.compile(r"(.*?\blayers\.\d+)\.")


def outline(path: str, *, attn_implementation: str, experts_implementation: str, trust_remote_code: bool) -> Any:
    """A causal language model in float32 whose parameters have shapes and no memory; buffers are there.

    Raises:
        ValueError: see `posttrain.model.load.require_loadable`.
    """
    require_loadable(path, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    # Buffers that no checkpoint holds, such as the frequencies of rotary embeddings, are computed where they are made.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    with suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(path)
    set_experts_implementation(model, experts_implementation)
    return model.eval()


@torch.no_grad()
def fill(model: Any, path: str, device: torch.device) -> None:
    """Read a checkpoint's weights into a model, each rank its part. Tensors that have memory stay the same objects.

    Args:
        model: of `outline`, spread or not; or one that has been filled before.
        path: of the checkpoint, or its name on the hub.
        device: of the weights.

    Raises:
        ValueError: weights are missing or of another shape, or the model joins several of the checkpoint's tensors along the
            dimension that it is spread in.
    """
    directory = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=["*.safetensors*"]))
    mapping = get_model_conversion_mapping(model)
    _require_whole_joints(model, mapping)
    held = dict(_tensors(model))
    with ExitStack() as stack:
        # Not mapped into memory: pages of a file that was read count as the process's own.
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            for file in sorted(set(tensor_files(directory).values()))
        }
        wrong: list[str] = []
        # A layer at a time: transformers reads ahead of what it puts together.
        for names in by_layer(tensor_files(directory)).values():
            found, _ = convert_and_load_state_dict_in_model(
                model,
                {name: opened[file].get_slice(name) for name, file in names.items()},
                LoadStateDictConfig(dtype=torch.float32, device_map={"": device}, weight_mapping=mapping),
            )
            wrong += [*map(str, found.mismatched_keys), *found.conversion_errors]
            _put_back(model, held)
    model.tie_weights()
    wrong += [name for name, tensor in _tensors(model) if tensor.is_meta]
    if wrong:
        raise ValueError(
            f"{path} does not have all weights of a {type(model).__name__}, or in other shapes: {wrong[:3]}"
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def write(model: Any, directory: Path, parts: Iterable[Mapping[str, torch.Tensor]], count: int) -> None:
    """Write the parts that this rank has gathered, each into a file; those of others are empty here.

    Args:
        model: that the parts are of.
        directory: an existing one, the same for all ranks.
        parts: tensors by live name; to make one, all ranks must ask for it.
        count: of parts.

    Raises:
        Exception: what kept this rank from writing, once all parts have been asked for.
    """
    trouble: Exception | None = None
    for number, part in enumerate(parts):
        if part and trouble is None:
            try:
                write_shard(directory / shard_name(number, count), dict(checkpoint_tensors(model, part)))
            except Exception as error:  # the other ranks wait for this one at the next part
                trouble = error
    if trouble is not None:
        raise trouble


def write_index(directory: Path, count: int) -> None:
    """Write the index of the files that the ranks have written.

    Raises:
        RunStopped: not all are here.
    """
    names = [shard_name(number, count) for number in range(count)]
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise RunStopped(
            f"{directory}: {len(missing)} of {count} files with weights are not here, {missing[0]} first: each learner rank "
            f"writes its own, so give an output_dir on a file system that all nodes share"
        )
    index_files(directory, tensor_files(directory))


# --- inside -----------------------------------------------------------------------------------------------------------


def by_layer(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What is named like a model's tensors, by layer; what is in none, by itself."""
    parts: dict[str, dict[str, T]] = {}
    for name, value in named.items():
        layer = _LAYER.match(name)
        parts.setdefault(layer[1] if layer else name, {})[name] = value
    return parts


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _put_back(model: Any, held: Mapping[str, torch.Tensor]) -> None:
    """Let a model keep its tensors, which an optimizer knows, with the values of those that have taken their place."""
    for name, tensor in held.items():
        if tensor.is_meta:  # it had none
            continue
        where, _, last = name.rpartition(".")
        module = model.get_submodule(where)
        new = getattr(module, last)
        if new is not tensor:
            tensor.copy_(new)
            setattr(module, last, tensor)


def _require_whole_joints(model: Any, mapping: list[Any]) -> None:
    """Refuse what transformers would read wrongly: it takes a rank's part of each of the tensors that are joined, and not of
    what they are together.
    """
    converters = [converter for converter in mapping if isinstance(converter, WeightConverter)]
    makers = [(converter.reverse_transform(), converter.operations) for converter in converters]
    for name, tensor in model.named_parameters():
        spread = _spread_dims(tensor)
        for of_live, operations in makers:
            if not spread or of_live.rename_source_key(name)[1] is None:
                continue
            for operation in operations:
                joined_apart = isinstance(operation, Concatenate) and operation.dim not in spread
                if not joined_apart and not isinstance(operation, MergeModulelist):
                    raise ValueError(
                        f"learner.parallel: fsdp: {name}, spread in dimension {min(spread)}, is made of a checkpoint's "
                        f"tensors by {operation}, which ranks cannot do with parts of them; set learner.parallel: ddp"
                    )


def _spread_dims(tensor: torch.Tensor) -> set[int]:
    if not isinstance(tensor, DTensor):
        return set()
    sizes = tensor.device_mesh.shape
    return {p.dim for p, size in zip(tensor.placements, sizes, strict=True) if isinstance(p, Shard) and size > 1}
