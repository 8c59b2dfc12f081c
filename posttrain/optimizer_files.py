"""An optimizer's state in files: whole where each rank has all of it, in as many parts as there are ranks where it is spread.

trainer_state.pt                           numbers of steps, groups, and tensors that are not spread
optimizer/optimizer-00001-of-00004.safetensors    what the first of four ranks keeps of each tensor, and from which index on

Each rank writes what it keeps and reads what it will keep, whatever the number of ranks was and is, so none ever holds more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

DIRECTORY = "optimizer"

Region = list[tuple[int, int]]  # first index and the one after the last, by dimension


def local_state(optimizer: Any) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """`optimizer.state_dict()` without what is spread over ranks, and that by "number of the parameter.name"."""
    found = optimizer.state_dict()
    spread = {
        f"{index}.{name}": value
        for index, values in found["state"].items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    }
    state = {
        index: {name: value for name, value in values.items() if f"{index}.{name}" not in spread}
        for index, values in found["state"].items()
    }
    return {**found, "state": state}, spread


def write_part(directory: Path, spread: Mapping[str, DTensor], rank: int, ranks: int) -> None:
    """Write what this rank keeps into a checkpoint's directory."""
    tensors, regions = {}, {}
    for name, tensor in spread.items():
        region = _region(tensor)
        if all(first < end for first, end in region):  # small tensors may not reach every rank
            tensors[name] = tensor.to_local().cpu().contiguous()
            regions[name] = {"shape": list(tensor.shape), "first": [first for first, _ in region]}
    (directory / DIRECTORY).mkdir(exist_ok=True)
    path = directory / DIRECTORY / f"optimizer-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    save_file(tensors, path, metadata={"regions": json.dumps(regions)})


def load_state(optimizer: Any, state: Mapping[str, Any], directory: Path, count: int) -> None:
    """Put back what was saved, each rank its part.

    Args:
        optimizer: of parameters that are spread or not.
        state: whole, or the first of `local_state`; then the rest is in the directory's parts.
        directory: of the checkpoint.
        count: of parts.

    Raises:
        ValueError: parts are missing, or of another model.
    """
    held, saved = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if held != saved:
        raise ValueError(
            f"{directory}: the optimizer's state is of {saved} parameters (with and without weight decay), and {held} are "
            f"trained now; resume with the recipe that the run was started with"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {
        index: {name: _own_part(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    if count:
        with ExitStack() as stack:
            parts = _Parts(directory / DIRECTORY, count, stack)
            for key in parts.names():
                index, _, name = key.partition(".")
                found[int(index)][name] = parts.read(key, parameters[int(index)])
    optimizer.load_state_dict({**state, "state": found})


class _Parts:
    """The parts of a directory as one."""

    def __init__(self, directory: Path, count: int, stack: ExitStack) -> None:
        paths = sorted(directory.glob(f"optimizer-*-of-{count:05d}.safetensors"))
        if len(paths) != count:
            raise ValueError(f"{directory} has {len(paths)} of {count} parts; copy the checkpoint again")
        self._directory = directory
        self._places: dict[str, list[tuple[Any, Region]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in paths:
            file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
            for name, entry in json.loads(file.metadata()["regions"]).items():
                piece = file.get_slice(name)
                region = [(first, first + n) for first, n in zip(entry["first"], piece.get_shape(), strict=True)]
                self._places.setdefault(name, []).append((piece, region))
                self._shapes[name] = entry["shape"]

    def names(self) -> Iterator[str]:
        yield from self._places

    def read(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What this rank keeps, spread as the parameter is."""
        if self._shapes[name] != list(parameter.shape):
            raise ValueError(
                f"{self._directory}: {name} has shape {self._shapes[name]}, its parameter {list(parameter.shape)}: the state "
                f"is that of another model; resume with the recipe that the run was started with"
            )
        wanted = _region(parameter)
        local = torch.empty([end - first for first, end in wanted], dtype=torch.float32)
        missing = local.numel()
        for piece, region in self._places[name]:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, region, strict=True)]
            if all(first < end for first, end in common):
                there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, region, strict=True))
                here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, wanted, strict=True))
                local[here] = piece[there]
                missing -= local[here].numel()
        if missing:
            raise ValueError(f"{self._directory}: {missing} numbers of {name} are in none of the parts; copy it again")
        return _spread_as(local, parameter) if isinstance(parameter, DTensor) else local


def _region(tensor: torch.Tensor) -> Region:
    """The indices of a tensor that this rank keeps."""
    if not isinstance(tensor, DTensor):
        return [(0, length) for length in tensor.shape]
    assert all(type(placement) is Shard for placement in tensor.placements), tensor.placements
    lengths, firsts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return [(first, first + length) for first, length in zip(firsts, lengths, strict=True)]


def _own_part(value: Any, parameter: torch.Tensor) -> Any:
    """This rank's part of a whole tensor of the parameter's shape; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return _spread_as(value[tuple(slice(first, end) for first, end in _region(parameter))].clone(), parameter)


def _spread_as(local: torch.Tensor, parameter: DTensor) -> DTensor:
    """This rank's part as one tensor with those of the others."""
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
