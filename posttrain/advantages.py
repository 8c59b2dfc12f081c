"""Advantages: how much better a completion did than the others of its group. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

_TOLERANCE = 1e-8  # rewards closer than this count as equal


def group_relative(
    rewards: Sequence[float], *, scale: Literal["group", "none"] = "group", epsilon: float = 1e-4
) -> tuple[float, ...]:
    """GRPO's advantage, A_i = (r_i - mean) / (std + epsilon) (DeepSeekMath, section 4.1.2).

    The convention is that of TRL's GRPOTrainer: the sample standard deviation (divided by G - 1) plus 1e-4. A group
    without signal, such as a single completion, gets exactly 0.

    Args:
        rewards: [G], finite.
        scale: "group" divides by the group's deviation; "none" does not (Dr. GRPO, arXiv 2503.20783).
        epsilon: added to the deviation.

    Returns:
        [G], sums to 0 up to rounding.

    Raises:
        ValueError: rewards are empty or not finite, or scale is unknown.
    """
    if scale not in ("group", "none"):
        raise ValueError(f"scale={scale!r} is unknown; choose group or none")
    _require_finite(rewards)
    if not has_signal(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if scale == "none":
        return tuple(centred)
    deviation = math.sqrt(math.fsum(c * c for c in centred) / (len(rewards) - 1))
    return tuple(c / (deviation + epsilon) for c in centred)


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


def leave_one_out(rewards: Sequence[float]) -> tuple[float, ...]:
    """RLOO's advantage: the reward minus the mean reward of the others (arXiv 2402.14740).

    Args:
        rewards: [G], finite, G at least 2.

    Returns:
        [G], sums to 0 up to rounding.

    Raises:
        ValueError: fewer than two rewards, or not finite.
    """
    _require_finite(rewards)
    if len(rewards) < 2:
        raise ValueError(f"leave-one-out needs 2 completions per prompt and got {len(rewards)}; raise num_generations")
    total = math.fsum(rewards)
    return tuple(reward - (total - reward) / (len(rewards) - 1) for reward in rewards)


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
