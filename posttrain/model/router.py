"""The MoE router seen from outside: which experts were chosen, how evenly, and whether the sampler chose the same.

Shapes: N tokens of a forward pass, L MoE layers, E routed experts, K chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain.parity import Flip

_ROUTER_CLASS = re.compile(r"Top[kK]Router$")


def find_routers(model: torch.nn.Module) -> list[Any]:
    """The router modules of a transformers MoE model, in layer order; empty for a dense model.

    Not those of a multi-token-prediction module that hangs on the model as `mtp`: the sampler has no such layer.
    """
    return [
        module
        for name, module in model.named_modules()
        if _ROUTER_CLASS.search(type(module).__name__) and "mtp" not in name.split(".")
    ]


@dataclass
class RouterTrace:
    """What the routers did in one forward pass, a tensor per layer."""

    logits: list[torch.Tensor] = field(default_factory=list)  # [N, E] each, before the sigmoid or softmax
    chosen: list[torch.Tensor] = field(default_factory=list)  # [N, K] each, int64
    used: list[torch.Tensor] = field(default_factory=list)  # [N, K] each, int64, where others were replayed instead

    def chosen_NLK(self) -> torch.Tensor:
        """What the routers chose."""
        return torch.stack(self.chosen, dim=1)

    def used_NLK(self) -> torch.Tensor:
        """The experts that computed."""
        return torch.stack(self.used_layers, dim=1)

    def of_tokens(self, places_N: torch.Tensor) -> RouterTrace:
        """The trace of other tokens, each of which is one of these."""
        return RouterTrace(*([layer[places_N] for layer in part] for part in (self.logits, self.chosen, self.used)))

    @property
    def used_layers(self) -> list[torch.Tensor]:
        """The experts that computed, [N, K] for each layer."""
        return self.used or self.chosen


@contextmanager
def record_routing(
    routers: list[Any], trace: RouterTrace | None = None, *, with_gradient: bool = False
) -> Iterator[RouterTrace]:
    """Record every router's decision while the block runs.

    A forward pass that gradient checkpointing repeats happens in the backward pass, outside the block, and so is not
    counted twice.

    Args:
        routers: see `find_routers`.
        trace: to add to; None begins a new one.
        with_gradient: keep the logits in the graph, for a balance loss.
    """
    found = RouterTrace() if trace is None else trace

    def remember(_module: Any, _inputs: Any, output: Any) -> None:
        found.logits.append(output[0] if with_gradient else output[0].detach())
        found.chosen.append(output[2].detach())

    # First of all hooks: what the router itself chose, before anything is replayed.
    handles = [router.register_forward_hook(remember, prepend=True) for router in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def expert_counts(chosen: Sequence[torch.Tensor], real_N: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many real tokens each expert received: int64 [L, E].

    Args:
        chosen: [N, K] for each layer.
        real_N: False for padding, which does not count.
        num_experts: E.
    """
    rows = [torch.bincount(chosen_NK[real_N].flatten(), minlength=num_experts) for chosen_NK in chosen]
    return torch.stack(rows)


def violations(counts_LE: torch.Tensor) -> torch.Tensor:
    """MaxVio of each layer, [L]: (maximum expert load / mean expert load) - 1; 0 is perfect balance."""
    loads = counts_LE.float()
    return loads.max(dim=1).values / loads.mean(dim=1).clamp(min=1e-9) - 1


def max_violation(counts_LE: torch.Tensor) -> float:
    """MaxVio of the worst layer."""
    return float(violations(counts_LE).max())


def entropy_sum(logits_NE: torch.Tensor, real_N: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Entropy of the router's distribution over experts, nats, summed over real tokens; log(E) a token is the most.

    Args:
        logits_NE: the router's.
        real_N: False for padding.
        sigmoid: whether affinities are sigmoids made to sum to one (DeepSeek-V3), or a softmax.
    """
    probabilities_NE = affinities(logits_NE[real_N].float(), sigmoid=sigmoid)
    return -(probabilities_NE * probabilities_NE.clamp(min=1e-20).log()).sum()


def affinities(logits_NE: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Non-negative and summing to one over experts: sigmoid / sum (DeepSeek-V3, equation 19) or softmax."""
    if not sigmoid:
        return logits_NE.softmax(dim=-1)
    scores_NE = logits_NE.sigmoid()
    return scores_NE / scores_NE.sum(dim=-1, keepdim=True)


def has_correction_bias(routers: list[Any]) -> bool:
    """Whether these are routers of DeepSeek-V3's kind: sigmoid affinities and a bias that only the choice sees."""
    return bool(routers) and all(hasattr(router, "e_score_correction_bias") for router in routers)


@torch.no_grad()
def update_correction_bias(routers: list[Any], counts_LE: torch.Tensor, speed: float) -> None:
    """Auxiliary-loss-free balance (DeepSeek-V3, section 2.1.2): overloaded experts' bias falls by `speed`, others' rises.

    Raises:
        ValueError: the model's router has no correction bias.
    """
    for router, counts_E in zip(routers, counts_LE, strict=True):
        if not hasattr(router, "e_score_correction_bias"):
            raise ValueError(
                f"router.bias_update_speed={speed} needs a router with a correction bias and {type(router).__name__} "
                f"has none; set router.bias_update_speed: 0"
            )
        load_E = counts_E.float()
        router.e_score_correction_bias += speed * torch.sign(load_E.mean() - load_E).to(router.e_score_correction_bias)


def find_flips(
    sampler_TLK: np.ndarray, learner_NLK: torch.Tensor, trace: RouterTrace, rows: torch.Tensor, routers: list[Any]
) -> list[Flip]:
    """Compare the experts of one sample.

    Args:
        sampler_TLK: the sampler's choice for tokens 0 .. T-1, in any order of the K.
        learner_NLK: the learner's choice for all tokens of the forward pass.
        trace: its scores.
        rows: int64 [T], where the sample's tokens are among the N.
        routers: for their groups and bias.
    """
    ours = learner_NLK[rows].sort(dim=-1).values
    theirs = torch.from_numpy(np.ascontiguousarray(sampler_TLK)).to(ours).sort(dim=-1).values
    different_TL = (ours != theirs).any(dim=-1)
    flips = []
    for position, layer in different_TL.nonzero().tolist():
        scores_E = choice_scores(trace.logits[layer][rows[position]], routers[layer])
        margin = _margin(
            scores_E, set(ours[position, layer].tolist()), set(theirs[position, layer].tolist()), routers[layer]
        )
        flips.append(Flip(position, layer, margin))
    return flips


def choice_scores(logits_E: torch.Tensor, router: Any) -> torch.Tensor:
    """The scores that the top-k is taken of: sigmoid plus bias for DeepSeek-V3, softmax elsewhere; float32."""
    if hasattr(router, "e_score_correction_bias"):
        return logits_E.float().sigmoid() + router.e_score_correction_bias.float()
    return logits_E.float().softmax(dim=-1)


def _margin(scores_E: torch.Tensor, ours: set[int], theirs: set[int], router: Any) -> float:
    """The smallest change of scores that would explain the other choice (0 is an exact tie).

    Group-limited routing first keeps the groups with the highest sum of their two best scores; an expert outside the
    kept groups can only be chosen if its group is.
    """
    only_ours, only_theirs = ours - theirs, theirs - ours
    num_groups = getattr(router, "num_group", 1) or 1
    size = scores_E.numel() // num_groups
    if num_groups > 1:
        group_scores = scores_E.view(num_groups, size).topk(2, dim=-1).values.sum(dim=-1)
        kept = set(group_scores.topk(router.topk_group).indices.tolist())
        foreign = {expert // size for expert in only_theirs} - kept
        if foreign:
            weakest_kept = min(float(group_scores[group]) for group in kept)
            return max(weakest_kept - float(group_scores[group]) for group in foreign)
    return max(float(scores_E[a]) for a in only_ours) - min(float(scores_E[b]) for b in only_theirs)
