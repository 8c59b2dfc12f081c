"""Advantages: how much better a completion did than the others of its group. Pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from itertools import compress
from typing import Literal

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["group", "none"]
Advantage = float | tuple[float, ...]  # of a completion, or of each of its tokens

_TOLERANCE = 1e-8  # rewards closer than this count as equal
_EPSILON = 1e-4  # TRL's


def group_relative(
    rewards: Sequence[float], *, baseline: Baseline = "group_mean", scale: Scale = "group", epsilon: float = _EPSILON
) -> tuple[float, ...]:
    """The advantage of each completion within its group.

    With the defaults GRPO's, A_i = (r_i - mean) / (std + epsilon) (DeepSeekMath, section 4.1.2), in the convention of TRL's
    GRPOTrainer: the sample standard deviation (divided by G - 1) plus 1e-4. A group without signal, such as a single
    completion, gets exactly 0, unless it has no baseline.

    Args:
        rewards: [G], finite.
        baseline: what is subtracted: the mean of the group, the mean of the others ("leave_one_out": RLOO, arXiv 2402.14740),
            or nothing ("none").
        scale: "group" divides by the group's deviation; "none" does not (Dr. GRPO, arXiv 2503.20783).
        epsilon: added to the deviation.

    Returns:
        [G]; with a baseline it sums to 0 up to rounding.

    Raises:
        ValueError: rewards are empty or not finite, too few for the baseline, or a word is unknown.
    """
    if scale not in ("group", "none"):
        raise ValueError(f"scale={scale!r} is unknown; choose group or none")
    _require_finite(rewards)
    if baseline == "leave_one_out":
        centred = _leave_one_out(rewards)
    elif baseline == "group_mean":
        mean = math.fsum(rewards) / len(rewards)
        centred = [reward - mean for reward in rewards]
    elif baseline == "none":
        centred = list(rewards)
    else:
        raise ValueError(f"baseline={baseline!r} is unknown; choose group_mean, leave_one_out or none")
    if baseline != "none" and not has_signal(rewards):
        return (0.0,) * len(rewards)
    divisor = 1.0 if scale == "none" else _deviation(rewards) + epsilon
    return tuple(value / divisor for value in centred)


def over_deviation(
    advantages: Sequence[Sequence[float]], rewards: Sequence[float], epsilon: float = _EPSILON
) -> list[tuple[float, ...]]:
    """Advantages of a batch over the deviation of all its rewards (arXiv 2508.08221; TRL's scale_rewards="batch").

    Args:
        advantages: [P][G].
        rewards: all rewards of the batch, finite.
        epsilon: added to the deviation.
    """
    divisor = _deviation(rewards) + epsilon
    return [tuple(value / divisor for value in group) for group in advantages]


def among_judged(
    advantage: Callable[[Sequence[float]], tuple[float, ...]], rewards: Sequence[float], unjudged: Collection[int]
) -> tuple[float, ...]:
    """Advantages within a group of which some completions could not be judged: as if those had not been sampled.

    Args:
        advantage: of a group's rewards.
        rewards: [G]; those at `unjudged` mean nothing.
        unjudged: places, which get 0.

    Returns:
        [G].
    """
    kept = [index for index in range(len(rewards)) if index not in unjudged]
    found = advantage([rewards[index] for index in kept]) if kept else ()
    by_place = dict(zip(kept, found, strict=True))
    return tuple(by_place.get(index, 0.0) for index in range(len(rewards)))


def _leave_one_out(rewards: Sequence[float]) -> list[float]:
    if len(rewards) < 2:
        raise ValueError(f"leave-one-out needs 2 completions per prompt and got {len(rewards)}; raise num_generations")
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def _deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def whiten(
    values: Sequence[Sequence[float]],
    epsilon: float = 1e-8,
    *,
    trained: Sequence[Sequence[bool] | None] | None = None,
) -> list[tuple[float, ...]]:
    """REINFORCE++'s normalisation (arXiv 2501.03262, equation 4): less the mean and over the deviation of all entries.

    Args:
        values: ragged, e.g. the advantages of each token of each sample of a batch.
        epsilon: added to the deviation (of the population).
        trained: for each row which entries count (None: all of them); the others get 0. None: all of all.

    Returns:
        The same shape. A batch whose entries are all equal gets 0.
    """
    if trained is not None:
        kept = [only(row, mask) for row, mask in zip(values, trained, strict=True)]
        return [spread(row, mask) for row, mask in zip(whiten(kept, epsilon), trained, strict=True)]
    flat = [value for row in values for value in row]
    if not flat:
        return [tuple(row) for row in values]
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat))
    if deviation <= _TOLERANCE:
        return [(0.0,) * len(row) for row in values]
    return [tuple((value - mean) / (deviation + epsilon) for value in row) for row in values]


def with_kl_to_go(
    advantage: Advantage, logprobs: Sequence[float], ref_logprobs: Sequence[float], beta: float
) -> tuple[float, ...]:
    """An advantage with the KL penalty as a reward of the tokens, summed from each token to the end (discount 1).

    Each token pays beta (logprob - ref_logprob), and what it leads to is part of its return (InstructGPT, arXiv 2203.02155;
    REINFORCE++).

    Args:
        advantage: of the completion, or [T] of its tokens.
        logprobs: [T], of the sampled tokens under the policy.
        ref_logprobs: [T], under the reference.
        beta: weight.

    Returns:
        [T].
    """
    total, found = 0.0, []
    rows = zip(of_tokens(advantage, len(logprobs)), logprobs, ref_logprobs, strict=True)
    for own, logprob, ref in reversed(list(rows)):
        total -= beta * (logprob - ref)
        found.append(own + total)
    return tuple(reversed(found))


def token_rewards(
    reward: float, logprobs: Sequence[float], ref_logprobs: Sequence[float] | None, beta: float
) -> tuple[float, ...]:
    """The reward of each token: the completion's at its last, less the KL penalty of each (InstructGPT, arXiv 2203.02155).

    Args:
        reward: of the completion.
        logprobs: [T], of the sampled tokens under the policy.
        ref_logprobs: [T], under the reference; None without one.
        beta: weight of logprob - ref_logprob.

    Returns:
        [T].
    """
    penalties = [0.0] * len(logprobs)
    if ref_logprobs is not None:
        penalties = [beta * (logprob - ref) for logprob, ref in zip(logprobs, ref_logprobs, strict=True)]
    last = len(logprobs) - 1
    return tuple((reward if place == last else 0.0) - penalty for place, penalty in enumerate(penalties))


def generalized(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, gae_lambda: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Generalized advantage estimation (arXiv 1506.02438, equations 11 to 16) of one completion.

    Nothing is expected after its last token.

    Args:
        rewards: [T], of each token.
        values: [T], what the critic expects from before each token on.
        gamma: discount, 0 to 1.
        gae_lambda: 1 trusts the rewards that came, 0 the critic.

    Returns:
        advantages: [T].
        returns: [T], what the critic is to learn: advantage plus value.

    Raises:
        ValueError: not one value for each reward.
    """
    if len(rewards) != len(values):
        raise ValueError(f"{len(values)} values for {len(rewards)} rewards; give one each")
    advantages, later, next_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later = reward + gamma * next_value - value + gamma * gae_lambda * later
        next_value = value
        advantages.append(later)
    advantages.reverse()
    return tuple(advantages), tuple(a + v for a, v in zip(advantages, values, strict=True))


def explained_variance(values: Sequence[Sequence[float]], returns: Sequence[Sequence[float]]) -> float:
    """1 - variance of (return - value) / variance of return, over all tokens of all samples; 1 is a perfect critic.

    0 where the returns do not vary: there is nothing to explain.

    Args:
        values, returns: ragged, of the same shape.
    """
    flat = [value for row in values for value in row]
    targets = [value for row in returns for value in row]
    if not targets or statistics.pvariance(targets) <= _TOLERANCE:
        return 0.0
    errors = [target - value for target, value in zip(targets, flat, strict=True)]
    return 1.0 - statistics.pvariance(errors) / statistics.pvariance(targets)


def of_tokens(advantage: Advantage, count: int) -> tuple[float, ...]:
    """[count] An advantage as one number for each token."""
    return advantage if isinstance(advantage, tuple) else (advantage,) * count


def only(values: Sequence[float], trained: Sequence[bool] | None) -> tuple[float, ...]:
    """Of values for each token those of trained tokens; None: all are."""
    return tuple(values) if trained is None else tuple(compress(values, trained))


def spread(values: Sequence[float], trained: Sequence[bool] | None) -> tuple[float, ...]:
    """The inverse of `only`: other tokens get 0."""
    if trained is None:
        return tuple(values)
    left = iter(values)
    return tuple(next(left) if counts else 0.0 for counts in trained)


def is_felt(advantage: Advantage) -> bool:
    """Whether any token has an advantage that is not 0."""
    return any(advantage) if isinstance(advantage, tuple) else bool(advantage)


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ, so that its advantages are not all 0. Fewer than two have no signal.

    Raises:
        ValueError: a reward is not finite.
    """
    if len(rewards) < 2:
        return False
    _require_finite(rewards)
    return max(rewards) - min(rewards) > _TOLERANCE


def _require_finite(rewards: Sequence[float]) -> None:
    if not rewards:
        raise ValueError("a group without rewards has no advantage; give at least one completion")
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {index} of the group is {reward}; a reward function must return a finite number")
