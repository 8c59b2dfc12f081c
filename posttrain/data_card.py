"""The data card: what a dataset was made of and what was left out on the way, for people (Markdown) and programs (JSON)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from data.clean import EXAMPLES
from posttrain.disk import write_atomically
from posttrain.distill_data import Problem
from posttrain.distill_output import RowWriter, sha256
from posttrain.selection import REASONS, Answer, Funnel

if TYPE_CHECKING:
    from posttrain.distill_job import DistillJob


@dataclass
class Counts:
    """What is counted while answers are decided about."""

    funnel: Funnel = field(default_factory=Funnel)
    kinds: dict[str, Funnel] = field(default_factory=lambda: defaultdict(Funnel))
    rows: Counter[str] = field(default_factory=Counter)  # kind of row -> rows
    versions: dict[str, None] = field(default_factory=dict)  # of the teachers, in the order they came

    def add(self, problem: Problem, answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> None:
        """The answers of one prompt, decided, and its rows for SFT."""
        self.funnel.add(answers)
        self.kinds[problem.kind].add(answers)
        self.rows.update(row["row_kind"] for row in rows)
        self.versions.update(dict.fromkeys(answer.generation.teacher_version for answer in answers))


def make_card(job: DistillJob, counts: Counts, file: Path, pairs: RowWriter | None = None) -> dict[str, Any]:
    """The card as JSON.

    Args:
        job: whose answers were counted.
        counts: of all of them.
        file: the dataset.
        pairs: what wrote the preference pairs, where there are any.
    """
    recipe, teacher, problems = job.recipe, job.teacher, job.problems
    return {
        "name": recipe.run_name,
        "seed": recipe.seed,
        "teacher": {
            "kind": teacher.kind,
            "name": teacher.name,
            "versions": list(counts.versions),
            "sampling": dict(teacher.sampling),
            "system_prompt": recipe.generation.system_prompt,
        },
        "rewards": [{"name": reward.label, "func": reward.func, "weight": reward.weight} for reward in recipe.rewards],
        "rejection": recipe.rejection.model_dump(mode="json"),
        "selection": recipe.selection.model_dump(mode="json"),
        "prompts": {**problems.counts, "asked": len(problems.asked), **_answered(counts.funnel)},
        "samples": {
            "requested": job.num_samples,
            "generated": counts.funnel.generated,
            "without_answer": job.num_samples - counts.funnel.generated,
            "failures": dict(list(job.failures.items())[:EXAMPLES]),
        },
        "funnel": funnel_of(counts.funnel),
        "kinds": {kind: kind_row(funnel) for kind, funnel in sorted(counts.kinds.items())},
        "rows": dict(counts.rows),
        "usage": job.usage(),
        "file": {"name": file.name, "rows": counts.rows.total(), "sha256": sha256(file)},
        "pairs": {"name": pairs.path.name, "rows": pairs.count, "sha256": sha256(pairs.path)} if pairs else None,
        "contaminated": [asdict(example) for example in problems.contaminated[:EXAMPLES]],
    }


def _answered(funnel: Funnel) -> dict[str, int]:
    return {name: count for name, count in funnel.prompts.items() if name != "all"}


def show(card: Mapping[str, Any]) -> None:
    """The funnel on the console."""
    table = Table(title="answers", title_justify="left")
    for name in ("", "left", "share", "removed"):
        table.add_column(name, justify="right" if name else "left")
    for row in _funnel_rows(card):
        table.add_row(*map(_cell, row))
    Console().print(table)


def funnel_of(funnel: Funnel) -> dict[str, Any]:
    """A funnel as JSON."""
    return {
        "steps": funnel.steps(),
        "reasons": {
            reason: {"first": funnel.first[reason], "any": funnel.any[reason]}
            for reason in REASONS
            if funnel.any[reason]
        },
        "prompts": dict(funnel.prompts),
    }


def kind_row(funnel: Funnel) -> dict[str, int]:
    """The numbers of one kind of prompt, for the table."""
    return {
        "prompts": funnel.prompts["all"],
        "generated": funnel.generated,
        "judged": funnel.left_after("unjudged"),
        "correct": funnel.left_after("correctness"),
        "kept": funnel.kept,
        "prompts_with_a_kept_answer": funnel.prompts["with_a_kept_answer"],
    }


def write_card(directory: Path, card: Mapping[str, Any]) -> list[Path]:
    """data_card.json and data_card.md."""
    write_atomically(directory / "data_card.json", json.dumps(card, indent=2))
    write_atomically(directory / "data_card.md", markdown(card))
    return [directory / "data_card.md", directory / "data_card.json"]


def markdown(card: Mapping[str, Any]) -> str:
    """The card as text."""
    teacher, usage = card["teacher"], card["usage"]
    lines = [
        f"# {card['name']}",
        "",
        f"{sum(card['rows'].values()):,} chats for SFT, distilled from {teacher['name']}. Made by "
        f"`python -m posttrain.distill`; recipe.yaml beside this file makes it again.",
        "",
        "| | |",
        "|---|---|",
        *_pairs(
            {
                "teacher": f"{teacher['kind']}: {teacher['name']}",
                "version": ", ".join(f"`{version}`" for version in teacher["versions"]) or "unknown",
                "sampling": ", ".join(f"{key} {value}" for key, value in teacher["sampling"].items() if value != {}),
                "system prompt": teacher["system_prompt"] or "none",
                "seed": card["seed"],
                "rewards": ", ".join(f"{r['name']} ({r['func']})" for r in card["rewards"]) or "none",
                "file": f"`{card['file']['name']}`, SHA-256 `{card['file']['sha256']}`",
                "tokens": f"{usage['prompt_tokens']:,} read, {usage['completion_tokens']:,} written",
                **({"cost": f"{usage['cost']:.6g}"} if usage["cost"] is not None else {}),
            }
        ),
        "",
        "## Prompts",
        "",
        *_table(("", "prompts"), [(name.replace("_", " "), count) for name, count in card["prompts"].items()]),
        "",
        "## Funnel",
        "",
        *_table(("answers", "left", "share", "removed"), _funnel_rows(card)),
        "",
        f"{card['samples']['requested']:,} answers were asked for, {card['samples']['without_answer']:,} of them got none.",
        "",
        "## Reasons",
        "",
        *_table(
            ("reason", "first", "applies to"),
            [(reason, counts["first"], counts["any"]) for reason, counts in card["funnel"]["reasons"].items()],
        ),
        "",
        "## By kind of prompt",
        "",
        *_table(
            ("", *(name.replace("_", " ") for name in next(iter(card["kinds"].values()), {}))),
            [(kind, *row.values()) for kind, row in card["kinds"].items()],
        ),
        "",
        "## Rows",
        "",
        *_table(("kind", "rows"), list(card["rows"].items())),
    ]
    if card["pairs"] is not None:
        file = card["pairs"]
        lines += ["", f"Beside them {file['rows']:,} preference pairs: `{file['name']}`, SHA-256 `{file['sha256']}`."]
    if card["contaminated"]:
        lines += [
            "",
            "## Contaminated prompts",
            "",
            f"All {card['prompts']['contaminated']:,} are in `contaminated.jsonl`. The first:",
            "",
            *_table(
                ("prompt", "found", "evaluation problem"),
                [(example["id"], example["text"], example["problem"]) for example in card["contaminated"]],
            ),
        ]
    return "\n".join(lines) + "\n"


def _funnel_rows(card: Mapping[str, Any]) -> list[tuple[str, int, str, int]]:
    """Without the steps that removed nothing, but for the main ones."""
    total = card["samples"]["generated"]
    return [
        (step["step"], step["left"], f"{step['left'] / total:.1%}" if total else "-", step["removed"])
        for step in card["funnel"]["steps"]
        if step["removed"] or step["step"] in ("generated", "judged", "correct", "kept")
    ]


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"| {name} | {_cell(value)} |" for name, value in values.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
