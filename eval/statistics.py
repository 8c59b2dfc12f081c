"""Estimates with intervals. An accuracy without its n and interval is not reported anywhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean score with its 95% confidence interval."""

    value: float
    low: float
    high: float
    n: int  # problems

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def estimate(scores_PN: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """Mean score over P problems with N samples each.

    One 0/1 sample per problem gives Wilson's interval. Otherwise the samples of a problem are not independent, so the
    interval is the normal one over the problems' means (cluster-robust), clipped to 0..1.

    Raises:
        ValueError: no problem, or one without samples.
    """
    # Imported here: it takes a second, and a wrong recipe is to be refused sooner than that.
    from scipy.stats import binomtest, norm

    if not scores_PN or not all(scores_PN):
        raise ValueError("an estimate needs at least one problem with at least one sample")
    n = len(scores_PN)
    means = [statistics.fmean(scores) for scores in scores_PN]
    value = statistics.fmean(means)
    if all(len(scores) == 1 and scores[0] in (0, 1) for scores in scores_PN):
        interval = binomtest(round(value * n), n).proportion_ci(confidence, method="wilson")
        return Estimate(value, float(interval.low), float(interval.high), n)
    if n == 1:
        return Estimate(value, 0.0, 1.0, n)
    half = float(norm.ppf(0.5 + confidence / 2)) * statistics.stdev(means) / math.sqrt(n)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)


def bootstrap(
    values_PN: Sequence[Sequence[float]], draws: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of any figure over P problems with N values each, with a cluster bootstrap interval: problems are drawn anew.

    For figures that are no shares, such as lengths, and for differences, which `estimate` would clip to 0..1.

    Raises:
        ValueError: no problem, or one without values.
    """
    import numpy as np

    if not values_PN or not all(values_PN):
        raise ValueError("a bootstrap needs at least one problem with at least one value")
    means_P = np.array([statistics.fmean(values) for values in values_PN])
    rng = np.random.default_rng(seed)
    # A thousand at a time: 10,000 draws of 400 problems would be 32 MB, of 40,000 problems 3 GB.
    means_D = np.concatenate(
        [
            means_P[rng.integers(len(means_P), size=(min(1000, draws - done), len(means_P)))].mean(axis=1)
            for done in range(0, draws, 1000)
        ]
    )
    low, high = np.quantile(means_D, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(float(means_P.mean()), float(low), float(high), len(means_P))


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
