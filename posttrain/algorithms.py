"""Presets: the recipe keys of published algorithms, under the names the field uses. `algorithm: dapo` expands to them.

Plain data and no imports of ours: recipes are read before anything heavy is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POLICY_LOSSES = ("clip", "sequence_clip", "cispo", "reinforce")  # see posttrain/policy_losses.py

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300), equations 3 and 4: mean of per-answer means, deviation of the group, KL in the loss.
    "grpo": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "group_mean",
        "scale_rewards": "group",
        "loss_aggregation": "sequence",
        "beta": 0.04,
        "kl_estimator": "k3",
        "kl_in": "loss",
    },
    # DeepSeek-R1 (arXiv 2501.12948; Nature 645): epsilon 10, KL 0.001, the reference renewed every 400 steps.
    "r1": {
        "policy_loss": "clip",
        "epsilon": 10.0,
        "baseline": "group_mean",
        "scale_rewards": "group",
        "loss_aggregation": "sequence",
        "beta": 0.001,
        "kl_estimator": "k3",
        "kl_in": "loss",
        "reference_refresh_steps": 400,
    },
    # Understanding R1-Zero-like training (arXiv 2503.20783): neither length nor deviation in the denominator.
    "dr_grpo": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "group_mean",
        "scale_rewards": "none",
        "loss_aggregation": "fixed",
        "beta": 0.0,
    },
    # DAPO (arXiv 2503.14476): higher upper clip, mean over tokens, no KL, groups without signal drawn again.
    "dapo": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "baseline": "group_mean",
        "scale_rewards": "group",
        "loss_aggregation": "token",
        "beta": 0.0,
        "drop_zero_signal_groups": True,
        "dynamic_sampling_batches": 3,
    },
    # Back to basics (arXiv 2402.14740): the others' mean as baseline, REINFORCE, KL in the reward.
    "rloo": {
        "policy_loss": "reinforce",
        "baseline": "leave_one_out",
        "scale_rewards": "none",
        "loss_aggregation": "fixed",
        "beta": 0.05,
        "kl_estimator": "k1",
        "kl_in": "reward",
        "num_minibatches": 1,
    },
    # REINFORCE++ (arXiv 2501.03262): no groups, KL of the tokens in the reward, advantages whitened over the batch.
    "reinforce_plus_plus": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "none",
        "scale_rewards": "none",
        "whiten_advantages": True,
        "loss_aggregation": "token",
        "beta": 0.01,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    # PPO with a learned critic (arXiv 1707.06347; InstructGPT, arXiv 2203.02155, for the KL in the reward).
    "ppo": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "critic",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "scale_rewards": "none",
        "whiten_advantages": True,
        "loss_aggregation": "token",
        "beta": 0.01,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    # Reverse KL to a teacher on the policy's own samples (arXiv 2306.13649, 2505.09388): tokens one by one, discount 0.
    # Rewards count as much as their weights say, which may be 0.
    "on_policy_distillation": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "group_mean",
        "scale_rewards": "none",
        "loss_aggregation": "token",
        "beta": 0.0,
        "distill_coef": 1.0,
    },
    # GSPO (arXiv 2507.18071): one ratio for a sample.
    "gspo": {
        "policy_loss": "sequence_clip",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "baseline": "group_mean",
        "scale_rewards": "group",
        "loss_aggregation": "sequence",
        "beta": 0.0,
    },
    # MiniMax-M1 (arXiv 2506.13585): the clipped ratio as a weight; only its upper bound is used.
    "cispo": {
        "policy_loss": "cispo",
        "epsilon": 1.0,
        "epsilon_high": 2.0,
        "baseline": "group_mean",
        "scale_rewards": "group",
        "loss_aggregation": "token",
        "beta": 0.0,
    },
    # DeepSeek-V3.2: no deviation, unbiased KL, samples left behind are masked.
    "deepseek_v3_2": {
        "policy_loss": "clip",
        "epsilon": 0.2,
        "baseline": "group_mean",
        "scale_rewards": "none",
        "loss_aggregation": "sequence",
        "beta": 0.001,
        "kl_estimator": "unbiased",
        "kl_in": "loss",
        "off_policy_threshold": 0.1,
    },
}


def expand(section: object) -> object:
    """An `algorithm` section with its preset's keys written out; keys that are given win.

    Args:
        section: a preset's name, or a mapping that may have the key `preset`. Anything else is returned as it is.

    Raises:
        ValueError: no such preset.
    """
    given = {"preset": section} if isinstance(section, str) else section
    if not isinstance(given, Mapping) or given.get("preset") is None:
        return given
    name = given["preset"]
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}, or leave it out")
    return {**PRESETS[name], **given}
