"""Losses that balance the load of experts, as pure functions.

Shapes: N tokens of a forward pass (padding among them), L MoE layers, E routed experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sequence_balance(affinity_NE: torch.Tensor, sequence_N: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Sequence-wise balance loss of one layer (DeepSeek-V3, equations 17 to 20), without alpha.

    Of a sequence of T tokens: sum_i f_i P_i, where f_i = E / (K T) x how many of its tokens have expert i among their K
    highest affinities, and P_i is the mean affinity of expert i. 1 when all experts are used alike; E / K at most.

    Args:
        affinity_NE: non-negative, summing to one over experts, with gradient. The correction bias has no part in it.
        sequence_N: int64, the sequence of each token, 0 .. S-1 in any order; -1 for padding.
        num_chosen: K.

    Returns:
        The sum over sequences, a scalar. The caller divides by their global number.
    """
    real_N = sequence_N >= 0
    if not bool(real_N.any()):
        return affinity_NE.sum() * 0.0
    affinity_NE, sequence_N = affinity_NE[real_N], sequence_N[real_N]
    num_experts, num_sequences = affinity_NE.shape[1], int(sequence_N.max()) + 1
    wanted_NE = torch.zeros_like(affinity_NE).scatter_(1, affinity_NE.detach().topk(num_chosen, dim=1).indices, 1.0)
    empty_SE = affinity_NE.new_zeros(num_sequences, num_experts)
    length_S = torch.bincount(sequence_N, minlength=num_sequences).clamp(min=1).to(affinity_NE.dtype)
    load_SE = empty_SE.index_add(0, sequence_N, wanted_NE) * num_experts / (num_chosen * length_S[:, None])
    mean_SE = empty_SE.index_add(0, sequence_N, affinity_NE) / length_S[:, None]
    return (load_SE * mean_SE).sum()


def switch_balance(
    logits: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor], real_N: torch.Tensor
) -> torch.Tensor:
    """The classical auxiliary loss (Switch Transformer, equations 4 to 6) as Qwen3-MoE and Mixtral use it, without
    its coefficient: E x sum_i f_i P_i over the real tokens of all layers together.

    Args:
        logits: of each layer, [N, E], with gradient.
        chosen: of each layer, [N, K], int64.
        real_N: False for padding, which does not count.

    Returns:
        A scalar; K when balanced.
    """
    if not bool(real_N.any()):
        return torch.stack([layer.sum() for layer in logits]).sum() * 0.0
    num_experts = logits[0].shape[1]
    probability_E = torch.cat([layer[real_N] for layer in logits]).float().softmax(dim=-1).mean(dim=0)
    chosen_all = torch.cat([layer[real_N] for layer in chosen])
    share_E = torch.bincount(chosen_all.flatten(), minlength=num_experts).to(probability_E) / len(chosen_all)
    return num_experts * (share_E * probability_E).sum()
