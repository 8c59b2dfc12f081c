"""Estimates with intervals. An accuracy without its n and interval is not reported anywhere.

Several samples of one problem, or several problems about one text, are not independent: the unit that is counted is the
cluster, by default the problem (Miller 2024, arXiv 2411.00640, section 2). Scores are written scores_PN: P problems with N
samples each, where N may differ between problems.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SEED = 20241227  # of resampling: the same scores give the same interval
EXACT = 12  # differing problems up to which all sign flips are counted instead of drawn


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean score with its 95% confidence interval."""

    value: float
    low: float
    high: float
    n: int  # problems

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def estimate(
    scores_PN: Sequence[Sequence[float]], confidence: float = 0.95, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Mean score over P problems with N samples each; every problem counts the same.

    One 0/1 sample per problem gives Wilson's interval. Otherwise the standard error is cluster-robust; scores between 0 and
    1 then get Wilson's interval for the number of independent 0/1 scores that would have that standard error (Korn and
    Graubard 1998), which stays within 0..1 and has a width also where all scores are 0 or all 1. Other scores get Student's
    interval.

    Args:
        scores_PN: see the top of this file.
        confidence: of the interval.
        clusters: [P] what a problem belongs to, such as the text it asks about; None: each is its own.

    Raises:
        ValueError: no problem, one without samples, or clusters of another number.
    """
    # Imported here: it takes a second, and a wrong recipe is to be refused sooner than that.
    from scipy.stats import binomtest, norm, t

    _check(scores_PN, clusters)
    n = len(scores_PN)
    means = [statistics.fmean(scores) for scores in scores_PN]
    value = statistics.fmean(means)
    flat = [score for scores in scores_PN for score in scores]
    groups = _groups(clusters, n)
    if len(flat) == n == len(groups) and all(score in (0, 1) for score in flat):
        interval = binomtest(round(value * n), n).proportion_ci(confidence, method="wilson")
        return Estimate(value, float(interval.low), float(interval.high), n)
    is_share = all(0 <= score <= 1 for score in flat)
    if len(groups) == 1:
        return Estimate(value, min(0.0, value), max(1.0, value), n)  # one cluster says nothing of the others
    error = _error(means, value, groups)
    quantile = float(t.ppf(0.5 + confidence / 2, len(groups) - 1))
    if not is_share:
        return Estimate(value, value - quantile * error, value + quantile * error, n)
    normal = float(norm.ppf(0.5 + confidence / 2))
    # With no spread between the problems the number of clusters is all that is known.
    effective = value * (1 - value) / error**2 if error > 0 else float(len(groups))
    low, high = _wilson(value, effective * (normal / quantile) ** 2, normal)
    return Estimate(value, low, high, n)


def stratified(parts: Sequence[tuple[float, Sequence[Sequence[float]]]], confidence: float = 0.95) -> Estimate:
    """A weighted mean of the means of parts that are drawn apart; the parts' variances add up.

    Args:
        parts: (weight, scores_PN) of each; the weights sum to 1.
        confidence: of the interval, the normal one, clipped to 0..1.

    Raises:
        ValueError: see `estimate`; or weights that do not sum to 1.
    """
    from scipy.stats import norm

    if not math.isclose(sum(weight for weight, _ in parts), 1.0, abs_tol=1e-9):
        raise ValueError(f"the weights of the parts must sum to 1, got {[weight for weight, _ in parts]}")
    found = [(weight, estimate(scores_PN, confidence), scores_PN) for weight, scores_PN in parts]
    value = sum(weight * part.value for weight, part, _ in found)
    quantile = float(norm.ppf(0.5 + confidence / 2))
    # A part's half interval over the quantile is its standard error, also for parts of one problem or without spread.
    variance = sum((weight * (part.high - part.low) / 2 / quantile) ** 2 for weight, part, _ in found)
    half = quantile * math.sqrt(variance)
    return Estimate(
        value, max(0.0, value - half), min(1.0, value + half), sum(len(scores_PN) for *_, scores_PN in found)
    )


def standard_error(scores_PN: Sequence[Sequence[float]], clusters: Sequence[Hashable] | None = None) -> float:
    """Cluster-robust standard error of the mean over problems; NaN for a single cluster.

    sqrt(C / (C - 1) sum_c (sum of the deviations in c)^2) / P for C clusters.

    Raises:
        ValueError: see `estimate`.
    """
    _check(scores_PN, clusters)
    means = [statistics.fmean(scores) for scores in scores_PN]
    groups = _groups(clusters, len(means))
    return _error(means, statistics.fmean(means), groups) if len(groups) > 1 else math.nan


def bootstrap(
    scores_PN: Sequence[Sequence[float]],
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
) -> Estimate:
    """`estimate` with the percentile bootstrap over clusters: it assumes nothing about how scores are spread.

    It has no width where all clusters have the same mean, and is too narrow for fewer than some 20 of them.

    Raises:
        ValueError: see `estimate`.
    """
    import numpy as np

    _check(scores_PN, clusters)
    means = np.array([statistics.fmean(scores) for scores in scores_PN])
    groups = _groups(clusters, len(means))
    sums = np.array([means[places].sum() for places in groups])
    sizes = np.array([len(places) for places in groups])
    drawn = np.random.default_rng(SEED).integers(len(groups), size=(resamples, len(groups)))
    found = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(float(means.mean()), float(low), float(high), len(means))


# --- several samples of a problem -------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is right, from n samples of which `correct` are: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def cons_at_k(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Whether the answer that most of a problem's k samples give is right (cons@k of DeepSeek-R1): 0..1.

    Samples without a final answer have no vote. Answers are the same when their texts are; those that the grader found right
    are all the same, since each equals the reference. Answers that share the first place count each by its part.

    Args:
        answers: [k] final answers, None where there is none.
        scores: [k], 1 for right.

    Raises:
        ValueError: lists of different or no length.
    """
    if not answers or len(answers) != len(scores):
        raise ValueError(f"cons@k needs as many answers as scores, at least one; got {len(answers)} and {len(scores)}")
    right = object()
    votes = Counter[Any](
        right if score == 1 else " ".join(answer.split())
        for answer, score in zip(answers, scores, strict=True)
        if answer is not None
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    return (votes[right] == most) / sum(count == most for count in votes.values())


# --- two checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """A second set of scores against a first one on the same problems."""

    first: float  # mean score
    second: float
    difference: float  # second - first
    low: float  # 95% interval of the difference
    high: float
    p_value: float  # of "no difference", two-sided
    n: int  # problems
    better: int  # problems on which the second scores more
    worse: int
    test: str  # "sign flips, exact" or "sign flips, drawn"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_paired(
    first_PN: Sequence[Sequence[float]],
    second_PM: Sequence[Sequence[float]],
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Comparison:
    """Difference of two mean scores on the same problems, which takes the problems' difficulty out.

    The interval is Student's over the problems' differences. The p-value is that of a permutation test: without a
    difference, which of the two scored what on a problem is a toss-up, so all signs of the differences are as likely. For
    one 0/1 sample each it is the exact test of McNemar. Of problems in one cluster (see `estimate`) the differences are added
    up first and share one sign.

    Raises:
        ValueError: other than one list of samples per problem on both sides, or clusters of another number.
    """
    from scipy.stats import binomtest, t

    _check(first_PN, clusters)
    _check(second_PM, clusters)
    if len(first_PN) != len(second_PM):
        raise ValueError(f"a paired comparison needs the same problems, got {len(first_PN)} and {len(second_PM)}")
    one = [statistics.fmean(scores) for scores in first_PN]
    two = [statistics.fmean(scores) for scores in second_PM]
    differences = [b - a for a, b in zip(one, two, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    groups = _groups(clusters, n)
    half = math.inf
    if len(groups) > 1:
        half = float(t.ppf(0.5 + confidence / 2, len(groups) - 1)) * _error(differences, mean, groups)
    sums = [math.fsum(differences[place] for place in places) for places in groups]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if all(value in (-1, 0, 1) for value in sums):
        test = "sign flips, exact"
        up, down = sums.count(1), sums.count(-1)
        p_value = float(binomtest(up, up + down).pvalue) if up + down else 1.0
    else:
        p_value, test = _sign_flips([value for value in sums if value])
    return Comparison(
        statistics.fmean(one),
        statistics.fmean(two),
        mean,
        max(-1.0, mean - half) if math.isinf(half) else mean - half,
        min(1.0, mean + half) if math.isinf(half) else mean + half,
        p_value,
        n,
        better,
        worse,
        test,
    )


def paired_difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Estimate:
    """Second less first, on the same problems, with the interval of `bootstrap`.

    Args:
        first, second: problem id -> values of its samples; scores of two policies, for example.

    Raises:
        ValueError: the problems are not the same ones.
    """
    if set(first) != set(second):
        raise ValueError(
            f"a paired difference needs the same problems on both sides, got {len(first)} and {len(second)}"
        )
    return bootstrap([[statistics.fmean(second[name]) - statistics.fmean(first[name])] for name in sorted(first)])


def _sign_flips(differences: Sequence[float]) -> tuple[float, str]:
    """Two-sided p-value: the share of sign patterns whose sum is as far from 0 as the one seen."""
    import numpy as np
    from scipy.stats import permutation_test

    if len(differences) < 2:  # both signs of one difference are as far from 0
        return 1.0, "sign flips, exact"
    is_exact = len(differences) <= EXACT
    found = permutation_test(
        (np.array(differences),),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**EXACT if is_exact else 9999,
        rng=np.random.default_rng(SEED),
    )
    return min(1.0, float(found.pvalue)), "sign flips, exact" if is_exact else "sign flips, drawn"


def _check(scores_PN: Sequence[Sequence[float]], clusters: Sequence[Hashable] | None) -> None:
    if not scores_PN or not all(scores_PN):
        raise ValueError("an estimate needs at least one problem with at least one sample")
    if clusters is not None and len(clusters) != len(scores_PN):
        raise ValueError(f"clusters must name one for each of {len(scores_PN)} problems, got {len(clusters)}")


def _groups(clusters: Sequence[Hashable] | None, count: int) -> list[list[int]]:
    """The places of each cluster's problems."""
    if clusters is None:
        return [[place] for place in range(count)]
    places = defaultdict(list)
    for place, cluster in enumerate(clusters):
        places[cluster].append(place)
    return list(places.values())


def _error(means: Sequence[float], value: float, groups: Sequence[Sequence[int]]) -> float:
    squares = math.fsum(math.fsum(means[place] - value for place in places) ** 2 for places in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * squares) / len(means)


def _wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval for n 0/1 scores, of which there need not be a whole number."""
    if math.isinf(n) or n > 1e15:
        return value, value
    middle = (value + quantile**2 / (2 * n)) / (1 + quantile**2 / n)
    half = quantile / (1 + quantile**2 / n) * math.sqrt(value * (1 - value) / n + quantile**2 / (4 * n**2))
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))
