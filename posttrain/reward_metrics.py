"""What a reward model's scores of held-out pairs are worth: accuracy, calibration, length bias, agreement with a verifier.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.statistics import estimate

BINS = 10


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """One held-out pair and its scores."""

    chosen: float
    rejected: float
    margin: float  # of the data, not of the scores
    kind: str
    chosen_length: int  # tokens of the whole chat
    rejected_length: int
    chosen_right: bool | None = None  # by the verifier; None where there is none
    rejected_right: bool | None = None


def measure(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Everything that summary.json says of a reward model, JSON-able.

    Args:
        pairs: at least one.
    """
    return {
        "loss": bradley_terry_mean(pairs),
        "accuracy": accuracy(pairs),
        "by_kind": {kind: accuracy(group) for kind, group in sorted(_by_kind(pairs).items())},
        "calibration": calibration(pairs),
        "length": length_bias(pairs),
        "verifier": verifier_agreement(pairs),
        "normalization": normalization(pairs),
    }


def bradley_terry_mean(pairs: Sequence[ScoredPair]) -> float:
    """Mean of -log sigmoid(chosen - rejected - margin), nats."""
    gaps_N = np.array([pair.chosen - pair.rejected - pair.margin for pair in pairs])
    return float(np.logaddexp(0.0, -gaps_N).mean())


def accuracy(pairs: Sequence[ScoredPair]) -> dict[str, float] | None:
    """Share of the pairs whose chosen answer scores higher, with its 95% interval (Wilson); None without pairs.

    Equal scores count as wrong: a reward model that says nothing has no accuracy.
    """
    if not pairs:
        return None
    return estimate([[float(pair.chosen > pair.rejected)] for pair in pairs]).to_dict()


def calibration(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Whether sigmoid(chosen - rejected) is the probability that the chosen answer is better (Bradley-Terry).

    Returns:
        `brier`: mean squared error of that probability. `expected_calibration_error`: |confidence - accuracy| in bins of
        confidence max(p, 1 - p), from 0.5 to 1, weighted by size (Guo et al., 2017, arXiv 1706.04599). `bins`: those with
        pairs in them.
    """
    gaps_N = np.array([pair.chosen - pair.rejected for pair in pairs])
    probabilities_N = 1.0 / (1.0 + np.exp(-np.clip(gaps_N, -500, 500)))
    confidences_N = np.maximum(probabilities_N, 1.0 - probabilities_N)
    right_N = gaps_N > 0
    edges = np.linspace(0.5, 1.0, BINS + 1)
    places_N = np.clip(np.digitize(confidences_N, edges) - 1, 0, BINS - 1)
    bins = []
    for place in range(BINS):
        inside_N = places_N == place
        if inside_N.any():
            bins.append(
                {
                    "low": float(edges[place]),
                    "high": float(edges[place + 1]),
                    "n": int(inside_N.sum()),
                    "confidence": float(confidences_N[inside_N].mean()),
                    "accuracy": float(right_N[inside_N].mean()),
                }
            )
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(pairs)
    return {"brier": float(((1.0 - probabilities_N) ** 2).mean()), "expected_calibration_error": error, "bins": bins}


def length_bias(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Whether longer answers score higher.

    Returns:
        `correlation_chosen`, `correlation_rejected`: Spearman's, of score and length in tokens, within either side; None
        where all lengths, or all scores, are equal. `accuracy_rejected_longer`, `_shorter`, `_same`: see `accuracy`.
    """
    longer = [pair for pair in pairs if pair.rejected_length > pair.chosen_length]
    shorter = [pair for pair in pairs if pair.rejected_length < pair.chosen_length]
    same = [pair for pair in pairs if pair.rejected_length == pair.chosen_length]
    return {
        "correlation_chosen": _spearman([(pair.chosen, pair.chosen_length) for pair in pairs]),
        "correlation_rejected": _spearman([(pair.rejected, pair.rejected_length) for pair in pairs]),
        "accuracy_rejected_longer": accuracy(longer),
        "accuracy_rejected_shorter": accuracy(shorter),
        "accuracy_rejected_same": accuracy(same),
    }


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    scores, lengths = zip(*points, strict=True)
    if len(set(scores)) < 2 or len(set(lengths)) < 2:
        return None
    return float(spearmanr(scores, lengths).statistic)


def verifier_agreement(pairs: Sequence[ScoredPair]) -> dict[str, float] | None:
    """How well the score tells answers that the verifier calls right from those it calls wrong, over all prompts.

    Returns:
        `auc`: probability that a right answer scores higher than a wrong one (Mann-Whitney; a tie is half), with `right` and
        `wrong`, their numbers; None where no answer was verified, or all were verified alike.
    """
    from scipy.stats import rankdata

    verdicts = [(pair.chosen, pair.chosen_right) for pair in pairs]
    verdicts += [(pair.rejected, pair.rejected_right) for pair in pairs]
    known = [(score, bool(right)) for score, right in verdicts if right is not None]
    right_N = np.array([right for _, right in known], dtype=bool)
    right, wrong = int(right_N.sum()), int((~right_N).sum())
    if not right or not wrong:
        return None
    ranks_N = rankdata([score for score, _ in known])
    auc = (ranks_N[right_N].sum() - right * (right + 1) / 2) / (right * wrong)
    return {"auc": float(auc), "right": right, "wrong": wrong}


def normalization(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """Mean and standard deviation of all scores, chosen and rejected, and their number."""
    scores = [score for pair in pairs for score in (pair.chosen, pair.rejected)]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores)), "n": len(scores)}


def _by_kind(pairs: Sequence[ScoredPair]) -> Mapping[str, list[ScoredPair]]:
    groups: dict[str, list[ScoredPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.kind, []).append(pair)
    return groups
