"""Divergences between a teacher's and a student's distribution of the next token, as pure functions.

Soft targets and their temperature: Hinton et al. (arXiv 1503.02531). Forward KL, reverse KL and the generalised
Jensen-Shannon divergence between them: GKD (arXiv 2306.13649, section 2). Of a large vocabulary the teacher's K likeliest
tokens can stand for themselves and all others for one event, so that no probability is lost: K tokens made to sum to one
teach a student to be too sure of them (arXiv 2503.16870).

Shapes: C positions, V vocabulary, K of the teacher's likeliest tokens, E events: V, or K + 1 of which the last is all other
tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

_LEAST_LOGPROB = -1e4  # stands for a probability of 0, whose difference to another 0 must be a number


def event_logprobs(logits_CV: torch.Tensor, temperature: float, tokens_CK: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of the events under softmax(logits / temperature), float32 [C, E]; exp of a row sums to 1.

    Args:
        logits_CV: of any floating type.
        temperature: above 0.
        tokens_CK: int64, different tokens that are events of their own; all other tokens together are the last event. None:
            each token is one.
    """
    scaled_CV = logits_CV.float()
    if temperature != 1.0:
        scaled_CV = scaled_CV / temperature
    logprobs_CV = scaled_CV.log_softmax(dim=-1)
    if tokens_CK is None:
        return logprobs_CV.clamp(min=_LEAST_LOGPROB)
    # Summed over the others and not taken as 1 - sum(K), of which no digit would be left where K have nearly everything.
    rest_C1 = logprobs_CV.scatter(1, tokens_CK, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs_CV.gather(1, tokens_CK), rest_C1], dim=1).clamp(min=_LEAST_LOGPROB)


def divergence(teacher_CE: torch.Tensor, student_CE: torch.Tensor, kind: Divergence, beta: float = 0.5) -> torch.Tensor:
    """How far the student is from the teacher, nats, [C]; 0 where they agree.

    With P of the teacher, Q of the student and M = beta P + (1 - beta) Q:
        forward_kl = KL(P || Q)      the student covers all that the teacher might say
        reverse_kl = KL(Q || P)      the student says nothing that the teacher would not
        jsd = beta KL(P || M) + (1 - beta) KL(Q || M)    at most ln 2 (beta 0.5); jsd / beta tends to forward_kl for beta to
            0, jsd / (1 - beta) to reverse_kl for beta to 1

    Args:
        teacher_CE: log-probabilities, see `event_logprobs`.
        student_CE: the same events; with gradient.
        kind: of divergence.
        beta: between 0 and 1, exclusive; of jsd only.

    Raises:
        ValueError: unknown kind, or a beta that is 0 or 1.
    """
    if kind == "forward_kl":
        return _kl(teacher_CE, student_CE)
    if kind == "reverse_kl":
        return _kl(student_CE, teacher_CE)
    if kind != "jsd":
        raise ValueError(f"divergence {kind!r} is unknown; choose forward_kl, reverse_kl or jsd")
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} is not between 0 and 1; for their limits take forward_kl and reverse_kl")
    mixed_CE = torch.logaddexp(teacher_CE + math.log(beta), student_CE + math.log1p(-beta))
    return beta * _kl(teacher_CE, mixed_CE) + (1 - beta) * _kl(student_CE, mixed_CE)


def distillation_loss(
    student_logits_CV: torch.Tensor,
    teacher_CE: torch.Tensor,
    tokens_CK: torch.Tensor | None,
    *,
    kind: Divergence,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Divergence times the square of the temperature, summed; gradients then are as large at any temperature (Hinton et al.,
    section 2).

    Args:
        student_logits_CV: with gradient.
        teacher_CE: log-probabilities at the same temperature, see `event_logprobs`.
        tokens_CK: int64, the teacher's likeliest tokens, likeliest first; None: events are tokens.
        kind, beta: see `divergence`.
        temperature: above 0.

    Returns:
        loss_sum: scalar, to be divided by the number of positions, all microbatches and ranks together.
        sums: detached sums over positions: `divergence` (nats, without the square of the temperature), `teacher_entropy`
            (nats), `agreement` (1 where both find the same token likeliest), `teacher_mass` (probability that the teacher
            gives to the events that are single tokens).
    """
    student_CE = event_logprobs(student_logits_CV, temperature, tokens_CK)
    divergence_sum = divergence(teacher_CE, student_CE, kind, beta).sum()
    with torch.no_grad():
        first_C = teacher_CE.argmax(dim=-1) if tokens_CK is None else tokens_CK[:, 0]
        rest = 0.0 if tokens_CK is None else teacher_CE[:, -1].exp().sum()
        sums = {
            "divergence": divergence_sum.detach(),
            "teacher_entropy": -(teacher_CE.exp() * teacher_CE).sum(),
            "agreement": (student_logits_CV.argmax(dim=-1) == first_C).sum().float(),
            "teacher_mass": len(first_C) - torch.as_tensor(rest, device=teacher_CE.device),
        }
    return temperature**2 * divergence_sum, sums


def _kl(first_CE: torch.Tensor, second_CE: torch.Tensor) -> torch.Tensor:
    """KL(first || second) of log-probabilities, [C]."""
    return (first_CE.exp() * (first_CE - second_CE)).sum(dim=-1)
