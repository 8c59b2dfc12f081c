"""From a reward's section of a recipe to the function and its limits."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.recipe import RewardSection
from rewards import RewardFunction
from rewards.forms import Form
from rewards.warden import Limits

TIMEOUTS: dict[Form, float] = {"single": 10.0, "async": 120.0, "batch": 300.0, "group": 300.0}  # seconds


def build_reward(section: RewardSection) -> RewardFunction:
    """Resolve the function.

    Raises:
        ValueError: it does not resolve, or does not take the options given.
    """
    return RewardFunction(
        section.label, section.func, section.weight, dict(section.kwargs), section.clip, dict(section.requires)
    )


def build_rewards(sections: Sequence[RewardSection]) -> tuple[RewardFunction, ...]:
    """`build_reward` of each. Raises what it raises."""
    return tuple(build_reward(section) for section in sections)


def build_limits(section: RewardSection, form: Form) -> Limits:
    """What the function may do."""
    # CUDA reserves far more addresses than memory, and addresses are what the limit is on.
    is_unbounded = bool(section.num_gpus) and "max_memory_gib" not in section.model_fields_set
    # Each process would have to hold the model once more.
    is_single = bool(section.num_gpus) and "max_workers" not in section.model_fields_set
    return Limits(
        timeout_seconds=section.timeout_seconds or TIMEOUTS[form],
        max_memory_gib=None if is_unbounded else section.max_memory_gib,
        max_processes=section.max_processes,
        max_workers=1 if is_single else section.max_workers,
        max_concurrency=section.max_concurrency,
        batch_size=section.batch_size,
        retries=section.retries,
        on_timeout=section.on_timeout,
        on_crash=section.on_crash,
    )
