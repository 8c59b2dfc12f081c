"""Losses as pure functions of tensors and numbers.

A loss returns `(loss_sum, metrics)`: a sum over the trained tokens, and sums under the names they get as means. The
caller owns the denominator, because only it knows the tokens of the other microbatches and ranks.

Shapes: R rows of a packed microbatch, W tokens of a row, V vocabulary, N = R x W.
Entry [r, w] of a per-token tensor speaks of predicting token w from the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]

_CHUNK_TOKENS = 1024


def token_logprobs(
    logits_RWV: torch.Tensor, input_ids_RW: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and the entropy of that distribution.

    Works on slices of the flattened logits, so beside the logits there is at most one float32 copy of them (none for
    float32 logits at temperature 1), and probabilities exist for one slice at a time.

    Args:
        logits_RWV: of any floating type; entry w predicts token w + 1.
        input_ids_RW: int64, the tokens.
        temperature: above 0; that of the sampler.

    Returns:
        logprobs_RW: float32, natural log; column 0 is 0, because nothing predicts the first token. Where a sample
            starts inside a packed row the value is meaningless: its predictor is another sample. Mask it.
        entropy_RW: float32, nats, detached; entry w is of the distribution that predicts token w.

    Raises:
        ValueError: temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} is not above 0; logprobs need the temperature that was sampled with"
        )
    R, W, V = logits_RWV.shape
    # The targets are shifted and not the logits: dropping the last position of the logits would copy them all.
    # Whatever the last position of a row "predicts" is thrown away below.
    targets_N = torch.roll(input_ids_RW, shifts=-1, dims=1).reshape(R * W)
    logprobs, entropies = [], []
    # One split, not many slices: the backward pass of a slice allocates zeros as large as all the logits.
    for logits_CV, targets_C in zip(
        logits_RWV.reshape(R * W, V).split(_CHUNK_TOKENS), targets_N.split(_CHUNK_TOKENS), strict=True
    ):
        scaled_CV = logits_CV.float()
        if temperature != 1.0:
            scaled_CV = scaled_CV / temperature
        log_normaliser_C = scaled_CV.logsumexp(dim=-1)
        logprobs.append(scaled_CV.gather(1, targets_C[:, None]).squeeze(1) - log_normaliser_C)
        with torch.no_grad():
            # -p ln p, which is 0 (and not NaN) at p = 0.
            entropies.append(torch.special.entr((scaled_CV - log_normaliser_C[:, None]).exp_()).sum(dim=-1))
    return _shift_right(logprobs, R, W), _shift_right(entropies, R, W)


def _shift_right(chunks: Iterable[torch.Tensor], R: int, W: int) -> torch.Tensor:
    """[N] in pieces, indexed by the predicting position -> [R, W] indexed by the predicted one, column 0 zero."""
    values_RW = torch.cat(tuple(chunks)).view(R, W)
    return torch.nn.functional.pad(values_RW[:, :-1], (1, 0))


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: KlEstimator = "k3") -> torch.Tensor:
    """Estimate of KL(policy || reference) from one sample per token, nats, same shape as the inputs.

    With d = logprobs - ref_logprobs, sampled from the policy (Schulman, "Approximating KL divergence", 2020):
        k1 = d               unbiased, noisy, may be negative; its own gradient is zero on average: for monitoring
        k2 = d^2 / 2         biased, never negative; its gradient is that of KL(policy || reference)
        k3 = e^-d + d - 1    unbiased, never negative (DeepSeekMath, equation 4); its gradient is that of
                             KL(reference || policy)

    Entries that carry no token must be equal in both inputs (0 is what packing writes): e^-d overflows float32 where a
    masked logprob lies below -88 and its reference is 0, and infinity times a mask of 0 is NaN.

    Raises:
        ValueError: unknown kind.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.exp(-difference) + difference - 1.0
    raise ValueError(f"kl estimator {kind!r} is unknown; choose k1, k2 or k3")


def clipped_policy_gradient(
    logprobs_RW: torch.Tensor,
    old_logprobs_RW: torch.Tensor,
    advantages_RW: torch.Tensor,
    loss_mask_RW: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    weights_RW: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) as GRPO uses it (DeepSeekMath, equation 3).

    Sums -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A) over the trained tokens, with
    ratio = exp(logprobs - old_logprobs).

    Args:
        logprobs_RW: float32, with gradient.
        old_logprobs_RW: float32, the same tokens under the policy before the first minibatch.
        advantages_RW: float32.
        loss_mask_RW: bool, the trained tokens.
        epsilon_low: the ratio is clipped below 1 - epsilon_low.
        epsilon_high: the ratio is clipped above 1 + epsilon_high (DAPO, arXiv 2503.14476, lets it be larger).
        weights_RW: float32, a factor per token, such as `sequence_mean_weights`; None is 1 for each.

    Returns:
        loss_sum: scalar with gradient.
        metrics: detached sums over the trained tokens, unweighted: `clip_fraction` (tokens whose gradient the clip
            takes away) and `ratio_mean`.
    """
    # Masked before exp: an untrained token's logprob is arbitrary, and infinity times a mask of 0 would be NaN.
    log_ratio_RW = torch.where(loss_mask_RW, logprobs_RW - old_logprobs_RW, 0.0)
    ratio_RW = log_ratio_RW.exp()
    clipped_RW = ratio_RW.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    loss_RW = -torch.minimum(ratio_RW * advantages_RW, clipped_RW * advantages_RW) * loss_mask_RW
    if weights_RW is not None:
        loss_RW = loss_RW * weights_RW
    with torch.no_grad():
        too_high_RW = (ratio_RW > 1.0 + epsilon_high) & (advantages_RW > 0)
        too_low_RW = (ratio_RW < 1.0 - epsilon_low) & (advantages_RW < 0)
        metrics = {
            "clip_fraction": ((too_high_RW | too_low_RW) & loss_mask_RW).sum().float(),
            "ratio_mean": (ratio_RW * loss_mask_RW).sum(),
        }
    return loss_RW.sum(), metrics


def sequence_mean_weights(sample_ids_RW: torch.Tensor, loss_mask_RW: torch.Tensor) -> torch.Tensor:
    """1 / (trained tokens of the token's sample), float32 [R, W]; 0 where nothing is trained.

    Turns a sum over tokens into a sum of per-sample means, GRPO's 1 / |o_i|; divide by the number of samples.

    Args:
        sample_ids_RW: int64, -1 for padding; a sample lies whole in this microbatch.
        loss_mask_RW: bool, the trained tokens.
    """
    # Index 0 of the counts is padding's.
    counts = torch.bincount((sample_ids_RW + 1)[loss_mask_RW], minlength=int(sample_ids_RW.max()) + 2)
    return torch.where(loss_mask_RW, 1.0 / counts[sample_ids_RW + 1].clamp(min=1), 0.0)


def nll(logprobs_RW: torch.Tensor, loss_mask_RW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood summed over the trained tokens, nats; the metric `nll` is the same sum, detached."""
    loss_sum = -torch.where(loss_mask_RW, logprobs_RW, 0.0).sum()
    return loss_sum, {"nll": loss_sum.detach()}
