"""Two evaluations of the same problems, side by side and paired.

python -m eval compare runs/a runs/b [--json]
python -m eval compare runs/a:before runs/a:after         one evaluation of each run, whatever it is called

Each run's samples/eval-*.parquet are read; problems pair by suite, mode and id. A p-value below 0.05 says that chance alone
would rarely make such a difference; of twenty comparisons one does so by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.statistics import Comparison, compare_paired

Key = tuple[str, str]  # suite and mode


@dataclass(frozen=True, slots=True)
class PairedRow:
    """One line of the table."""

    suite: str
    mode: str  # sampled, greedy or lm_eval
    kind: str  # a part of the suite; "" is all of it
    comparison: Comparison
    only_first: int  # problems that only one of the runs has
    only_second: int


def compare_runs(first: str | Path, second: str | Path) -> list[PairedRow]:
    """Every suite that both runs have, as a whole and by kind.

    Args:
        first, second: run directories; "directory:suite" takes one suite, and what it is called does not matter then.

    Raises:
        ValueError: a run without evaluation samples, no suite in common, or a problem whose text or reference differs.
    """
    one, two = _problems(str(first)), _problems(str(second))
    rows = []
    for key in one:
        if key not in two:
            continue
        shared = [name for name in one[key] if name in two[key]]
        if not shared:
            continue
        for name in shared:
            _check_same(one[key][name], two[key][name], name)
        only = (len(one[key]) - len(shared), len(two[key]) - len(shared))
        kinds: dict[str, list[str]] = defaultdict(list)
        for name in shared:
            kinds[one[key][name]["kind"]].append(name)
        groups = {"": shared, **(kinds if len(kinds) > 1 else {})}
        for kind, names in groups.items():
            found = compare_paired(
                [one[key][name]["scores"] for name in names],
                [two[key][name]["scores"] for name in names],
                clusters=[one[key][name]["cluster"] or name for name in names],
            )
            rows.append(PairedRow(*key, kind, found, *(only if not kind else (0, 0))))
    if not rows:
        raise ValueError(
            f"{first} and {second} share no problem: {_suites(one)} and {_suites(two)}; evaluate both with the same recipe"
        )
    return rows


def _problems(run: str) -> dict[Key, dict[str, dict[str, Any]]]:
    """(suite, mode) -> prompt id -> its text, reference, kind, cluster and scores."""
    import pyarrow.parquet as pq

    directory, _, chosen = (run, "", "") if Path(run).exists() else run.rpartition(":")
    files = sorted((Path(directory) / "samples").glob(f"eval-{chosen or '*'}.parquet"))
    if not files:
        known = [file.stem.removeprefix("eval-") for file in (Path(directory) / "samples").glob("eval-*.parquet")]
        cure = f"it has {', '.join(sorted(known))}" if known else "make one with python -m eval"
        raise ValueError(f"{run} holds no evaluation: no samples/eval-{chosen or '*'}.parquet; {cure}")
    found: dict[Key, dict[str, dict[str, Any]]] = defaultdict(dict)
    for file in files:
        for row in pq.read_table(file).to_pylist():
            problems = found["chosen" if chosen else file.stem.removeprefix("eval-"), row["mode"]]
            problem = problems.setdefault(
                row["prompt_id"],
                {
                    "text": (row["prompt"], row["answer"]),
                    "kind": row["kind"],
                    "cluster": row.get("cluster"),
                    "scores": [],
                },
            )
            problem["scores"].append(row["score"])
    return found


def _check_same(one: Mapping[str, Any], two: Mapping[str, Any], name: str) -> None:
    if one["text"] != two["text"]:
        raise ValueError(
            f"problem {name!r} is not the same in both runs: {one['text'][0]!r:.80} and {two['text'][0]!r:.80}; evaluate "
            f"both with the same recipe and data"
        )


def _suites(problems: Mapping[Key, Any]) -> str:
    return ", ".join(f"{suite} ({mode})" for suite, mode in problems)


def show(rows: Sequence[PairedRow], first: str, second: str) -> None:
    """The table on the console."""
    from rich.table import Table

    from eval.tables import console

    table = Table(title=f"{first} -> {second}, paired by problem", title_justify="left")
    for column in ("", "first", "second", "difference [95%]", "p", "n", "better / worse"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        found = row.comparison
        if not row.kind:
            table.add_section()
        table.add_row(
            f"  {row.kind}" if row.kind else f"{row.suite} ({row.mode})",
            f"{found.first:.1%}",
            f"{found.second:.1%}",
            f"{found.difference:+.1%} [{found.low:+.1%}, {found.high:+.1%}]",
            f"{found.p_value:.2g}",
            str(found.n),
            f"{found.better} / {found.worse}",
        )
    console().print(table)
    for row in rows:
        if row.only_first or row.only_second:
            print(
                f"{row.suite} ({row.mode}): left out: {row.only_first} and {row.only_second} problems of one run only"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval compare", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("first", help="run directory of the first evaluation, or directory:suite")
    parser.add_argument("second", help="the same of the second")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args(argv)
    try:
        rows = compare_runs(options.first, options.second)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        for row in rows:
            print(json.dumps({"suite": row.suite, "mode": row.mode, "kind": row.kind, **row.comparison.to_dict()}))
    else:
        show(rows, options.first, options.second)
    return 0


if __name__ == "__main__":
    sys.exit(main())
