"""DeepSeek-R1's stages in miniature, and the page that says what came of them: docs/measured/reproduction.md.

    python -m benchmarks.reproduction [--tables-only] [--run-dir runs/r1] [--out docs/measured]

Runs recipes/tiny/r1.yaml (under an hour on two quiet cores; finished stages are not run again), then writes the tables, with
the drawings beside them. `--tables-only` writes them from a run that is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.reproduction.page import page
from benchmarks.reproduction.plots import draw_all
from benchmarks.reproduction.tables import all_tables
from posttrain.disk import write_atomically

RECIPE = "recipes/tiny/r1.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tables-only", action="store_true", help="run nothing, write the page anew")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/r1"))
    parser.add_argument("--out", type=Path, default=Path("docs/measured"))
    options = parser.parse_args()
    if not options.tables_only:
        command = [sys.executable, "-m", "posttrain.pipeline", RECIPE, f"output_dir={options.run_dir}"]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    elif not (options.run_dir / "summary.json").exists():
        parser.error(f"{options.run_dir} holds no finished run of {RECIPE}; leave out --tables-only")
    tables = all_tables(options.run_dir)
    out = options.out / "reproduction.md"
    text = page(options.run_dir, tables, draw_all(options.run_dir, options.out))
    write_atomically(out, text)
    for table in tables:
        print(f"({table.letter}) {table.sentence}\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
