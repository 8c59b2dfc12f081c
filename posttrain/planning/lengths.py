"""How long completions are: a log-normal distribution, cut off at the longest that is allowed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist, fmean

from posttrain.sections import RecipeError

_POINTS = 1000
_MAX_LOG = 40.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of a completion.

    Attributes:
        mean: after the cut.
        sigma: standard deviation of the logarithm before the cut; 0 makes all equal.
        maximum: where generation is cut off.

    Raises:
        RecipeError: a mean that no such distribution has.
    """

    mean: float
    sigma: float
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.maximum:
            raise RecipeError(
                f"--mean-length {self.mean:g}: completions have 1 to rollout.max_completion_length={self.maximum} tokens; "
                f"give a length between"
            )
        if self.sigma < 0:
            raise RecipeError(f"--length-sigma {self.sigma:g}: a standard deviation is not negative; give 0 or more")

    @cached_property
    def _mu(self) -> float:
        """Mean of the logarithm, so that the mean after the cut is `mean`."""
        low, high = 0.0, _MAX_LOG
        if self.sigma == 0 or self.mean == self.maximum:
            return math.log(self.mean)
        for _ in range(60):
            middle = (low + high) / 2
            if fmean(self._at(middle, share) for share in _shares(_POINTS)) < self.mean:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _at(self, mu: float, share: float) -> float:
        deviation = self.sigma * NormalDist().inv_cdf(share) if self.sigma and self.mean < self.maximum else 0.0
        return max(1.0, min(float(self.maximum), math.exp(min(mu + deviation, _MAX_LOG))))

    def quantiles(self, count: int) -> list[int]:
        """So many lengths that stand for the distribution, ascending."""
        return [max(1, round(self._at(self._mu, share))) for share in _shares(count)]

    def typical(self, count: int) -> list[int]:
        """So many lengths in an order by chance, always the same."""
        found = self.quantiles(count)
        random.Random(0).shuffle(found)
        return found

    def draw(self, random_source: random.Random) -> int:
        """One length by chance."""
        return max(1, round(self._at(self._mu, min(max(random_source.random(), 1e-12), 1 - 1e-12))))

    @property
    def truncated_share(self) -> float:
        """Share of the completions that are cut off."""
        lengths = self.quantiles(_POINTS)
        return sum(length >= self.maximum for length in lengths) / _POINTS

    def text(self) -> str:
        """The distribution in words."""
        cut = f"cut at {self.maximum:,} ({self.truncated_share:.1%} of them)"
        return f"log-normal, mean {self.mean:,.0f}, sigma {self.sigma:g}, {cut}"


def _shares(count: int) -> Sequence[float]:
    return [(index + 0.5) / count for index in range(count)]
