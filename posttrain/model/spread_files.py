"""Reading a checkpoint into a model that is spread over ranks, and writing one from it, with no rank ever holding the whole.

A model is made without weights (`outline`), spread (posttrain/learner_parallel.py), and then filled: each rank reads from the
files only what it keeps, a layer's experts one by one. It is written in as many files as it has parts, each by the rank that
has gathered that part, so all ranks must see the directory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from posttrain.errors import RunStopped
from posttrain.model.checkpoint_files import shard_name, write_shard
from posttrain.model.load import checkpoint_tensors, require_loadable, require_tied, set_experts_implementation
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
    for file, settings in ((CONFIG_NAME, {"_from_model_config": True}), (GENERATION_CONFIG_NAME, {})):
        with suppress(OSError):  # there is none, or a broken one, which `from_pretrained` would pass over as well
            model.generation_config = GenerationConfig.from_pretrained(path, file, **settings)
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
        ValueError: there are no .safetensors files, weights are missing or of another shape, a layer has more or fewer experts
            than the model, or the model joins several of the checkpoint's tensors along the dimension that it is spread in.
    """
    directory = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=["*.safetensors*"]))
    files = tensor_files(directory)
    if not files:
        raise ValueError(f"{path} has no .safetensors files; convert the weights to safetensors first")
    mapping = get_model_conversion_mapping(model)
    _require_whole_joints(model, mapping)
    _require_all_pieces(model, mapping, files, path)
    empty = _give_nothing_memory(model, device)
    held = dict(_tensors(model))
    with ExitStack() as stack:
        # Not mapped into memory: pages of a file that was read count as the process's own.
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            for file in sorted(set(files.values()))
        }
        stack.enter_context(_no_progress_bar())
        wrong: list[str] = []
        missing = set(model.state_dict())
        # A layer at a time: transformers reads ahead of what it puts together.
        for names in by_layer(files).values():
            found, _ = convert_and_load_state_dict_in_model(
                model,
                {name: opened[file].get_slice(name) for name, file in names.items()},
                LoadStateDictConfig(dtype=torch.float32, device_map={"": device}, weight_mapping=mapping),
            )
            missing &= found.missing_keys
            wrong += [*map(str, found.mismatched_keys), *(found.conversion_errors.keys() - empty)]
            _put_back(model, held)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    require_tied(model, path)
    wrong += sorted(missing - empty)
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
    index_files(directory, dict(sorted(tensor_files(directory).items())))


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


def _give_nothing_memory(model: Any, device: torch.device) -> set[str]:
    """Names of the parameters of which this rank keeps nothing: with fewer experts than ranks none can be stacked."""
    names = set()
    for name, tensor in list(model.named_parameters()):
        if isinstance(tensor, DTensor) and not tensor.to_local().numel():
            names.add(name)
            if tensor.is_meta:
                where, _, last = name.rpartition(".")
                new = torch.nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=tensor.requires_grad)
                setattr(model.get_submodule(where), last, new)
    return names


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers would show one for each layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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


def _require_all_pieces(model: Any, mapping: list[Any], names: Iterable[str], path: str) -> None:
    """Refuse a checkpoint with more or fewer experts than the model: no rank would miss what belongs to none."""
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    stacks = {
        pattern
        for converter in converters
        if isinstance(converter.operations[0], MergeModulelist)
        and all(isinstance(other, Concatenate) and other.dim for other in converter.operations[1:])
        for pattern in converter.source_patterns
    }
    live = model.state_dict()
    found = Counter(rename_source_key(name, renamings, converters, model.base_model_prefix, live) for name in names)
    for (target, pattern), count in found.items():
        if pattern in stacks and target in live and count != len(live[target]):
            raise ValueError(
                f"{path} has {count} tensors for {target} ({pattern}), and the model has {len(live[target])} there; copy the "
                f"checkpoint again, or give the config.json that belongs to it"
            )


def _spread_dims(tensor: torch.Tensor) -> set[int]:
    if not isinstance(tensor, DTensor):
        return set()
    sizes = tensor.device_mesh.shape
    return {p.dim for p, size in zip(tensor.placements, sizes, strict=True) if isinstance(p, Shard) and size > 1}
