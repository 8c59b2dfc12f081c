"""When sampler and learner come apart: what is measured, and what the breaker does about it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.breaker import Breaker
from posttrain.grpo_recipe import BreakerSection
from posttrain.parity import CAUSES, Flip, Mismatch, compare, mismatch
from posttrain.types import Completion, Sample

SAMPLE = Sample((1, 2), (3, 4, 5, 6), (-1.0, -2.0, -1.0, -0.5), 1.0)


def k3(log_ratio: float) -> float:
    return math.exp(log_ratio) - log_ratio - 1


def test_every_token_has_one_cause_and_the_parts_add_up() -> None:
    learner = (-1.1, -1.8, -1.0, -0.2)
    sample = replace(SAMPLE, stale_tokens=1, experts_TLK=np.zeros((5, 2, 1), np.int16))
    found = mismatch(sample, learner, [Flip(3, 1, 0.2)], num_layers=2)  # token 3 is the second of the completion
    values = {name: metric.value for name, metric in found.metrics().items()}
    # The tokens after token 3 saw what other experts made of it; token 3 itself was predicted before.
    assert values["mismatch/kl_staleness"] == pytest.approx(k3(-0.1) / 4)
    assert values["mismatch/kl_precision"] == pytest.approx(k3(0.2) / 4)
    assert values["mismatch/kl_routing"] == pytest.approx((k3(0.0) + k3(0.3)) / 4)
    assert values["mismatch/kl"] == pytest.approx(sum(values[f"mismatch/kl_{cause}"] for cause in CAUSES))
    ratios = [math.exp(-0.1), math.exp(0.2), 1.0, math.exp(0.3)]
    size = sum(ratios) ** 2 / (4 * sum(r * r for r in ratios))
    assert values["mismatch/effective_sample_size"] == pytest.approx(size)
    assert values["mismatch/ratio_max"] == pytest.approx(math.exp(0.3))
    assert values["router/layer_00/flip_rate"] == 0 and values["router/layer_01/flip_rate"] == 0.2
    both = found + found
    assert both.metrics()["mismatch/effective_sample_size"].value == pytest.approx(size)
    assert both.metrics()["mismatch/kl"].value == pytest.approx(values["mismatch/kl"])


def test_stale_tokens_are_no_matter_of_parity() -> None:
    learner = (-9.0, -9.0, -1.0, -0.5)
    assert compare(SAMPLE, learner, [], near_tie_margin=0.0, name="s").gap_max == 8.0
    report = compare(replace(SAMPLE, stale_tokens=2), learner, [], near_tie_margin=0.0, name="s")
    assert (report.tokens, report.gap_max) == (2, 0.0)


@pytest.mark.parametrize(
    ("versions", "keeps_cache", "expected"),
    [
        (None, True, 0),
        ((4, 4, 5, 5), True, 4),
        ((4, 4, 5, 5), False, 2),
        ((5, 5, 5, 5), True, 0),
        ((3, 3, 3, 3), False, 4),
    ],
)
def test_which_tokens_are_stale(versions: tuple[int, ...] | None, keeps_cache: bool, expected: int) -> None:
    completion = Completion((1, 2, 3, 4), (-1.0,) * 4, "stop", "", 5, token_versions=versions)
    assert completion.stale_tokens(5, keeps_cache=keeps_cache) == expected


GOOD = Mismatch(100, (0.001, 0.0, 0.0), 100.0, 100.0, 1.0)
BAD = Mismatch(100, (5.0, 3.0, 0.0), 100.0, 150.0, 9.0)


def test_actions_follow_one_another_until_steps_are_healthy_again() -> None:
    breaker = Breaker(BreakerSection(max_kl=0.01, healthy_steps=2))
    assert breaker.look(GOOD, 0).action is None
    found = [breaker.look(BAD, version) for version in (1, 2, 3)]
    assert [verdict.action for verdict in found] == ["mask", "publish", "rollback"]
    assert [verdict.first_bad_version for verdict in found] == [1, 1, 1]
    assert "mismatch/kl is 8.0e-02" in found[0].reason and "precision 5.0e-02, routing 3.0e-02" in found[0].reason
    assert breaker.look(GOOD, 4).action is None
    again = Breaker(BreakerSection(max_kl=0.01, healthy_steps=2))
    again.restore(breaker.state())
    for one in (breaker, again):  # one healthy step is not enough
        assert [one.look(BAD, 5).action, one.look(BAD, 6).action] == ["stop", "stop"]
    breaker.look(GOOD, 7)
    breaker.look(GOOD, 8)
    verdict = breaker.look(BAD, 9)
    assert verdict.action == "mask" and verdict.first_bad_version == 9


def test_a_nan_trips() -> None:
    nan = Mismatch(1, (math.nan, 0.0, 0.0), 1.0, 1.0, 1.0)
    assert Breaker(BreakerSection(max_kl=1.0)).look(nan, 0).action == "mask"
    assert Breaker(BreakerSection(min_effective_sample_size=0.9, actions=("stop",))).look(BAD, 0).action == "stop"


def test_a_breaker_without_limits_is_refused() -> None:
    with pytest.raises(ValidationError, match="never trips"):
        BreakerSection()
