"""The random number generators of a process, so that a resumed one draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Of Python, NumPy and torch; readable by `torch.load(weights_only=True)`."""
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_rng(state: dict[str, Any]) -> None:
    """Go on from what `rng_state` gave. A GPU's generator is left alone where there was none, or is none now."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_rng() -> list[dict[str, Any]]:
    """`rng_state` of every rank; collective. Other ranks than the first get an empty list."""
    if not torch.distributed.is_initialized():
        return [rng_state()]
    is_main = torch.distributed.get_rank() == 0
    found: list[Any] | None = [None] * torch.distributed.get_world_size() if is_main else None
    torch.distributed.gather_object(rng_state(), found)
    return found or []
