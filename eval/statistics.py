"""Estimates with intervals. An accuracy without its n and interval is not reported anywhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
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
