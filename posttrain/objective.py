"""What a GRPO recipe's `algorithm` section makes of a microbatch: one loss, summed, and what is logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

import torch

from posttrain import losses, policy_losses
from posttrain.policy_losses import PolicyLoss, PolicyTokens
from posttrain.recipe import AlgorithmSection
from posttrain.types import Microbatch, TrainBatch


def objective(
    logprobs_RW: torch.Tensor, entropy_RW: torch.Tensor, microbatch: Microbatch, algorithm: AlgorithmSection
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss, weighted for samples of another policy, plus KL to the reference, less entropy.

    Args:
        logprobs_RW: float32 with gradient, of the tokens under the policy.
        entropy_RW: float32; with gradient if `algorithm.entropy_coef` is above 0.
        microbatch: packed samples.
        algorithm: of the recipe.

    Returns:
        loss_sum: scalar, to be divided by `denominator`.
        sums: detached sums over the trained tokens, to be divided by their number, under the names they are logged by.
    """
    mask_RW = microbatch.loss_mask_RW
    old_RW = microbatch.sampler_logprobs_RW if algorithm.old_policy == "sampler" else microbatch.old_logprobs_RW
    tokens = PolicyTokens(logprobs_RW, old_RW, microbatch.advantages_RW, mask_RW, microbatch.sample_ids_RW)
    loss_RW, metrics = find_loss(algorithm.policy_loss)(
        tokens, epsilon_low=algorithm.epsilon, epsilon_high=algorithm.clip_high
    )
    weights_RW, corrections = _corrections(tokens, microbatch, algorithm)
    loss_RW = loss_RW * weights_RW
    metrics |= corrections
    trained_RW = torch.where(mask_RW, logprobs_RW, 0.0)
    with torch.no_grad():
        metrics["kl_old"] = losses.kl_estimate(old_RW, trained_RW, "k3").sum()
    if algorithm.beta:
        kl_RW = losses.kl_estimate(trained_RW, microbatch.ref_logprobs_RW, algorithm.kl_estimator, old_RW)
        metrics["kl_ref"] = kl_RW.detach().sum()
        if algorithm.kl_in == "loss":
            loss_RW = loss_RW + algorithm.beta * kl_RW
    if algorithm.entropy_coef:
        loss_RW = loss_RW - algorithm.entropy_coef * entropy_RW * mask_RW
    if algorithm.loss_aggregation == "sequence":
        loss_RW = loss_RW * losses.sequence_mean_weights(microbatch.sample_ids_RW, mask_RW)
    metrics["entropy"] = (entropy_RW.detach() * mask_RW).sum()
    return loss_RW.sum(), {f"policy/{name}": value for name, value in metrics.items()}


def denominator(batch: TrainBatch, algorithm: AlgorithmSection, max_completion_length: int) -> float:
    """What the loss of a whole minibatch is divided by.

    "token": its trained tokens. "sequence": its samples (the loss then is a sum of per-sample means). "fixed": its samples
    times the longest completion there can be, which no sample changes (Dr. GRPO).
    """
    if algorithm.loss_aggregation == "token":
        return batch.num_loss_tokens
    return batch.num_samples * (max_completion_length if algorithm.loss_aggregation == "fixed" else 1)


@cache
def find_loss(name: str) -> PolicyLoss:
    """A policy loss by its name in a recipe, or `module:function`.

    Raises:
        ValueError: nothing of that name.
    """
    if name in policy_losses.LOSSES:
        return policy_losses.LOSSES[name]
    module, _, function = name.partition(":")
    try:
        found: PolicyLoss = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy_loss {name!r}: {error}; give module:function") from error
    return found


def _corrections(
    tokens: PolicyTokens, microbatch: Microbatch, algorithm: AlgorithmSection
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The weight of each token for not having been sampled by the policy that is trained; 1 without corrections."""
    weights_RW = tokens.mask_RW.float()
    metrics: dict[str, torch.Tensor] = {}
    arguments = (tokens.old_logprobs_RW, microbatch.sampler_logprobs_RW, tokens.mask_RW)
    if algorithm.importance == "truncate":
        weights_RW, found = policy_losses.truncated_importance(*arguments, cap=algorithm.importance_cap)
        metrics |= found
    elif algorithm.importance == "mask":
        low, high = algorithm.importance_floor, algorithm.importance_cap
        weights_RW, found = policy_losses.masked_importance(*arguments, low=low, high=high)
        metrics |= found
    if algorithm.off_policy_threshold is not None:
        kept_RW, found = policy_losses.off_policy_mask(
            tokens, microbatch.sampler_logprobs_RW, threshold=algorithm.off_policy_threshold
        )
        weights_RW = weights_RW * kept_RW
        metrics |= found
    return weights_RW, metrics
