"""The reward model stage on the screen: what became of the pairs, and what the scores are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.reward_data import PairSets


def show_pairs(pairs: PairSets) -> None:
    """What is trained on and measured on, a line each."""
    for name, counts in pairs.counts.items():
        left_out = {
            "too long": counts.too_long,
            "with equal tokens": counts.same_tokens,
            "with a prompt that is trained on": counts.trained_on,
        }
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        print(
            f"{name.replace('_', ' ')}: {counts.kept:,} of {counts.pairs:,} pairs{f'; left out: {why}' if why else ''}"
        )


def show_measured(measured: Mapping[str, Any]) -> None:
    """The table at the end.

    Args:
        measured: of `reward_metrics.measure`.
    """
    table = Table(title="held-out pairs", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("accuracy", _interval(measured["accuracy"]))
    for kind, found in measured["by_kind"].items():
        table.add_row(f"  {kind}", _interval(found))
    length = measured["length"]
    for name in ("longer", "shorter", "same"):
        table.add_row(f"  rejected {name}", _interval(length[f"accuracy_rejected_{name}"]))
    calibration = measured["calibration"]
    table.add_row("expected calibration error", f"{calibration['expected_calibration_error']:.3f}")
    table.add_row("Brier score", f"{calibration['brier']:.3f}")
    for side in ("chosen", "rejected"):
        table.add_row(f"score and length, {side}", _number(length[f"correlation_{side}"]))
    verifier = measured["verifier"]
    table.add_row("AUC against the verifier", _number(verifier and verifier["auc"]))
    normalization = measured["normalization"]
    table.add_row("scores", f"{normalization['mean']:.2f} ± {normalization['std']:.2f}")
    Console().print(table)


def _interval(found: Mapping[str, float] | None) -> str:
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] n={found['n']}" if found else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
