"""Is what the sampler sampled what the learner trains? Token by token, and expert by expert.

Two engines that hold the same weights still add in another order, so logprobs differ in the last digits, and where two
experts score almost the same they may choose differently. A choice within `near_tie_margin` of a tie is a flip: both
are right, but the tokens from there on were computed by other experts, so they are counted and left out of the maximum.
A difference in routing that no near-tie explains is a disagreement and stays in.

Tokens of an earlier version of the policy are no matter of parity. They count in `Mismatch`, which says how far all tokens are
from the policy that trains on them, and why: another version, other experts, or rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from posttrain.errors import ParityError
from posttrain.metrics import Metric
from posttrain.recipe import ParitySection
from posttrain.types import Sample

_LARGEST_LOG_RATIO = 60.0


@dataclass(frozen=True, slots=True)
class Flip:
    """A token that the sampler sent to other experts than the learner."""

    position: int  # in the sample's tokens (prompt + completion)
    layer: int  # index among the MoE layers
    margin: float  # how far from a tie the learner's scores were; near 0 both choices are right


CAUSES = ("precision", "routing", "staleness")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far the policy that sampled is from the learner's, in sums over all tokens.

    The ratio of a token is learner / sampler. Tokens are apart by staleness if an earlier version sampled them, else by
    routing from the first token on that went to other experts, else by precision.
    """

    tokens: int = 0
    kl_sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # k3 of KL(sampler || learner), nats, of each of CAUSES
    ratio_sum: float = 0.0
    ratio_square_sum: float = 0.0
    ratio_max: float = 0.0
    flips: tuple[int, ...] = ()  # by MoE layer: tokens that the learner's own router would send elsewhere
    decisions: int = 0  # tokens whose experts were compared

    @property
    def kl(self) -> float:
        """Nats per token."""
        return sum(self.kl_sums) / max(1, self.tokens)

    @property
    def effective_sample_size(self) -> float:
        """(sum of ratios)^2 / (tokens x sum of squares), 0 to 1: the share of the tokens that their weights leave."""
        if not self.tokens:
            return 1.0
        return self.ratio_sum**2 / max(self.tokens * self.ratio_square_sum, 1e-300)

    def metrics(self) -> dict[str, Metric]:
        values = {
            f"mismatch/kl_{cause}": total / max(1, self.tokens)
            for cause, total in zip(CAUSES, self.kl_sums, strict=True)
        }
        found = {name: Metric(value, "mean") for name, value in values.items()}
        found["mismatch/kl"] = Metric(self.kl, "mean")
        found["mismatch/ratio_max"] = Metric(self.ratio_max, "max")
        found["mismatch/effective_sample_size"] = Metric(self.effective_sample_size, "mean")
        for layer, flips in enumerate(self.flips):
            found[f"router/layer_{layer:02d}/flip_rate"] = Metric(flips / max(1, self.decisions), "mean")
        return found

    def __add__(self, other: Mismatch) -> Mismatch:
        precision, routing, staleness = (a + b for a, b in zip(self.kl_sums, other.kl_sums, strict=True))
        layers = zip_longest(self.flips, other.flips, fillvalue=0)
        return Mismatch(
            tokens=self.tokens + other.tokens,
            kl_sums=(precision, routing, staleness),
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_square_sum=self.ratio_square_sum + other.ratio_square_sum,
            ratio_max=max(self.ratio_max, other.ratio_max),
            flips=tuple(a + b for a, b in layers),
            decisions=self.decisions + other.decisions,
        )


def mismatch(sample: Sample, learner_logprobs: Sequence[float], own_flips: Sequence[Flip], num_layers: int) -> Mismatch:
    """How far one sample's tokens are from the learner's policy.

    Args:
        sample: holds the sampler's logprobs, and how many of its tokens are an earlier version's.
        learner_logprobs: [T_completion], of the same tokens; with routing replay, of the replayed experts.
        own_flips: where the learner's own routers would choose other experts, in order of position.
        num_layers: MoE layers; 0 without recorded experts.
    """
    start = len(sample.prompt_ids)
    first_flip = own_flips[0].position if own_flips else math.inf
    sums, ratios = [0.0, 0.0, 0.0], []
    for offset, (theirs, ours) in enumerate(zip(sample.sampler_logprobs, learner_logprobs, strict=True)):
        if not sample.is_trained(offset):
            continue
        cause = 2 if offset < sample.stale_tokens else 1 if first_flip < start + offset else 0
        log_ratio = max(-_LARGEST_LOG_RATIO, min(_LARGEST_LOG_RATIO, ours - theirs))
        ratio = math.exp(log_ratio)
        sums[cause] += ratio - log_ratio - 1.0
        ratios.append(ratio)
    experts, flips = sample.experts_TLK, [0] * num_layers
    for flip in own_flips:
        flips[flip.layer] += 1
    return Mismatch(
        tokens=len(ratios),
        kl_sums=(sums[0], sums[1], sums[2]),
        ratio_sum=math.fsum(ratios),
        ratio_square_sum=math.fsum(ratio * ratio for ratio in ratios),
        ratio_max=max(ratios, default=0.0),
        flips=tuple(flips),
        decisions=0 if experts is None else len(experts),
    )


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


Agreement = tuple[ParityReport, Mismatch]  # of the same tokens


def compare(
    sample: Sample, learner_logprobs: Sequence[float], flips: Sequence[Flip], *, near_tie_margin: float, name: str
) -> ParityReport:
    """Compare one sample's tokens.

    Args:
        sample: holds the sampler's logprobs and experts. Its stale tokens are left out, and those that nobody sampled.
        learner_logprobs: [T_completion], of the same tokens under the same temperature.
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
    is_stale = sample.stale_tokens >= len(sample.completion_ids)
    for offset, (theirs, ours) in enumerate(zip(sample.sampler_logprobs, learner_logprobs, strict=True)):
        if offset < sample.stale_tokens or not sample.is_trained(offset):
            continue
        # The token at `start + offset` is predicted from the positions before it.
        if first_flip is not None and first_flip < start + offset:
            excluded += 1
            continue
        gap = abs(theirs - ours)
        tokens += 1
        gap_sum += gap
        relative_max = _max(relative_max, gap / max(1.0, abs(ours)))
        log_ratio = ours - theirs
        kl_sum += math.exp(min(log_ratio, _LARGEST_LOG_RATIO)) - log_ratio - 1.0
        if gap > gap_max or (math.isnan(gap) and not math.isnan(gap_max)):  # a NaN must not be overlooked
            gap_max, worst = gap, f"{name}, token {start + offset}: sampler {theirs:.6f}, learner {ours:.6f}"
    experts = sample.experts_TLK
    return ParityReport(
        tokens=tokens,
        gap_sum=gap_sum,
        gap_max=gap_max,
        relative_gap_max=relative_max,
        kl_sum=kl_sum,
        decisions=0 if experts is None or is_stale else experts.shape[0] * experts.shape[1],
        disagreements=0 if is_stale else len(flips),
        flipped_tokens=0 if is_stale else len(flipped),
        excluded_tokens=excluded,
        worst=worst,
        hard_flip="" if is_stale else hard_flip,
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
