"""Expert parallelism: each rank of a group keeps whole experts, and tokens travel to them and back.

FSDP2 alone brings all experts of a layer to every rank, for DeepSeek-V3 45 GiB in float32, and does so for each microbatch.
Here a group of P ranks divides the experts of each layer; a token's state goes to the ranks of the experts that its router
chose (all-to-all), is multiplied there by the module's own kernels, and comes back to be weighted and summed. With more ranks
than P, rank r of each group holds the same experts, spread over these ranks by FSDP2 along the last dimension: in the second,
gate and up of an expert are joined, which are read from a checkpoint one by one.

An expert sees the tokens of its whole group, so its gradient is a sum over these ranks where the other weights' is an average:
it is divided by P on its way to the weights.

Shapes: N tokens of this rank, K experts of a token, D hidden size, E experts of a layer, P ranks of a group, M tokens that
this rank's E / P experts are sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from posttrain.collectives import AllToAll
from posttrain.layout import require_expert_groups


def find_experts(model: torch.nn.Module) -> list[Any]:
    """The modules of a transformers model that hold a layer's routed experts as tensors [E, ...], in layer order."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "num_experts")
        and (held := list(module.parameters(recurse=False)))
        and all(len(tensor) == module.num_experts for tensor in held)
        and any(tensor.ndim == 3 for tensor in held)  # a router has a row for each expert, too
    ]


def spread(model: torch.nn.Module, mesh: DeviceMesh) -> set[torch.nn.Parameter]:
    """Keep this rank's experts alone, and let tokens travel to those of others; in place.

    Args:
        model: whose experts are whole.
        mesh: [ranks / P, P].

    Returns:
        The parameters that FSDP2 must leave alone from here on.

    Raises:
        ValueError: there are no experts, or they do not divide by the ranks.
    """
    groups, size = mesh.shape
    modules = find_experts(model)
    require_expert_groups(modules[0].num_experts if modules else 0, size)
    for module in modules:
        _require_even(module, groups)
        first = mesh.get_local_rank(1) * (module.num_experts // size)
        for name, whole in list(module.named_parameters(recurse=False)):
            # A copy: a view would keep all experts in memory.
            own = whole.detach()[first : first + module.num_experts // size].clone()
            part = DTensor.from_local(own, mesh[mesh.mesh_dim_names[1]], [Shard(0)], run_check=False)  # type: ignore[index]
            setattr(module, name, torch.nn.Parameter(part, requires_grad=whole.requires_grad))
        module.forward = _Travel(module, mesh.get_group(1), size)
        if groups > 1:
            fully_shard(module, mesh=mesh[mesh.mesh_dim_names[0]], shard_placement_fn=lambda p: Shard(p.ndim - 1))  # type: ignore[index]
    return {tensor for module in modules for tensor in module.parameters()}


def _require_even(module: Any, groups: int) -> None:
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.shape[-1] % groups:
            raise ValueError(
                f"learner.num_workers / learner.expert_parallel_size = {groups}: so many ranks share the last dimension of "
                f"{name}, {tensor.shape[-1]}, which is no multiple of them; raise expert_parallel_size or lower num_workers"
            )


class _Travel:
    """An experts module's `forward`, with tokens sent to the ranks of their experts and back."""

    def __init__(self, module: Any, group: dist.ProcessGroup, size: int) -> None:
        self._module, self._group, self._size = module, group, size
        self._own = module.num_experts // size

    def __call__(self, hidden_ND: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """As the module's own: the weighted sum of what the chosen experts make of each token, [N, D]."""
        dtype, kind = hidden_ND.dtype, hidden_ND.device.type
        num_chosen = chosen_NK.shape[1]
        if torch.is_autocast_enabled(kind):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(kind))  # as the experts' products would: half the bytes
        # By expert, and so by rank: rank p has the experts from p E / P on.
        order = chosen_NK.flatten().argsort(stable=True)
        counts_PE = torch.bincount(chosen_NK.flatten(), minlength=self._own * self._size).view(self._size, self._own)
        arriving_PE = torch.empty_like(counts_PE)
        dist.all_to_all_single(arriving_PE, counts_PE, group=self._group)
        away, here = counts_PE.sum(1).tolist(), arriving_PE.sum(1).tolist()
        arrived_MD = AllToAll.apply(hidden_ND[order // num_chosen], away, here, self._group)
        experts = torch.arange(self._own, device=chosen_NK.device).repeat(self._size)
        computed_MD = self._compute(arrived_MD, experts.repeat_interleave(arriving_PE.flatten()))
        back = AllToAll.apply(computed_MD, here, away, self._group)
        of_token_NKD = torch.empty_like(back).index_copy(0, order, back).view(*chosen_NK.shape, -1)
        return (of_token_NKD * weights_NK[..., None]).sum(1).to(dtype)

    def _compute(self, hidden_MD: torch.Tensor, expert_M: torch.Tensor) -> torch.Tensor:
        """What this rank's experts make of tokens, one expert each."""
        tensors = {
            name: _Scaled.apply(tensor.to_local() if isinstance(tensor, DTensor) else tensor, 1 / self._size)
            for name, tensor in self._module.named_parameters(recurse=False)
        }
        if not len(hidden_MD):
            # Nothing came here. This rank takes part in the backward pass all the same, and its gradients are zeros.
            return hidden_MD + 0.0 * sum(tensor.sum() for tensor in tensors.values())
        own = _OwnExperts(self._module, num_experts=self._own, **tensors)
        ones = hidden_MD.new_ones(len(hidden_MD), 1)
        found: torch.Tensor = type(self._module).forward(own, hidden_MD, expert_M[:, None], ones)
        return found


class _OwnExperts:
    """An experts module with some attributes of another value, for its own `forward` to run on."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Scaled(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None
