"""The preflight on the screen: rows with what has loss, counts, parameters, problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.preflight import PreflightReport, samples
from posttrain.sft_data import IGNORED

SHOWN_ROWS = 2
SHOWN_TOKENS = 400


def show(
    report: PreflightReport, rows: Sequence[Mapping[str, Any]], tokenizer: Any, console: Console | None = None
) -> None:
    """Print the report.

    Args:
        report: from `preflight.inspect_run`.
        rows: packed rows; the first are shown.
        tokenizer: to decode them.
        console: where to; the standard output by default.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    console.print(
        f"the first {min(SHOWN_ROWS, len(rows))} rows; tokens with loss are ⟦marked⟧, │ stands between samples:"
    )
    for row in rows[:SHOWN_ROWS]:
        console.print(row_text(row, tokenizer))
        console.print()
    console.print(facts_table(report.facts))
    console.print(parameter_table(report))
    for warning in report.findings.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    for error in report.findings.errors:
        console.print(Text(f"error: {error}", style="bold red"))


def row_text(row: Mapping[str, Any], tokenizer: Any) -> Text:
    """A row's tokens: those with loss green and in brackets, the others dim; line breaks are shown as ⏎."""
    text, inside = Text(), False
    starts = {start for start, _ in samples(row)} - {0}
    for place, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        if place == SHOWN_TOKENS:
            break
        trained = label != IGNORED
        if inside and (not trained or place in starts):
            text.append("⟧", "green")
        if place in starts:
            text.append(" │ ", "bold")
        if trained and (not inside or place in starts):
            text.append("⟦", "green")
        text.append(tokenizer.decode([token]).replace("\n", "⏎\n"), "green" if trained else "dim")
        inside = trained
    if inside:
        text.append("⟧", "green")
    hidden = len(row["input_ids"]) - SHOWN_TOKENS
    return text.append(f" ... {hidden} tokens more", "dim") if hidden > 0 else text


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Counts and measurements, one a line."""
    table = Table(show_header=False, box=None)
    isolation = facts["isolation"]
    if isolation is None:
        apart = "packing is off"
    elif isolation["skipped"]:
        apart = f"not tested: {isolation['skipped']}"
    else:
        apart = f"one by one {isolation['alone']:.0e}, when the first one changes {isolation['leak']:.0e}"
    memory = facts["memory_bytes"]
    lines = {
        "chats": f"{facts['kept']:,} of {facts['chats']:,} kept",
        "left out": f"{facts['too_long']:,} too long, {facts['untrained']:,} without loss, {facts['duplicates']:,} "
        f"duplicates, {facts['contaminated']:,} contaminated; {facts['truncated']:,} cut off",
        "rows": f"{facts['rows']:,}, {facts['fill']:.1%} full",
        "tokens": f"{facts['tokens']:,}, {facts['trained_share']:.1%} of them have loss",
        "end of turn": f"trained in {facts['end_of_turn_trained_share']:.1%} of the chats",
        "samples apart": apart,
        "memory": f"{sum(memory.values()) / 2**30:.2f} GiB expected ("
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        + f"), {facts['memory_available_bytes'] / 2**30:.1f} GiB free",
    }
    for name, line in lines.items():
        table.add_row(Text(name, "bold"), Text(line))
    return table


def parameter_table(report: PreflightReport) -> Table:
    """What trains, by group."""
    table = Table(title="what trains", title_justify="left")
    for column in ("group", "parameters", "training", "rank"):
        table.add_column(column, justify="left" if column == "group" else "right")
    groups: dict[str, list[Any]] = {}
    for row in report.table:
        groups.setdefault(row.group, []).append(row)
    for group, members in groups.items():
        ranks = sorted({row.rank for row in members if row.rank is not None})
        table.add_row(
            group,
            f"{sum(row.count for row in members):,}",
            f"{sum(row.trainable for row in members):,}",
            ", ".join(map(str, ranks)) or "-",
        )
    table.add_row("all", f"{report.facts['parameters']:,}", f"{report.facts['trainable_parameters']:,}", "")
    return table
