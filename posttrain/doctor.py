"""Is this machine fit for posttrain, and for this recipe? One line for each thing looked at, with its cure.

    python -m posttrain.doctor [recipe.yaml [key.path=value ...]] [--quick]

Without --quick it also starts what a run starts, each in a process of its own: Ray, a tiny policy in vLLM that is compared
with transformers token by token, and the sandbox; about half a minute. Nothing is installed, downloaded or left
behind.

Exit codes: 0 nothing is in the way (there may be warnings), 1 something fails, 2 a command line that cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain.doctor_machine import Finding, disk, gpu, machine, packages, ray_network
from posttrain.doctor_probes import probes
from posttrain.doctor_stage import examine, read
from posttrain.redaction import redact


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.doctor", description="is this machine fit for posttrain, and for this recipe?"
    )
    parser.add_argument("recipe", nargs="?", help="a recipe, whose files, memory and disk are looked at as well")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--quick", action="store_true", help="start nothing: neither Ray nor vLLM nor the sandbox")
    options = parser.parse_args(argv)
    wrong = [word for word in options.overrides if "=" not in word]
    if wrong or (options.recipe or "").endswith("=") or "=" in (options.recipe or ""):
        parser.error("give one recipe file; a change to it is written key.path=value")
    return report(diagnose(options.recipe, options.overrides, quick=options.quick))


def diagnose(path: str | None, overrides: Sequence[str] = (), *, quick: bool = False) -> Iterable[Finding]:
    """What is found, each as soon as it is known.

    Args:
        path: of a recipe; None looks at the machine alone.
        overrides: of the recipe.
        quick: start nothing.
    """
    yield from machine()
    yield from packages()
    yield gpu()
    yield from ray_network()
    recipe, findings = read(path, overrides) if path is not None else (None, [])
    yield from findings
    yield from disk(recipe.run_dir if recipe else Path("runs"))
    if recipe is not None:
        yield from examine(recipe)
    if not quick:
        yield from probes(recipe)


def report(findings: Iterable[Finding]) -> int:
    """Print the findings and what they come to. Returns the exit code."""
    counts = {"ok": 0, "warn": 0, "fail": 0}
    for finding in findings:
        counts[finding.level] += 1
        cure = f"; {finding.cure}" if finding.cure else ""
        print(redact(f"{finding.level:<5} {finding.name:<13} {finding.text}{cure}"), flush=True)
    print(f"\n{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
