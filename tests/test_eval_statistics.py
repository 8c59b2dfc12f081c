"""Estimates: worked by hand, against brute force and scipy, and over many simulated evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from eval.statistics import (
    Estimate,
    bootstrap,
    compare_paired,
    cons_at_k,
    estimate,
    pass_at_k,
    standard_error,
)


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (1, 1, 1, 1.0),
        (5, 0, 3, 0.0),
        (5, 3, 3, 1.0),  # two wrong ones cannot fill three places
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (10, 3, 2, 1 - 21 / 45),  # 1 - C(7,2)/C(10,2)
        (10, 3, 5, 1 - 21 / 252),  # 1 - C(7,5)/C(10,5)
        (200, 1, 100, 0.5),
    ],
)
def test_pass_at_k_by_hand(n: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n, correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if correct > n or k > n:
            continue
        samples = [1] * correct + [0] * (n - correct)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(*wrong)


def test_majority_by_hand() -> None:
    assert cons_at_k(["4", "4", "5"], [1, 1, 0]) == 1.0
    assert cons_at_k(["4", "5", "5"], [1, 0, 0]) == 0.0
    assert cons_at_k(["1/2", "0.5", "3", "3"], [1, 1, 0, 0]) == 0.5  # two ways to write the right one: a tie of 2 : 2
    assert cons_at_k(["4", None, None, None], [1, 0, 0, 0]) == 1.0  # no answer has no vote
    assert cons_at_k([None, None], [0, 0]) == 0.0
    assert cons_at_k(["3", "7", "4"], [0, 0, 1]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="as many answers"):
        cons_at_k(["3"], [])


def test_standard_error_counts_clusters() -> None:
    # Means 1, 0, 1, 0: deviations of 1/2, so sqrt(4/3 * 4 * 1/4) / 4.
    scores = [[1.0, 1.0], [0.0, 0.0], [1.0], [0.0]]
    assert standard_error(scores) == pytest.approx(math.sqrt(4 / 3) / 4)
    assert standard_error(scores) == pytest.approx(stats.sem([1, 0, 1, 0]))
    # Two clusters {1, 1} and {0, 0}: sums of deviations 1 and -1, so sqrt(2/1 * 2) / 4.
    assert standard_error(scores, ["a", "b", "a", "b"]) == pytest.approx(0.5)
    assert math.isnan(standard_error([[1.0], [0.0]], ["a", "a"]))
    with pytest.raises(ValueError, match="one for each of 2"):
        estimate([[1.0], [0.0]], clusters=["a"])


def test_no_spread_is_not_certainty() -> None:
    found = estimate([[0.0, 0.0]] * 20)
    assert found.low == 0.0 and 0.1 < found.high < 0.25  # Wilson for 0 of 20 is 0.161
    outside = estimate([[2.0, 4.0], [5.0, 5.0]])
    assert outside.value == 4.0 and outside.low < 3.0 < 5.0 < outside.high  # no share: not clipped to 0..1


def difficulties(generator: np.random.Generator, problems: int) -> np.ndarray:
    """Chances to solve each problem: most hard or easy, mean 0.4."""
    return generator.beta(0.6, 0.9, size=problems)


def covered(interval: Callable[[list[list[float]]], Estimate], samples: int, problems: int) -> float:
    """Share of 600 simulated evaluations whose interval holds the truth, which is 0.4."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(600):
        chances = difficulties(generator, problems)
        drawn = generator.random((problems, samples)) < chances[:, None]
        found = interval(drawn.astype(float).tolist())
        hits += found.low <= 0.4 <= found.high
    return hits / 600


@pytest.mark.parametrize(("samples", "problems"), [(1, 60), (4, 60), (8, 15)])
def test_intervals_hold_the_truth_as_often_as_they_say(samples: int, problems: int) -> None:
    # 95% of 600, and three standard deviations of a binomial around it.
    assert covered(estimate, samples, problems) == pytest.approx(0.95, abs=0.027)


def test_bootstrap_holds_the_truth_and_an_interval_without_clusters_does_not() -> None:
    assert covered(bootstrap, 4, 60) == pytest.approx(0.95, abs=0.035)

    def naive(scores_PN: list[list[float]]) -> Estimate:
        return estimate([[score] for scores in scores_PN for score in scores])

    assert covered(naive, 8, 60) < 0.8


def test_clusters_of_problems_widen_the_interval_to_the_truth() -> None:
    generator, hits, naive_hits = np.random.default_rng(1), 0, 0
    for _ in range(400):
        chances = np.repeat(difficulties(generator, 30), 5)  # five questions about each of 30 texts
        scores = (generator.random(150) < chances).astype(float)[:, None].tolist()
        found = estimate(scores, clusters=[place // 5 for place in range(150)])
        naive = estimate(scores)
        hits += found.low <= 0.4 <= found.high
        naive_hits += naive.low <= 0.4 <= naive.high
    assert hits / 400 == pytest.approx(0.95, abs=0.033)
    assert naive_hits / 400 < 0.85


def test_paired_comparison_by_hand() -> None:
    # 8 better, 2 worse, 10 the same: McNemar's exact p is 2 * P(X <= 2 of 10) = 2 * 56 / 1024.
    first = [[0.0]] * 8 + [[1.0]] * 2 + [[1.0]] * 10
    second = [[1.0]] * 8 + [[0.0]] * 2 + [[1.0]] * 10
    found = compare_paired(first, second)
    assert (found.n, found.better, found.worse) == (20, 8, 2)
    assert found.difference == pytest.approx(0.3) and found.p_value == pytest.approx(112 / 1024)
    # Differences 1/2, 1/2, 1: of 8 sign patterns two are as far from 0.
    found = compare_paired([[0.0, 0.0], [0.5], [0.0]], [[1.0, 0.0], [1.0], [1.0]])
    assert found.p_value == pytest.approx(0.25) and found.test == "sign flips, exact"
    # Two problems of one passage share a sign: of 4 patterns of (1 + 1, 1) two are as far from 0, of McNemar's 8 two.
    scores = ([[0.0]] * 3, [[1.0]] * 3)
    assert compare_paired(*scores, clusters=["a", "a", "b"]).p_value == pytest.approx(0.5)
    assert compare_paired(*scores).p_value == pytest.approx(0.25)
    # Differences 1, 1, 0, 0 in two passages: sqrt(2 (1^2 + 1^2)) / 4 = 0.5 times Student's 12.706 for one degree of freedom.
    found = compare_paired([[0.0]] * 4, [[1.0], [1.0], [0.0], [0.0]], clusters=["a", "a", "b", "b"])
    assert (found.difference, found.high - found.difference) == (0.5, pytest.approx(6.353, abs=1e-3))
    # A single difference says nothing: the other sign is as far from 0.
    single = compare_paired([[0.0, 0.0], [0.5]], [[0.5, 0.0], [0.5]])
    assert (single.p_value, single.better, single.test) == (1.0, 1, "sign flips, exact")
    same = compare_paired([[1.0], [0.0]], [[1.0], [0.0]])
    assert same.p_value == 1.0 and same.difference == 0.0
    with pytest.raises(ValueError, match="the same problems"):
        compare_paired([[1.0]], [[1.0], [0.0]])


def test_p_values_are_uniform_without_a_difference_and_small_with_one() -> None:
    generator = np.random.default_rng(2)
    p_values, seen = [], 0
    for _ in range(80):
        chances = difficulties(generator, 40)
        one, two = ((generator.random((40, 4)) < chances[:, None]).astype(float).tolist() for _ in range(2))
        p_values.append(compare_paired(one, two).p_value)
        better = (generator.random((40, 4)) < np.minimum(1, chances + 0.2)[:, None]).astype(float).tolist()
        seen += compare_paired(one, better).p_value < 0.05
    assert np.mean(np.array(p_values) < 0.05) <= 0.125  # 5%, and three standard deviations of 80
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.1)
    assert seen > 60
