"""What the learner keeps in main memory while it is not used, to leave the device to weights and activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

HOME = torch.device("cpu")


def move_state(optimizer: Any, device: torch.device) -> None:
    """Put an optimizer's state there, but for the numbers of steps, which stay where the optimizer has made them."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim():
                values[name] = value.to(device)


@contextmanager
def state_on(optimizer: Any, device: torch.device) -> Iterator[None]:
    """An optimizer's state on the device for the length of the block, in main memory afterwards."""
    move_state(optimizer, device)
    try:
        yield
    finally:
        move_state(optimizer, HOME)


@contextmanager
def weights_on(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Copies of a model's weights on the device for the length of the block.

    The originals stay in main memory and are put back afterwards, so nothing is copied that way. For models that only score:
    what the block changes is lost.
    """
    there: dict[int, torch.Tensor] = {}  # by the original: tied weights stay tied

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in there:
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            there[id(tensor)] = torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return there[id(tensor)]

    originals: list[tuple[Any, dict[str, Any]]] = []
    try:
        for module in model.modules():
            tables: tuple[Any, ...] = (module._parameters, module._buffers)
            for held in tables:
                originals.append((held, dict(held)))
                held.update({name: copied(tensor) for name, tensor in held.items() if tensor is not None})
        yield
    finally:
        for held, before in originals:
            held.update(before)
