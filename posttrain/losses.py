"""Losses as pure functions of tensors and numbers.

A loss returns `(loss_sum, metrics)`: a sum over the trained tokens, and sums under the names they get as means. The
caller owns the denominator, because only it knows the tokens of the other microbatches and ranks.

Shapes: R rows of a packed microbatch, W tokens of a row, V vocabulary, N = R x W.
Entry [r, w] of a per-token tensor speaks of predicting token w from the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3", "unbiased"]

_CHUNK_TOKENS = 1024
_LEAST_LOGPROB = -1e4


def token_logprobs(
    logits_RWV: torch.Tensor,
    input_ids_RW: torch.Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
    candidates_RWC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and the entropy of that distribution.

    Works on slices of the flattened logits, so beside the logits there is at most one float32 copy of them (none for
    float32 logits at temperature 1), and probabilities exist for one slice at a time.

    Args:
        logits_RWV: of any floating type; entry w predicts token w + 1.
        input_ids_RW: int64, the tokens.
        temperature: above 0; that of the sampler.
        entropy_gradient: let a gradient through the entropy; costs one more float32 copy of the logits.
        candidates_RWC: int32, the tokens that top-k and top-p left entry w to be sampled from, -1 fills up; only these share
            the probability (DeepSeek-V3.2's keep-sampling-mask, section 3.1). Where all are -1, and without the argument,
            it is the whole vocabulary.

    Returns:
        logprobs_RW: float32, natural log; column 0 is 0, because nothing predicts the first token. Where a sample
            starts inside a packed row the value is meaningless: its predictor is another sample. Mask it.
        entropy_RW: float32, nats, detached unless asked for otherwise; entry w is of the distribution that predicts token w.

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
    candidates = _split_candidates(candidates_RWC)
    logprobs, entropies = [], []
    # One split, not many slices: the backward pass of a slice allocates zeros as large as all the logits.
    for logits_CV, targets_C in zip(
        logits_RWV.reshape(R * W, V).split(_CHUNK_TOKENS), targets_N.split(_CHUNK_TOKENS), strict=True
    ):
        logprobs_C, entropy_C = logprobs_of(
            logits_CV, targets_C, temperature, next(candidates), entropy_gradient=entropy_gradient
        )
        logprobs.append(logprobs_C)
        entropies.append(entropy_C)
    return _shift_right(logprobs, R, W), _shift_right(entropies, R, W)


def logprobs_of(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    temperature: float,
    allowed_CN: torch.Tensor | None = None,
    *,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the targets and entropy, float32 [C] each; as `token_logprobs`, without its shift.

    Args:
        logits_CV: of any floating type.
        targets_C: int64.
        temperature: above 0.
        allowed_CN: int32, the tokens that could be sampled, -1 fills up; None, and a row of nothing else, allow all.
        entropy_gradient: let a gradient through the entropy.
    """
    scaled_CV = logits_CV.float()
    if temperature != 1.0:
        scaled_CV = scaled_CV / temperature
    of_targets_C = scaled_CV.gather(1, targets_C[:, None]).squeeze(1)
    if allowed_CN is not None:
        scaled_CV = _truncated(scaled_CV, allowed_CN)
    log_normaliser_C = scaled_CV.logsumexp(dim=-1)
    logprobs_C = of_targets_C - log_normaliser_C
    if entropy_gradient:
        log_probabilities_CV = scaled_CV - log_normaliser_C[:, None]
        # A token that cannot come (-inf) counts 0, and so does its gradient.
        products_CV = log_probabilities_CV.exp() * log_probabilities_CV.clamp(min=_LEAST_LOGPROB)
        return logprobs_C, -products_CV.sum(dim=-1)
    with torch.no_grad():
        # -p ln p, which is 0 (and not NaN) at p = 0.
        return logprobs_C, torch.special.entr((scaled_CV - log_normaliser_C[:, None]).exp_()).sum(dim=-1)


def _split_candidates(candidates_RWC: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """The candidates of the tokens that each slice of positions predicts, [slice, candidates]; None without end otherwise."""
    if candidates_RWC is None:
        return repeat(None)
    shifted_RWC = torch.roll(candidates_RWC, shifts=-1, dims=1)
    return iter(shifted_RWC.reshape(-1, candidates_RWC.shape[-1]).split(_CHUNK_TOKENS))


def _truncated(scaled_CV: torch.Tensor, allowed_CN: torch.Tensor) -> torch.Tensor:
    """-inf for tokens that could not be sampled; rows without candidates stay as they are."""
    # One more column takes what fills up.
    V = scaled_CV.shape[1]
    places_CN = torch.where(allowed_CN >= 0, allowed_CN.long(), V)
    kept_CV = torch.zeros(len(scaled_CV), V + 1, dtype=torch.bool, device=scaled_CV.device)
    kept_CV = kept_CV.scatter_(1, places_CN, True)[:, :V]
    kept_CV |= (allowed_CN < 0).all(dim=1, keepdim=True)
    return scaled_CV.masked_fill(~kept_CV, -torch.inf)


def _shift_right(chunks: Iterable[torch.Tensor], R: int, W: int) -> torch.Tensor:
    """[N] in pieces, indexed by the predicting position -> [R, W] indexed by the predicted one, column 0 zero."""
    values_RW = torch.cat(tuple(chunks)).view(R, W)
    return torch.nn.functional.pad(values_RW[:, :-1], (1, 0))


def kl_estimate(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    kind: KlEstimator = "k3",
    old_logprobs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate of KL(policy || reference) from one sample per token, nats, same shape as the inputs.

    With d = logprobs - ref_logprobs, sampled from the policy (Schulman, "Approximating KL divergence", 2020):
        k1 = d               unbiased, noisy, may be negative; its own gradient is zero on average: for monitoring
        k2 = d^2 / 2         biased, never negative; its gradient is that of KL(policy || reference)
        k3 = e^-d + d - 1    unbiased, never negative (DeepSeekMath, equation 4); its gradient is that of
                             KL(reference || policy)
    and, for samples of the old policy,
        unbiased = k3 e^(logprobs - old_logprobs)    value and gradient are those of KL(policy || reference) (DeepSeek-V3.2,
                             section 3.1)

    Entries that carry no token must be equal in all inputs (0 is what packing writes): e^-d overflows float32 where a
    masked logprob lies below -88 and its reference is 0, and infinity times a mask of 0 is NaN.

    Raises:
        ValueError: unknown kind, or "unbiased" without the old logprobs.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.exp(-difference) + difference - 1.0
    if kind == "unbiased":
        if old_logprobs is None:
            raise ValueError("kl estimator 'unbiased' needs old_logprobs: the policy that sampled")
        return torch.exp(logprobs - old_logprobs) * (torch.exp(-difference) + difference - 1.0)
    raise ValueError(f"kl estimator {kind!r} is unknown; choose k1, k2, k3 or unbiased")


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


def value_loss(
    values_RW: torch.Tensor, old_values_RW: torch.Tensor, returns_RW: torch.Tensor, mask_RW: torch.Tensor, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the squared error of the critic, no better than if it had moved by at most `clip` (OpenAI's PPO2; InstructGPT).

    Args:
        values_RW: float32 with gradient.
        old_values_RW: float32, before the first minibatch of the batch.
        returns_RW: float32, see `posttrain.advantages.generalized`.
        mask_RW: bool, the trained tokens.
        clip: above 0; infinity leaves the plain squared error.

    Returns:
        The loss summed over the trained tokens, and detached sums.
    """
    near_RW = torch.clamp(values_RW, old_values_RW - clip, old_values_RW + clip)
    plain_RW, near_error_RW = (values_RW - returns_RW).square(), (near_RW - returns_RW).square()
    loss_sum = 0.5 * torch.where(mask_RW, torch.maximum(plain_RW, near_error_RW), 0.0).sum()
    with torch.no_grad():
        metrics = {
            "value_loss": loss_sum.detach(),
            "clip_fraction": ((near_error_RW > plain_RW) & mask_RW).sum().float(),
            "value_mean": torch.where(mask_RW, values_RW, 0.0).sum(),
        }
    return loss_sum, metrics


def nll(logprobs_RW: torch.Tensor, loss_mask_RW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood summed over the trained tokens, nats; the metric `nll` is the same sum, detached."""
    loss_sum = -torch.where(loss_mask_RW, logprobs_RW, 0.0).sum()
    return loss_sum, {"nll": loss_sum.detach()}
