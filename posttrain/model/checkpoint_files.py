"""Checkpoint files without a model: tensors one at a time, however many shards there are, and new shards written whole.

The layout is that of Hugging Face and DeepSeek: `model-00001-of-000NN.safetensors`, and `model.safetensors.index.json`, which
says which file holds which tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME

from posttrain.model.mtp_files import index_files, tensor_files

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that is not read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class CheckpointFiles:
    """The tensors of a checkpoint directory, read one at a time.

    Args:
        directory: with config.json and .safetensors files.

    Raises:
        ValueError: no such files, one that the index names is missing or broken, or a tensor of an unknown type.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / CONFIG_NAME).is_file():
            raise ValueError(f"{directory} is no checkpoint in Hugging Face format: it has no {CONFIG_NAME}")
        self.config: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text())
        try:
            self._places = tensor_files(directory)
        except SafetensorError as error:
            raise ValueError(f"{directory}: a .safetensors file cannot be read: {error}") from None
        if not self._places:
            raise ValueError(f"{directory} has no .safetensors files; convert the weights to safetensors first")
        self._open: dict[Path, Any] = {}
        self.tensors = dict(self._read_headers())

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own."""
        found: torch.Tensor = self._file(self._places[name]).get_tensor(name)
        return found

    def _read_headers(self) -> Iterator[tuple[str, TensorInfo]]:
        """In the order of the files, so that what is read in this order is read file by file."""
        names: dict[Path, list[str]] = {}
        for name, path in self._places.items():
            names.setdefault(path, []).append(name)
        for path in sorted(names):
            file = self._file(path)
            missing = set(names[path]) - set(file.keys())
            if missing:
                raise ValueError(
                    f"{self.directory}: the index says that {path.name} holds {min(missing)}, which it lacks"
                )
            for name in sorted(names[path], key=natural):
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{self.directory}: {name} is of type {part.get_dtype()}, which is not read")
                yield name, TensorInfo(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            while len(self._open) > 1:  # a weight and its scales may lie in two files
                self._open.pop(next(iter(self._open)))
            if not path.exists():
                raise ValueError(f"{self.directory}: {path.name}, which the index names, is not there")
            try:
                # Not mapped into memory: pages of a file that was read count as the process's own.
                self._open[path] = safe_open(path, framework="pt", backend="pread")
            except SafetensorError as error:
                raise ValueError(f"{self.directory}: {path.name} cannot be read: {error}") from None
        return self._open[path]


def natural(name: str) -> list[Any]:
    """A key to sort names by, numbers in them by their value: layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def shard(groups: Iterable[Sequence[TensorInfo]], max_bytes: int) -> list[list[Sequence[TensorInfo]]]:
    """Fill files up to `max_bytes` with groups of tensors that stay together, in order; a larger group has its own file."""
    shards: list[list[Sequence[TensorInfo]]] = []
    size = max_bytes + 1
    for group in groups:
        added = sum(info.num_bytes for info in group)
        if size + added > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += added
    return shards


def shard_name(number: int, count: int) -> str:
    """Of the file `number`, counted from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A .safetensors file, whole or not there."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    partial.replace(path)


def write_index(directory: Path, shards: Sequence[Sequence[Sequence[TensorInfo]]]) -> None:
    """model.safetensors.index.json, once the shards are there."""
    index_files(
        directory,
        {
            info.name: directory / shard_name(number, len(shards))
            for number, groups in enumerate(shards)
            for group in groups
            for info in group
        },
    )
