"""FSDP2 for the learner: weights, gradients and optimizer state spread over the ranks, and whole again where others need them.

Torch's `fully_shard` is applied here and not by accelerate, which shards on accelerators only and would silently train
unsharded on CPU. Each decoder layer is gathered when it computes; embedding, last norm and head stay gathered from the
forward pass to the end of the backward pass, since the head is asked once for each chunk of tokens. Gradients are averaged
over ranks, as DDP does, and reduced after each microbatch, so that no rank ever keeps whole gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain import expert_parallel
from posttrain.model.token_scorer import TokenScorer


def shard(scorer: TokenScorer, accelerator: Accelerator, expert_parallel_size: int = 1) -> None:
    """Spread a model's weights over all ranks, in place; an optimizer must be made afterwards. Collective.

    Args:
        scorer: of a whole model.
        accelerator: of this rank.
        expert_parallel_size: ranks over which the experts of each layer are divided; see `posttrain.expert_parallel`.

    Raises:
        ValueError: one rank only, a model that does not say what its layers are, or experts that do not divide.
    """
    if accelerator.num_processes < 2:
        raise ValueError("learner.parallel: fsdp spreads the policy over ranks; set learner.num_workers: 2 or more")
    names = set(getattr(scorer.model, "_no_split_modules", None) or ())
    layers = [module for module in scorer.model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"learner.parallel: fsdp: {type(scorer.model).__name__} does not name its layers (_no_split_modules), so it would "
            f"be gathered whole; set learner.parallel: ddp"
        )
    ranks, device = accelerator.num_processes, accelerator.device.type
    experts: set[torch.nn.Parameter] = set()
    if expert_parallel_size > 1:
        groups = init_device_mesh(
            device, (ranks // expert_parallel_size, expert_parallel_size), mesh_dim_names=("spread", "experts")
        )
        experts = expert_parallel.spread(scorer.model, groups)
    mesh = init_device_mesh(device, (ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=experts)
    # False also where there is no backward pass: see `release`.
    fully_shard(scorer, mesh=mesh, reshard_after_forward=False, ignored_params=experts)
    if accelerator.mixed_precision == "bf16":
        scorer.forward = in_bfloat16(scorer.forward, accelerator.device.type)  # type: ignore[method-assign]


def in_bfloat16(forward: Any, device_type: str) -> Any:
    """As accelerate does for DDP, so that both compute the same: weights in float32, products in bfloat16.

    Without autocast's cache, which would hold copies of all gathered layers to the end of the forward pass: the whole policy
    on every rank.
    """
    return torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)(forward)


def release(scorer: torch.nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered. An optimizer step would not reach it, and the next
    forward pass would compute with the old embedding and head.
    """
    if isinstance(scorer, FSDPModule):
        scorer.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over ranks. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors by name, those that were spread in main memory. Collective.

    Args:
        tensors: in the same order on every rank.
        keep: whether this rank wants them; the others get nothing and never hold more than one.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keep:
            found[name] = complete.cpu() if isinstance(tensor, DTensor) else complete
    return found


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients that are spread over ranks down to a norm, and return what it was. Collective."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            # Torch takes norms of one kind of spreading at a time, and experts may be spread in another way.
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups.values()
    ]
    norm = torch.nn.utils.get_total_norm(norms) if len(norms) > 1 else norms[0]
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return float(norm)


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole weights into a model that may be spread over ranks, each rank its part.

    Raises:
        ValueError: names other than the model's.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(
            f"weights of another model: {sorted(own.keys() ^ weights.keys())[:2]} are in one of the two only"
        )
    for name, tensor in own.items():
        whole = weights[name]
        if isinstance(tensor, DTensor):
            # Every rank has read the whole tensor, so none need be sent.
            place = whole.to(tensor.device)
            whole = distribute_tensor(place, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(whole)
