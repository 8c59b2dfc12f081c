"""This process among those of a run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from posttrain.errors import RunStopped

# What accelerate tells its processes -> what was asked for. Checkpoints, balance and losses here know nothing of these, and
# accelerate would go ahead all the same.
_UNKNOWN_HERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def join_ranks() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    Raises:
        RunStopped: FSDP was asked for where accelerate does not do it, or what is not known here.
    """
    for variable, name in _UNKNOWN_HERE.items():
        if os.environ.get(variable, "").lower() == "true":
            raise RunStopped(
                f"{name} is not supported: start the ranks with --use_fsdp, which spreads weights, gradients and optimizer, "
                f"or without; long samples take gradient_checkpointing"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not torch.cuda.is_available():
        raise RunStopped(
            "accelerate shards a policy (FSDP) on accelerators only and would silently ignore it here; on CPU start the "
            "ranks with torchrun and without FSDP"
        )
    # The others wait while the first evaluates: longer than a collective's usual half hour.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
