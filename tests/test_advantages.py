"""Advantages: numbers worked by hand, invariances, and TRL's own numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.advantages import (
    among_judged,
    group_relative,
    has_signal,
    is_felt,
    of_tokens,
    over_deviation,
    whiten,
    with_kl_to_go,
)
from posttrain.grpo import with_returns
from posttrain.recipe import AlgorithmSection
from posttrain.types import Sample

leave_one_out = partial(group_relative, baseline="leave_one_out", scale="none")

rewards_lists = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def test_group_relative_by_hand() -> None:
    # mean 1/4; squared deviations 3 x 1/16 + 9/16 = 3/4, over G - 1 = 3: variance 1/4, deviation 1/2.
    assert group_relative([0, 0, 0, 1]) == pytest.approx([-0.25 / 0.5001] * 3 + [0.75 / 0.5001], rel=1e-12)


def test_group_relative_epsilon_and_unscaled_by_hand() -> None:
    # mean 2, deviation sqrt((1 + 1) / 1) = sqrt 2
    assert group_relative([1, 3], epsilon=0.0) == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert group_relative([0, 0, 0, 1], scale="none") == (-0.25, -0.25, -0.25, 0.75)


def test_leave_one_out_by_hand() -> None:
    # the others of 3 are 0 and 1.5, mean 0.75
    assert leave_one_out([0.0, 1.5, 3.0]) == (-2.25, 0.0, 2.25)


@pytest.mark.parametrize("rewards", [[1.0], [0.5, 0.5], [0.1, 0.1, 0.1], [0.3, 0.1 + 0.2]])
def test_equal_rewards_give_exactly_zero(rewards: list[float]) -> None:
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in floating point: without care this leaves tiny advantages.
    assert not has_signal(rewards)
    assert group_relative(rewards) == (0.0,) * len(rewards)
    assert group_relative(rewards, scale="none") == (0.0,) * len(rewards)


def test_small_differences_are_signal() -> None:
    assert has_signal([0.0, 0.0, 1e-6])


@given(rewards_lists)
def test_advantages_sum_to_zero_and_keep_the_order(rewards: list[float]) -> None:
    for advantages in (group_relative(rewards), group_relative(rewards, scale="none"), leave_one_out(rewards)):
        assert sum(advantages) == pytest.approx(0, abs=1e-9 * len(rewards))
        for i, j in zip(range(len(rewards)), range(1, len(rewards)), strict=False):
            assert rewards[i] <= rewards[j] or advantages[i] >= advantages[j]


@given(rewards_lists, st.floats(-5, 5))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards: list[float], shift: float) -> None:
    shifted = [reward + shift for reward in rewards]
    assert group_relative(shifted, scale="none") == pytest.approx(group_relative(rewards, scale="none"), abs=2e-8)
    assert leave_one_out(shifted) == pytest.approx(leave_one_out(rewards), abs=1e-9)


@given(rewards_lists)
def test_leave_one_out_is_the_centred_reward_stretched(rewards: list[float]) -> None:
    G = len(rewards)
    expected = [a * G / (G - 1) for a in group_relative(rewards, scale="none")]
    assert leave_one_out(rewards) == pytest.approx(expected, abs=3e-8)


def test_errors_name_the_fault() -> None:
    with pytest.raises(ValueError, match="reward 1 of the group is nan"):
        group_relative([0.0, math.nan])
    with pytest.raises(ValueError, match="without rewards"):
        group_relative([])
    with pytest.raises(ValueError, match="raise num_generations"):
        leave_one_out([1.0])
    with pytest.raises(ValueError, match="choose group or none"):
        group_relative([0.0, 1.0], scale="batch")  # type: ignore[arg-type]


def test_without_baseline_and_over_the_deviation_of_the_batch_by_hand() -> None:
    assert group_relative([1.0, 1.0], baseline="none", scale="none") == (1.0, 1.0)
    assert group_relative([1.0, 3.0], baseline="none", epsilon=0.0) == pytest.approx(
        [1 / math.sqrt(2), 3 / math.sqrt(2)]
    )
    found = over_deviation([(1.0, -1.0), (0.0,)], [0.0, 2.0, 4.0, 6.0], epsilon=0.0)
    assert found == [pytest.approx((1 / math.sqrt(20 / 3), -1 / math.sqrt(20 / 3))), (0.0,)]
    with pytest.raises(ValueError, match="choose group_mean, leave_one_out or none"):
        group_relative([0.0, 1.0], baseline="mean")  # type: ignore[arg-type]


def test_advantages_of_tokens_by_hand() -> None:
    assert of_tokens(2.0, 3) == (2.0, 2.0, 2.0) and of_tokens((1.0, 2.0), 2) == (1.0, 2.0)
    assert with_kl_to_go(1.0, [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0], 0.1) == pytest.approx((1.05, 1.1, 1.1))
    assert whiten([(1.0, 3.0), (5.0,)], epsilon=0.0) == [
        pytest.approx((-2 / math.sqrt(8 / 3), 0.0)),
        pytest.approx((2 / math.sqrt(8 / 3),)),
    ]
    assert whiten([(1.0, 1.0), (1.0,)]) == [(0.0, 0.0), (0.0,)] and whiten([]) == []
    assert is_felt((0.0, 0.1)) and is_felt(-1.0) and not is_felt(0.0) and not is_felt((0.0, 0.0))


def test_what_could_not_be_judged_changes_nothing_for_the_others() -> None:
    assert among_judged(group_relative, [9.0, 0.0, 1.0, -7.0], {0, 3}) == (0.0, *group_relative([0.0, 1.0]), 0.0)
    assert among_judged(group_relative, [0.0, 1.0], ()) == group_relative([0.0, 1.0])
    assert among_judged(group_relative, [0.0, 1.0], {1}) == (0.0, 0.0)
    assert among_judged(group_relative, [0.0, 1.0], {0, 1}) == (0.0, 0.0)
    assert not has_signal([])


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_those_of_trl(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL samples from the model, our reward function hands out fixed rewards, and TRL makes advantages of them."""
    from huggingface_hub import constants

    from tests.oracles.grpo_loss import tiny_policy, trl_trainer

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    rewards = [0.0, 1.0, 0.25, 1.1, 0.3, 0.3, 0.3, 0.3]
    tiny_policy().save_pretrained(tmp_path / "model")
    trainer = trl_trainer(
        tmp_path / "model",
        tmp_path / "trl",
        reward=lambda completions, **_: rewards,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=3,
        scale_rewards=scale,
    )
    theirs = trainer._generate_and_score_completions([{"prompt": "t4 t5"}] * 4 + [{"prompt": "t6"}] * 4)["advantages"]
    ours = group_relative(rewards[:4], scale=scale) + group_relative(rewards[4:], scale=scale)  # type: ignore[arg-type]
    assert theirs.tolist() == pytest.approx(ours, abs=2e-6)
    assert max(map(abs, ours)) > 0.5


def test_whitening_leaves_tokens_out_that_nobody_sampled() -> None:
    white = whiten([(1.0, 99.0, 3.0), (5.0,)], 0.0, trained=[(True, False, True), None])
    deviation = (8 / 3) ** 0.5  # of 1, 3, 5
    assert white == [pytest.approx((-2 / deviation, 0.0, 0.0)), pytest.approx((2 / deviation,))]


def test_a_critic_passes_over_tokens_that_nobody_sampled() -> None:
    """Three sampled tokens with one of an environment between them: as the three alone, worked by hand."""
    sample = Sample((1,), (2, 3, 4, 5), (-1.0,) * 4, 1.0, old_logprobs=(-1.0,) * 4, values=(0.5, 0.0, 0.25, 0.75))
    sample = replace(sample, trained=(True, False, True, True))
    algorithm = AlgorithmSection(preset="ppo", gamma=1.0, gae_lambda=0.5, kl_in="loss", beta=0.0)
    found = with_returns(sample, algorithm)
    # deltas: 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75; A = delta + A of the next / 2
    assert found.advantage == pytest.approx((-0.25 + 0.3125, 0.0, 0.625, 0.25))
    assert found.returns == pytest.approx((0.5625, 0.0, 0.875, 1.0))
