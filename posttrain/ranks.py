"""This process among those of a run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from posttrain.errors import RunStopped


def join_ranks() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    Raises:
        RunStopped: FSDP was asked for where accelerate does not do it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not torch.cuda.is_available():
        raise RunStopped(
            "accelerate shards a policy (FSDP) on accelerators only and would silently ignore it here; on CPU start the "
            "ranks with torchrun and without FSDP"
        )
    # The others wait while the first evaluates: longer than a collective's usual half hour.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
