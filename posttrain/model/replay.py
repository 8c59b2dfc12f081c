"""Routing replay: the learner sends each token to the experts that the sampler chose (R3, arXiv 2510.11370; DeepSeek-V3.2,
section 3.1, "keep routing").

Only the choice is replayed. The gates are the learner's own affinities of those experts, with gradient, so the router goes on
learning. Shapes: N tokens of a forward pass, L MoE layers, E routed experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from posttrain.model.router import RouterTrace


@contextmanager
def replay_routing(routers: list[Any], experts_NLK: torch.Tensor | None, trace: RouterTrace) -> Iterator[None]:
    """Make the routers choose these experts while the block runs.

    The block must hold the backward pass too: gradient checkpointing repeats the forward pass there.

    Args:
        routers: see `posttrain.model.router.find_routers`.
        experts_NLK: what each token's experts are to be; -1 leaves the choice to the router. None changes nothing.
        trace: of `record_routing` around this block, whose `chosen` become the experts that were used in the end.

    Raises:
        ValueError: experts of another number of layers, or a router whose gates are not known.
    """
    if experts_NLK is None:
        yield
        return
    if len(routers) != experts_NLK.shape[1]:
        raise ValueError(
            f"the sampler named experts of {experts_NLK.shape[1]} layers and the model has {len(routers)} with routers; "
            f"set router.replay: false"
        )
    handles = [
        router.register_forward_hook(partial(_replay, layer, experts_NLK[:, layer].long(), trace))
        for layer, router in enumerate(routers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replay(
    layer: int, planned_NK: torch.Tensor, trace: RouterTrace, router: Any, _inputs: Any, output: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_NE, gates_NK, chosen_NK = output
    if planned_NK.shape != chosen_NK.shape:
        raise ValueError(
            f"the sampler named {planned_NK.shape[1]} experts for each of {len(planned_NK)} tokens and "
            f"{type(router).__name__} chose {chosen_NK.shape[1]} for {len(chosen_NK)}; set router.replay: false"
        )
    _require_known_gates(router, logits_NE, gates_NK, chosen_NK)
    used_NK = torch.where(planned_NK >= 0, planned_NK, chosen_NK)
    if layer == len(trace.used):  # not when gradient checkpointing repeats the forward pass
        trace.used.append(used_NK.detach())
    return logits_NE, gates(router, logits_NE, used_NK).to(gates_NK.dtype), used_NK


def gates(router: Any, logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
    """The weights that a router gives to experts of anyone's choice; float32 [N, K], with gradient.

    Sigmoid affinities for routers with a correction bias (DeepSeek-V3, equations 12 to 15), softmax for others, made to sum to
    one and scaled where the router does that.
    """
    logits_NE = logits_NE.float()
    affinities_NE = logits_NE.sigmoid() if hasattr(router, "e_score_correction_bias") else logits_NE.softmax(dim=-1)
    gates_NK = affinities_NE.gather(1, chosen_NK)
    if getattr(router, "norm_topk_prob", True):
        gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return gates_NK * float(getattr(router, "routed_scaling_factor", 1.0))


def _require_known_gates(router: Any, logits_NE: torch.Tensor, gates_NK: torch.Tensor, chosen_NK: torch.Tensor) -> None:
    """Refuse a router that weighs its own choice otherwise than `gates` does; seen once for each."""
    if getattr(router, "_gates_are_known", False):
        return
    with torch.no_grad():
        gap = float((gates(router, logits_NE, chosen_NK) - gates_NK.float()).abs().max())
    # A router in bfloat16 rounds its gates to three digits.
    if gap > (1e-5 if gates_NK.dtype == torch.float32 else 2e-2):
        raise ValueError(
            f"router.replay: {type(router).__name__} weighs experts in a way that is not known here (its gates differ by "
            f"{gap:.1e}); set router.replay: false"
        )
    router._gates_are_known = True
