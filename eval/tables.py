"""Results on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

FLAWS = {
    "truncated": "truncated",
    "no_answer": "without an answer",
    "no_verdict": "without a verdict",
    "grader_timeout": "grader timed out",
    "grader_crash": "grader crashed",
    "rows_left_out": "rows left out",
    "prompts_shortened": "prompts shortened",
}
WIDTH = 127  # columns where there is no terminal
MOST_KINDS = 12  # of a suite that are shown; all of them are in summary.json


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """One table: a row per suite, its other metrics and kinds below it, and what went wrong.

    Args:
        results: suite -> `EvalResult.to_dict()`.
    """
    table = Table(title="evaluation", title_justify="left")
    for column in ("", "mean [95%]", "n", "length", "flaws"):
        table.add_column(column, justify="left" if column in ("", "flaws") else "right")
    for name, result in results.items():
        table.add_section()
        metric = result.get("metric", "pass@1 (sampled)")
        length = f"{result['completion_length_mean']:.1f}"
        table.add_row(f"{result.get('title') or name}: {metric}", *interval(result["pass_at_1"]), length, flaws(result))
        if result.get("greedy"):
            table.add_row("  greedy", *interval(result["greedy"]), "", "")
        for label, found in result.get("metrics", {}).items():
            table.add_row(f"  {label}", *interval(found), "", "")
        if "contamination" in result:
            found = result["contamination"]
            share = f"{len(found['contaminated'])} of {found['problems']} in the training data"
            table.add_row("  on problems not in the training data", *interval(found["clean"]), "", share)
        kinds = result["by_level"]
        for kind in list(kinds)[:MOST_KINDS] if len(kinds) > 1 else ():
            table.add_row(f"  {kind}", *interval(kinds[kind]), "", "")
        if len(kinds) > MOST_KINDS:
            table.add_row(f"  and {len(kinds) - MOST_KINDS} more in summary.json", "", "", "", "")
    console().print(table)


def console() -> Console:
    """As wide as the terminal; in a file or a pipe wide enough for these tables."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def interval(found: Mapping[str, float] | None) -> tuple[str, str]:
    """("41.0% [35.2%, 47.1%]", "300")."""
    if not found:
        return "-", "0"
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]", f"{found['n']:.0f}"


def flaws(result: Mapping[str, Any]) -> str:
    """What kept completions from being plainly right or wrong, in words; empty where nothing did."""
    counts = result.get("counts", {})
    found = [f"{counts[key]} {label}" for key, label in FLAWS.items() if counts.get(key)]
    return f"{', '.join(found)} (of {counts['completions']})" if found else ""
