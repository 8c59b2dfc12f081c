"""The multi-token prediction module's tensors in the files of a checkpoint: finding, reading and adding them.

They are layer L of the checkpoint, one past the trunk's last, under the prefix `model.layers.{L}.`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from posttrain.disk import write_atomically

MTP_FILE = "model-mtp.safetensors"


def checkpoint_directory(path: str | Path) -> Path:
    """A checkpoint's directory on this machine; the name of a hub model is looked up in the cache.

    Raises:
        ValueError: it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        raise ValueError(
            f"{str(path)!r} is neither a checkpoint directory nor a hub model in the cache; give a directory, or load the "
            f"model from the hub first"
        ) from None


def tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor: by the index where there is one, else by what the files say."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        outside = [file for file in weight_map.values() if file in ("", "..") or Path(str(file)).name != file]
        if outside:  # an index from elsewhere must not have other files of this machine read
            raise ValueError(f"{index}: {outside[0]!r} is no file of this directory; copy the checkpoint again")
        return {name: directory / file for name, file in weight_map.items()}
    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def index_files(directory: Path, files: Mapping[str, Path]) -> None:
    """Write the index that says which of the directory's files, which are there, holds which tensor."""
    size = sum(_data_bytes(file) for file in set(files.values()))
    weight_map = {name: file.name for name, file in files.items()}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomically(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def read_layer(directory: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's tensors as the checkpoint has them.

    Raises:
        ValueError: there are none, or of more than one depth, or FP8 weights, or a file is missing.
    """
    files = tensor_files(directory)
    names = sorted(name for name in files if name.startswith(prefix))
    if f"{prefix}eh_proj.weight" not in names:
        raise ValueError(
            f"{directory} holds no multi-token prediction module ({prefix}eh_proj.weight); build a new one (mtp.init: new)"
        )
    layer = int(prefix.split(".")[2])
    if f"model.layers.{layer + 1}.eh_proj.weight" in files:
        raise ValueError(f"{directory} holds several depths of multi-token prediction; one is supported")
    scaled = [name for name in names if name.endswith("_scale_inv")]
    if scaled:
        raise ValueError(
            f"{directory}: {scaled[0]} says that the weights are FP8; convert the checkpoint first: python -m "
            f"posttrain.export {directory} OUT --format bf16"
        )
    for path in sorted({files[name] for name in names}):
        if not path.exists():
            raise ValueError(f"{directory}: {path.name}, which the index names, is not there")
        with safe_open(path, framework="pt") as file:
            for name in names:
                if files[name] == path:
                    yield name, file.get_tensor(name)


def add_layer(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors into a file of their own, beside the trunk's, and announce them.

    transformers reads `model.safetensors` alone where there is one, and else the files of the index; vLLM reads all
    files, or those of the index where there is one. So the index names everything, and the trunk's files stay as they are.

    Raises:
        ValueError: the directory holds no trunk, or some of the tensors in the trunk's files.
    """
    files = tensor_files(directory)
    ours = directory / MTP_FILE
    trunk = {name: path for name, path in files.items() if path != ours}
    if not trunk:
        raise ValueError(
            f"{directory} holds no saved model to add a multi-token prediction module to; save the trunk first"
        )
    twice = [name for name in tensors if name in trunk]
    if twice:
        raise ValueError(
            f"{directory}: {trunk[twice[0]].name} holds {twice[0]} already; save the trunk into a new directory first"
        )
    partial = directory / f"{MTP_FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in _apart(tensors)}, partial, metadata={"format": "pt"})
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    config = json.loads((directory / CONFIG_NAME).read_text()) | {"num_nextn_predict_layers": 1}
    # A crash after any of the three leaves a trunk that loads: vLLM skips tensors of a layer that the config announces,
    # and misses announced ones only when it is asked to draft.
    write_atomically(directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial.replace(ours)
    index_files(directory, dict(sorted((trunk | dict.fromkeys(tensors, ours)).items())))


def _apart(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, none of which shares memory with another (a tied head is the embedding)."""
    seen = set()
    for name, tensor in tensors.items():
        yield name, tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())


def _data_bytes(path: Path) -> int:
    """Bytes of tensors in a safetensors file: what follows the header, whose length its first 8 bytes tell."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
