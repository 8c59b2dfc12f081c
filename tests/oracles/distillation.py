"""Distillation the slow way: one sample at a time, all logits, probabilities in float64.

Shares no code with `posttrain.distillation_losses`, `posttrain.distillation` or `posttrain.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100


def divergence_of(
    teacher_V: torch.Tensor, student_V: torch.Tensor, kind: str, *, beta: float = 0.5, top_k: int | None = None
) -> torch.Tensor:
    """Of two vectors of probabilities, the sums written out; with `top_k` of the K + 1 lumped ones."""
    if top_k is not None:
        order = torch.argsort(teacher_V, descending=True)[:top_k]
        teacher_V, student_V = (torch.cat([p[order], (1 - p[order].sum())[None]]) for p in (teacher_V, student_V))
    if kind == "forward_kl":
        return (teacher_V * torch.log(teacher_V / student_V)).sum()
    if kind == "reverse_kl":
        return (student_V * torch.log(student_V / teacher_V)).sum()
    mixed_V = beta * teacher_V + (1 - beta) * student_V
    to_teacher = (teacher_V * torch.log(teacher_V / mixed_V)).sum()
    return beta * to_teacher + (1 - beta) * (student_V * torch.log(student_V / mixed_V)).sum()


def probabilities(model: Any, ids: Sequence[int], temperature: float) -> torch.Tensor:
    """[T, V] in float64, of the next token at each place, in a forward pass of the sample alone."""
    logits_TV = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return torch.softmax(logits_TV.double() / temperature, dim=-1)


def distilled_loss(
    student: Any, teacher: Any, samples: Sequence[tuple[list[int], list[int]]], section: dict[str, Any]
) -> torch.Tensor:
    """(1 - weight) cross-entropy + weight temperature^2 divergence, a mean over the labelled tokens of all samples."""
    weight, temperature = section.get("weight", 0.5), section.get("temperature", 1.0)
    kind, beta, top_k = section.get("divergence", "forward_kl"), section.get("beta", 0.5), section.get("top_k")
    count = sum(label != IGNORED for _, labels in samples for label in labels[1:])
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in samples:
        hard_TV, soft_TV = probabilities(student, ids, 1.0), probabilities(student, ids, temperature)
        with torch.no_grad():
            teacher_TV = probabilities(teacher, ids, temperature)
        for place, label in enumerate(labels[1:]):
            if label != IGNORED:
                apart = divergence_of(teacher_TV[place], soft_TV[place], kind, beta=beta, top_k=top_k)
                nll = -torch.log(hard_TV[place, label])
                total = total + (1 - weight) * nll + weight * temperature**2 * apart
    return total / count


def on_policy_loss(
    logprobs: Sequence[torch.Tensor], old: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]], epsilon: float
) -> torch.Tensor:
    """Mean over all tokens of the ratio to the old policy times (old policy's logprob - teacher's), PPO's clip on it.

    At ratio 1 its value is the sampled estimate of KL(policy || teacher) and its gradient that of REINFORCE on it.
    """
    parts = []
    for of_sample, before, taught in zip(logprobs, old, teacher, strict=True):
        for value, mine, theirs in zip(of_sample, before, taught, strict=True):
            ratio, cost = torch.exp(value - mine), mine - theirs
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
            parts.append(torch.maximum(ratio * cost, clipped * cost))
    return torch.stack(parts).mean()
