"""Rewards of length in tokens: DAPO's soft punishment of overlong completions, and the cosine reward.

Both are to be added to a reward of being right; `overlong` alone rewards nothing, it only punishes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

from posttrain.types import RewardResult


def overlong(
    completion: str,
    answer: str | None,
    completion_length: int,
    max_length: int,
    cache_length: int,
    **metadata: Any,
) -> float:
    """0 up to `max_length - cache_length` tokens, then falling linearly to -1 at `max_length`, and -1 beyond.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13). The paper generates up to 20,480 tokens, of which
    the last 4,096 are the cache. Both must be given: with a length that no completion reaches, nothing would be punished.

    Args:
        completion: not used.
        answer: not used.
        completion_length: tokens of the completion, from the metadata.
        max_length: tokens (L_max), at most the recipe's `max_completion_length`, or no completion reaches it.
        cache_length: tokens (L_cache) before `max_length` where the punishment sets in; 0 leaves only the step to -1.
        metadata: not used.

    Raises:
        ValueError: `max_length` below 1, or `cache_length` outside 0..max_length.
    """
    _check_length(max_length)
    if not 0 <= cache_length <= max_length:
        raise ValueError(f"cache_length must be between 0 and max_length ({max_length}), got {cache_length}")
    if completion_length > max_length:
        return -1.0
    return min(0.0, (max_length - cache_length - completion_length) / max(1, cache_length))


def cosine(
    completion: str,
    answer: str | None,
    completion_length: int,
    max_length: int,
    judge: str = "rewards.math_answer:score",
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    exceeded: float | None = None,
    **metadata: Any,
) -> RewardResult:
    """A reward of being right that prefers short right answers and long wrong ones, along half a cosine wave.

    From "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), with the defaults of TRL's
    `get_cosine_scaled_reward`. The paper also punishes completions that reach the limit: that is `exceeded`.

    Args:
        completion: the model's text.
        answer: the reference, for the judge.
        completion_length: tokens of the completion, from the metadata.
        max_length: tokens (L_max in the paper).
        judge: the reward that says whether the completion is right, `module:function`, called as
            `function(completion, answer, **metadata)`; 1 is right, anything else wrong.
        right_short: reward of a right completion of no tokens (r_0^c).
        right_long: reward of a right completion at `max_length` (r_L^c).
        wrong_short: reward of a wrong completion of no tokens (r_0^w).
        wrong_long: reward of a wrong completion at `max_length` (r_L^w).
        exceeded: reward at `max_length` and beyond, right or wrong (r_e); None for `right_long` and `wrong_long`.
        metadata: passed on to the judge.

    Raises:
        ValueError: `max_length` below 1, a judge that does not resolve; and what the judge raises.
    """
    _check_length(max_length)
    if exceeded is not None and completion_length >= max_length:
        return RewardResult(exceeded, detail=f"{completion_length} tokens")
    verdict = _judge(judge)(completion, answer, completion_length=completion_length, **metadata)
    result = verdict if isinstance(verdict, RewardResult) else RewardResult(float(verdict))
    if result.status == "infrastructure":
        return result
    short, long = (right_short, right_long) if result.score == 1.0 else (wrong_short, wrong_long)
    progress = min(1.0, completion_length / max_length)
    wave = (1 + math.cos(math.pi * progress)) / 2  # 1 at no tokens, 0 at max_length
    return RewardResult(long + (short - long) * wave, result.status, result.detail)


def _check_length(max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be 1 token or more, got {max_length}")


@cache
def _judge(spec: str) -> Callable[..., Any]:
    module, _, name = spec.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"judge {spec!r} does not resolve ({error}); name one like rewards.math_answer:score"
        ) from error
    return function
