"""Is what the sampler sampled what the learner trains? Token by token, and expert by expert.

Two engines that hold the same weights still add in another order, so logprobs differ in the last digits, and where two
experts score almost the same they may choose differently. A choice within `near_tie_margin` of a tie is a flip: both
are right, but the tokens from there on were computed by other experts, so they are counted and left out of the maximum.
A difference in routing that no near-tie explains is a disagreement and stays in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import ParityError
from posttrain.metrics import Metric
from posttrain.recipe import ParitySection
from posttrain.types import Sample


@dataclass(frozen=True, slots=True)
class Flip:
    """A token that the sampler sent to other experts than the learner."""

    position: int  # in the sample's tokens (prompt + completion)
    layer: int  # index among the MoE layers
    margin: float  # how far from a tie the learner's scores were; near 0 both choices are right


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Sums over the tokens compared, so that reports of ranks and batches add up."""

    tokens: int = 0  # compared
    gap_sum: float = 0.0  # nats
    gap_max: float = 0.0  # nats, over the compared tokens
    relative_gap_max: float = 0.0  # the same with each gap divided by max(1, |logprob|)
    kl_sum: float = 0.0  # k3 estimate of KL(sampler || learner) per token, nats
    decisions: int = 0  # (token, MoE layer) pairs
    disagreements: int = 0  # of them, with another set of experts, near-ties included
    flipped_tokens: int = 0  # tokens where a near-tie went the other way
    excluded_tokens: int = 0  # tokens from the first near-tie of their sample on
    worst: str = ""  # where gap_max is, in words
    hard_flip: str = ""  # the first disagreement that no near-tie explains, in words

    @property
    def gap_mean(self) -> float:
        return self.gap_sum / max(1, self.tokens)

    @property
    def kl(self) -> float:
        return self.kl_sum / max(1, self.tokens)

    @property
    def routing_agreement(self) -> float:
        """Share of (token, MoE layer) pairs with the same set of experts; 1 for a dense model."""
        return 1.0 - self.disagreements / self.decisions if self.decisions else 1.0

    def metrics(self) -> dict[str, Metric]:
        return {
            "parity/logprob_abs_max": Metric(self.gap_max, "max"),
            "parity/logprob_abs_mean": Metric(self.gap_mean, "mean"),
            "parity/kl_sampler_learner": Metric(self.kl, "mean"),
            "parity/routing_agreement": Metric(self.routing_agreement, "mean"),
            "parity/flipped_tokens": Metric(self.flipped_tokens, "sum"),
            "parity/excluded_tokens": Metric(self.excluded_tokens, "sum"),
        }

    def __add__(self, other: ParityReport) -> ParityReport:
        return ParityReport(
            tokens=self.tokens + other.tokens,
            gap_sum=self.gap_sum + other.gap_sum,
            gap_max=_max(self.gap_max, other.gap_max),
            relative_gap_max=_max(self.relative_gap_max, other.relative_gap_max),
            kl_sum=self.kl_sum + other.kl_sum,
            decisions=self.decisions + other.decisions,
            disagreements=self.disagreements + other.disagreements,
            flipped_tokens=self.flipped_tokens + other.flipped_tokens,
            excluded_tokens=self.excluded_tokens + other.excluded_tokens,
            worst=self.worst if _max(self.gap_max, other.gap_max) == self.gap_max else other.worst,
            hard_flip=self.hard_flip or other.hard_flip,
        )


def compare(
    sample: Sample, learner_logprobs: Sequence[float], flips: Sequence[Flip], *, near_tie_margin: float, name: str
) -> ParityReport:
    """Compare one sample's tokens.

    Args:
        sample: holds the sampler's logprobs and experts.
        learner_logprobs: [T_completion], of the same tokens under the same temperature; only trained ones are looked at.
        flips: routing differences, in order of position and layer.
        near_tie_margin: largest score difference that counts as a tie.
        name: of the sample, for messages.
    """
    first_flip, hard_flip = None, ""
    for flip in flips:
        if flip.margin <= near_tie_margin:
            first_flip = flip.position
            break
        # Whatever differs after a near-tie follows from it, so only a difference before the first one is a fault.
        hard_flip = (
            hard_flip or f"{name}, token {flip.position}, MoE layer {flip.layer}: scores {flip.margin:.1e} apart"
        )
    flipped = {flip.position for flip in flips if flip.margin <= near_tie_margin}

    start = len(sample.prompt_ids)
    tokens, gap_sum, gap_max, kl_sum, excluded, worst = 0, 0.0, 0.0, 0.0, 0, ""
    relative_max = 0.0
    for offset, (theirs, ours) in enumerate(zip(sample.sampler_logprobs, learner_logprobs, strict=True)):
        if sample.trained is not None and not sample.trained[offset]:
            continue  # the environment's: nobody sampled it
        # The token at `start + offset` is predicted from the positions before it.
        if first_flip is not None and first_flip < start + offset:
            excluded += 1
            continue
        gap = abs(theirs - ours)
        tokens += 1
        gap_sum += gap
        relative_max = _max(relative_max, gap / max(1.0, abs(ours)))
        log_ratio = ours - theirs
        kl_sum += math.exp(min(log_ratio, 60.0)) - log_ratio - 1.0
        if gap > gap_max or (math.isnan(gap) and not math.isnan(gap_max)):  # a NaN must not be overlooked
            gap_max, worst = gap, f"{name}, token {start + offset}: sampler {theirs:.6f}, learner {ours:.6f}"
    experts = sample.experts_TLK
    return ParityReport(
        tokens=tokens,
        gap_sum=gap_sum,
        gap_max=gap_max,
        relative_gap_max=relative_max,
        kl_sum=kl_sum,
        decisions=0 if experts is None else experts.shape[0] * experts.shape[1],
        disagreements=len(flips),
        flipped_tokens=len(flipped),
        excluded_tokens=excluded,
        worst=worst,
        hard_flip=hard_flip,
    )


def require_parity(parity: ParityReport, limits: ParitySection) -> None:
    """Stop the run when sampler and learner are not the same policy.

    Raises:
        ParityError: says by how much, where, and what to look at.
    """
    # Rounding grows with the size of the logits, so a very unlikely token may differ in proportion to its logprob.
    if not parity.relative_gap_max <= limits.max_logprob_gap:
        experts = f"; experts first differ at {parity.hard_flip}" if parity.hard_flip else ""
        raise ParityError(
            f"sampler and learner logprobs differ by {parity.gap_max:.2e} (limit parity.max_logprob_gap="
            f"{limits.max_logprob_gap:.0e}; {parity.worst}){experts}; the samplers do not hold the learner's policy"
        )
    if parity.routing_agreement < limits.min_routing_agreement:
        raise ParityError(
            f"sampler and learner chose the same experts for {parity.routing_agreement:.5f} of the decisions (limit "
            f"parity.min_routing_agreement={limits.min_routing_agreement}); first at {parity.hard_flip or 'near-ties'}"
        )


def _max(a: float, b: float) -> float:
    return a if math.isnan(a) or a >= b else b
