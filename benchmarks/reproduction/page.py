"""docs/measured/reproduction.md from the tables of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.reproduction.runs import read_json, total_seconds
from benchmarks.reproduction.tables import Table

NOTES = Path(__file__).with_name("notes.md")
INTRODUCTION = """# DeepSeek-R1 in miniature, measured

`make reproduce` runs `recipes/tiny/r1.yaml` and writes this page: R1's stages (cold start, reasoning RL, rejection sampling,
SFT, RL for all scenarios), R1-Zero, and what the papers compare them with, on tiny DeepSeek-V3 policies that count letters.
Each question is asked in Chinese or in Korean, and reasoning is to be in the same language. Base models are trained from
random weights on answers of which most are direct and often careless and a third is worked out, in mixed languages.

{machine}

Figures are of {problems} held-out problems, sampled once at temperature 1 unless greedy is said, with 95% intervals: Wilson's
for shares of one answer each, else a bootstrap over problems. Differences are of the same problems (paired bootstrap). Each
training was run once, with seed {seed}: what another seed would give is not in the intervals. The sentences below the tables
are computed from the figures: "holds" means that the interval of the difference is on the claim's side of zero.
"""


def page(run_dir: Path, tables: Sequence[Table], drawings: Mapping[str, Path]) -> str:
    """The page's Markdown."""
    summary = read_json(run_dir / "summary.json")
    stages = list(summary["stages"])
    environment = read_json(run_dir / "environment.json")
    seconds = total_seconds(run_dir, stages)
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    gpus = f"{len(environment['gpus'])} GPUs" if environment["gpus"] else "no GPU"
    machine = (
        f"{environment['processor_count']} CPU cores, {gpus}, Python {environment['python']}, {packages}. All stages "
        f"together took {sum(seconds.values()) / 60:.0f} minutes."
    )
    problems = summary["stages"]["zero"]["eval"]["after"]["pass_at_1"]["n"]
    parts = [INTRODUCTION.format(machine=machine, problems=problems, seed=environment["seed"])]
    for table in tables:
        parts.append(f"## ({table.letter}) {table.title}\n\nThe papers: {table.claim}\n")
        parts.append(markdown(table.header, table.rows))
        if table.letter in drawings:
            parts.append(f"![{table.title}]({drawings[table.letter].name})\n")
        parts.append(f"{table.sentence}\n")
    parts.append("## Time\n")
    parts.append(markdown(("stage", "seconds"), [(name, f"{value:.0f}") for name, value in seconds.items()]))
    parts.append(NOTES.read_text(encoding="utf-8"))
    return "\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
