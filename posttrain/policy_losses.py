"""Policy losses: what each algorithm does with the ratio of new to old policy, token by token. Pure functions.

Each takes `PolicyTokens` and returns (loss_RW, metrics): the loss of every token, 0 where none is trained, and detached sums
over the trained tokens. How tokens are weighted into one number is not decided here (see `losses.sequence_mean_weights`).

A recipe may name a loss of its own, `module:function`, with the same signature; `python -m posttrain.conformance` checks it.

Shapes: R rows of a packed microbatch, W tokens of a row. Entry [r, w] speaks of predicting token w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a policy loss is made of. Entries outside `mask_RW` are 0, but those of `logprobs_RW` are arbitrary.

    Attributes:
        logprobs_RW: float32 with gradient, under the policy that is trained.
        old_logprobs_RW: float32, under the policy before the first minibatch.
        advantages_RW: float32.
        mask_RW: bool, the trained tokens.
        sample_ids_RW: int64, -1 for padding; a sample lies whole in this microbatch.
    """

    logprobs_RW: torch.Tensor
    old_logprobs_RW: torch.Tensor
    advantages_RW: torch.Tensor
    mask_RW: torch.Tensor
    sample_ids_RW: torch.Tensor

    @property
    def log_ratio_RW(self) -> torch.Tensor:
        """log(policy / old policy); 0 where nothing is trained."""
        # Masked before exp: an untrained token's logprob is arbitrary, and infinity times a mask of 0 would be NaN.
        return torch.where(self.mask_RW, self.logprobs_RW - self.old_logprobs_RW, 0.0)


PolicyLoss = Callable[..., tuple[torch.Tensor, Metrics]]


def clipped(tokens: PolicyTokens, *, epsilon_low: float, epsilon_high: float) -> tuple[torch.Tensor, Metrics]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), as GRPO uses it (DeepSeekMath, equation 3).

    -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A); DAPO (arXiv 2503.14476) lets epsilon_high be larger.
    """
    return _clip(tokens, tokens.log_ratio_RW, epsilon_low, epsilon_high)


def sequence_clipped(tokens: PolicyTokens, *, epsilon_low: float, epsilon_high: float) -> tuple[torch.Tensor, Metrics]:
    """GSPO's surrogate (arXiv 2507.18071, equations 5 to 7): one ratio per sample, exp of the mean log-ratio of its tokens.

    Every token of a sample gets the sample's loss. Epsilons are two orders smaller than with ratios of tokens (3e-4, 4e-4).
    """
    return _clip(tokens, sample_means(tokens.log_ratio_RW, tokens), epsilon_low, epsilon_high)


def _clip(
    tokens: PolicyTokens, log_ratio_RW: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, Metrics]:
    ratio_RW = log_ratio_RW.exp()
    advantages_RW, mask_RW = tokens.advantages_RW, tokens.mask_RW
    bounded_RW = ratio_RW.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    loss_RW = -torch.minimum(ratio_RW * advantages_RW, bounded_RW * advantages_RW) * mask_RW
    with torch.no_grad():
        too_high_RW = (ratio_RW > 1.0 + epsilon_high) & (advantages_RW > 0)
        too_low_RW = (ratio_RW < 1.0 - epsilon_low) & (advantages_RW < 0)
        metrics = {
            "clip_fraction": ((too_high_RW | too_low_RW) & mask_RW).sum().float(),
            "ratio_mean": (ratio_RW * mask_RW).sum(),
        }
    return loss_RW, metrics


def cispo(tokens: PolicyTokens, *, epsilon_low: float, epsilon_high: float) -> tuple[torch.Tensor, Metrics]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): -clip(ratio) A log(policy), the clipped ratio held fixed.

    No token loses its gradient; a ratio beyond the bounds weighs as much as one at them.
    """
    ratio_RW = tokens.log_ratio_RW.exp().detach()
    weight_RW = ratio_RW.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    logprobs_RW = torch.where(tokens.mask_RW, tokens.logprobs_RW, 0.0)
    loss_RW = -weight_RW * tokens.advantages_RW * logprobs_RW
    metrics = {
        "clip_fraction": ((weight_RW != ratio_RW) & tokens.mask_RW).sum().float(),
        "ratio_mean": (ratio_RW * tokens.mask_RW).sum(),
    }
    return loss_RW, metrics


def reinforce(tokens: PolicyTokens, *, epsilon_low: float, epsilon_high: float) -> tuple[torch.Tensor, Metrics]:
    """REINFORCE: -A log(policy) (Williams, 1992). Right for samples of the policy itself; it has no ratio to clip."""
    logprobs_RW = torch.where(tokens.mask_RW, tokens.logprobs_RW, 0.0)
    ratio_RW = tokens.log_ratio_RW.exp().detach()
    metrics = {"clip_fraction": torch.zeros(()), "ratio_mean": (ratio_RW * tokens.mask_RW).sum()}
    return -tokens.advantages_RW * logprobs_RW, metrics


LOSSES: Mapping[str, PolicyLoss] = {
    "clip": clipped,
    "sequence_clip": sequence_clipped,
    "cispo": cispo,
    "reinforce": reinforce,
}


def sample_means(values_RW: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """Each trained token's entry becomes the mean over the trained tokens of its sample; 0 elsewhere. Keeps gradients."""
    places = (tokens.sample_ids_RW + 1)[tokens.mask_RW]  # index 0 would be padding's
    size = int(tokens.sample_ids_RW.max()) + 2
    sums = torch.zeros(size, dtype=values_RW.dtype, device=values_RW.device)
    sums = sums.index_add(0, places, values_RW[tokens.mask_RW])
    counts = torch.bincount(places, minlength=size).clamp(min=1)
    return torch.where(tokens.mask_RW, (sums / counts)[tokens.sample_ids_RW + 1], 0.0)


# --- samples of another policy ----------------------------------------------------------------------------------------


def truncated_importance(
    old_logprobs_RW: torch.Tensor, sampler_logprobs_RW: torch.Tensor, mask_RW: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, Metrics]:
    """TIS (Yao et al., 2025): a factor min(old policy / sampler, cap) for each token; float32 [R, W], no gradient.

    The learner's old policy and the sampler's differ by precision, staleness or routing although their weights are the same.
    """
    ratio_RW = _sampler_ratio(old_logprobs_RW, sampler_logprobs_RW, mask_RW)
    return ratio_RW.clamp(max=cap) * mask_RW, {"truncated_fraction": ((ratio_RW > cap) & mask_RW).sum().float()}


def masked_importance(
    old_logprobs_RW: torch.Tensor, sampler_logprobs_RW: torch.Tensor, mask_RW: torch.Tensor, *, low: float, high: float
) -> tuple[torch.Tensor, Metrics]:
    """IcePop (Ling team, 2025): the factor old policy / sampler where it lies in [low, high], else 0: no training there."""
    ratio_RW = _sampler_ratio(old_logprobs_RW, sampler_logprobs_RW, mask_RW)
    kept_RW = (ratio_RW >= low) & (ratio_RW <= high) & mask_RW
    return torch.where(kept_RW, ratio_RW, 0.0), {"masked_fraction": (~kept_RW & mask_RW).sum().float()}


def off_policy_mask(
    tokens: PolicyTokens, sampler_logprobs_RW: torch.Tensor, *, threshold: float
) -> tuple[torch.Tensor, Metrics]:
    """DeepSeek-V3.2's off-policy sequence masking: 0 for samples with a negative advantage that the policy has left behind.

    A sample is masked when A < 0 and the mean over its tokens of log(sampler / policy) exceeds the threshold (V3.2 report,
    section 3.1). float32 [R, W], no gradient.
    """
    with torch.no_grad():
        distance_RW = sample_means(torch.where(tokens.mask_RW, sampler_logprobs_RW - tokens.logprobs_RW, 0.0), tokens)
        dropped_RW = (tokens.advantages_RW < 0) & (distance_RW > threshold) & tokens.mask_RW
        return (tokens.mask_RW & ~dropped_RW).float(), {"off_policy_masked_fraction": dropped_RW.sum().float()}


def _sampler_ratio(old_RW: torch.Tensor, sampler_RW: torch.Tensor, mask_RW: torch.Tensor) -> torch.Tensor:
    return torch.where(mask_RW, old_RW - sampler_RW, 0.0).exp().detach()
