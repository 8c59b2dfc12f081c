"""Parity accounting, by hand, and the router's measures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posttrain.errors import ParityError
from posttrain.model.router import RouterTrace, expert_counts, find_flips, max_violation, update_correction_bias
from posttrain.parity import Flip, ParityReport, compare, require_parity
from posttrain.recipe import ParitySection
from posttrain.types import Sample

EXPERTS = np.zeros((4, 3, 2), np.int16)  # 2 prompt + 3 completion tokens - 1, 3 layers, 2 experts
SAMPLE = Sample((5, 6), (7, 8, 9), (-1.0, -2.0, -3.0), 0.0, EXPERTS)


def test_gaps_are_counted_token_by_token() -> None:
    report = compare(SAMPLE, [-1.0, -2.1, -2.7], [], near_tie_margin=1e-5, name="s")
    assert (report.tokens, report.decisions, report.disagreements) == (3, 12, 0)
    assert report.gap_max == pytest.approx(0.3)
    assert report.relative_gap_max == pytest.approx(0.3 / 2.7)  # 0.1 / 2.1 is less
    assert report.gap_mean == pytest.approx(0.4 / 3)
    assert report.kl == pytest.approx((math.exp(-0.1) + 0.1 - 1 + math.exp(0.3) - 0.3 - 1) / 3)
    assert report.routing_agreement == 1.0
    assert report.worst == "s, token 4: sampler -3.000000, learner -2.700000"


def test_tokens_after_a_near_tie_are_left_out_and_counted_apart() -> None:
    # Token 3 is predicted from tokens 0 to 2: a tie at position 2 touches it and what follows, not token 2.
    flips = [Flip(2, 0, 1e-6), Flip(2, 1, 0.4)]
    report = compare(SAMPLE, [-1.0, -9.0, -9.0], flips, near_tie_margin=1e-5, name="s")
    assert (report.tokens, report.excluded_tokens, report.flipped_tokens, report.disagreements) == (1, 2, 1, 2)
    assert report.gap_max == 0.0 and report.hard_flip == ""
    assert report.routing_agreement == pytest.approx(1 - 2 / 12)


def test_a_disagreement_without_a_tie_stays_in() -> None:
    report = compare(SAMPLE, [-1.0, -9.0, -3.0], [Flip(1, 2, 0.2)], near_tie_margin=1e-5, name="s")
    assert (report.tokens, report.excluded_tokens, report.flipped_tokens) == (3, 0, 0)
    assert report.gap_max == pytest.approx(7.0)
    assert report.hard_flip == "s, token 1, MoE layer 2: scores 2.0e-01 apart"


def test_reports_add_up_and_nan_wins() -> None:
    good = compare(SAMPLE, [-1.0, -2.0, -3.0], [], near_tie_margin=1e-5, name="a")
    broken = compare(SAMPLE, [-1.0, math.nan, -3.0], [], near_tie_margin=1e-5, name="b")
    for total in (good + broken, broken + good, ParityReport() + broken + good):
        assert math.isnan(total.gap_max) and total.tokens == 6
        with pytest.raises(ParityError, match="differ by nan"):
            require_parity(total, ParitySection())


def test_limits() -> None:
    near = ParityReport(tokens=5, gap_max=9e-4, relative_gap_max=9e-5, decisions=10_000, disagreements=1)
    require_parity(near, ParitySection())
    with pytest.raises(ParityError, match=r"differ by 2.00e-04 .*max_logprob_gap=1e-04"):
        require_parity(ParityReport(tokens=5, gap_max=2e-4, relative_gap_max=2e-4), ParitySection())
    with pytest.raises(ParityError, match="same experts for 0.99000"):
        require_parity(ParityReport(tokens=5, decisions=100, disagreements=1), ParitySection())


def router(num_group: int, topk_group: int, bias: list[float]) -> SimpleNamespace:
    return SimpleNamespace(num_group=num_group, topk_group=topk_group, e_score_correction_bias=torch.tensor(bias))


def logits_for(scores: list[float]) -> torch.Tensor:
    return torch.logit(torch.tensor(scores))


def flips_of(scores: list[float], ours: list[int], theirs: list[int], **shape: int) -> list[Flip]:
    trace = RouterTrace(logits=[logits_for(scores)[None]], chosen=[torch.tensor([ours])])
    which = router(shape.get("num_group", 1), shape.get("topk_group", 1), [0.0] * len(scores))
    return find_flips(np.array([[theirs]], np.int16), trace.chosen_NLK(), trace, torch.tensor([0]), [which])


def test_the_order_of_experts_is_no_difference() -> None:
    assert flips_of([0.9, 0.8, 0.2, 0.1], [0, 1], [1, 0]) == []


def test_margin_is_the_distance_from_a_tie() -> None:
    (flip,) = flips_of([0.9, 0.6, 0.5, 0.1], [0, 1], [0, 2])
    assert (flip.position, flip.layer) == (0, 0)
    assert flip.margin == pytest.approx(0.1, abs=1e-6)


def test_margin_across_groups_is_that_of_the_groups() -> None:
    # Groups {0, 1} and {2, 3} score 1.0 and 0.9: another group's experts are 0.1 away, whatever their own scores.
    (flip,) = flips_of([0.6, 0.4, 0.8, 0.1], [0, 1], [2, 3], num_group=2, topk_group=1)
    assert flip.margin == pytest.approx(0.1, abs=1e-6)


def test_counts_leave_out_padding_and_maxvio_is_zero_in_balance() -> None:
    trace = RouterTrace(chosen=[torch.tensor([[0, 1], [0, 2], [3, 1]])])
    counts = expert_counts(trace.chosen, torch.tensor([True, True, False]), 4)
    assert counts.tolist() == [[2, 1, 1, 0]]
    assert max_violation(counts) == pytest.approx(1.0)
    assert max_violation(torch.tensor([[5, 5], [1, 3]])) == pytest.approx(0.5)


def test_bias_falls_for_the_overloaded_and_rises_for_the_underloaded() -> None:
    which = router(1, 1, [0.0, 0.5, -0.5, 0.0])
    update_correction_bias([which], torch.tensor([[8, 4, 0, 4]]), 0.1)
    assert which.e_score_correction_bias.tolist() == pytest.approx([-0.1, 0.5, -0.4, 0.0])


def test_a_router_without_bias_says_so() -> None:
    with pytest.raises(ValueError, match="set router.bias_update_speed: 0"):
        update_correction_bias([SimpleNamespace()], torch.tensor([[1, 1]]), 0.1)
