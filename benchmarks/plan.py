"""Predicted against measured: peak memory and step time of real learners of several sizes on this machine.

    python benchmarks/plan.py [--threads 1] [--write]

First the machine's ceilings are measured: matrix products by size, elementwise passes, softmax, optimizer updates, SHA-256,
and the memory of a process that has loaded everything and trains next to nothing. Then each case runs in a process of its own:
a real `posttrain.learner.Learner` scores a batch, trains on it and takes an optimizer step, four times. The predictions come
from the ceilings and the formulas of posttrain/planning; one number, what the allocator cannot use again, is taken from the
memory of the case `medium`. `--write` puts the table into docs/measured/plan.md and writes
the ceilings beside it, a file for `python -m posttrain.plan --hardware`.

The last line is one JSON object: for each case what was predicted and measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

# ruff: noqa: E402  # a file beside this one would hide the package `rewards`
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.plan_cases import CASES, Case
from posttrain.planning.hardware import Hardware
from posttrain.planning.kernels import step_seconds
from posttrain.planning.learner import memory, sum_bytes
from posttrain.threads import thread_environment

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs/measured"
CEILINGS = MEASURED / "plan_cpu.yaml"
FITTED = "medium"


def run(threads: int, *words: str) -> Any:
    """What a part of this benchmark prints last, in a process of its own."""
    environment = {**os.environ, **thread_environment(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.plan_parts", *words, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1], object_hook=_numbered)


def _numbered(mapping: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are text; those that are sizes become numbers again, and figures are rounded."""
    return {
        int(key) if key.isdigit() else key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in mapping.items()
    }


def predict(case: Case, hardware: Hardware) -> dict[str, float]:
    training = case.training()
    assert hardware.calibration is not None
    seconds = step_seconds(
        training,
        hardware.calibration,
        scored=case.microbatches,
        trained=case.microbatches,
        models=1 + case.reference,
        updates=1,
    )
    return {"bytes": sum_bytes(memory(training, hardware)), "seconds": seconds}


def gaps_of(case: Case, hardware: Hardware, measured: float) -> float:
    """What the allocator leaves unusable, as a share of what a pass allocates: the one number that is fitted to a case."""
    parts = {part.name: part.value for part in memory(case.training(), hardware)}
    return max(0.0, measured - sum(parts.values())) / (parts["activations"] + parts["gradients in passing"])


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| case | parameters | tokens a step | memory predicted | measured | error | step predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, pair in found.items():
        case, ours, theirs = CASES[name], pair["predicted"], pair["measured"]
        errors = {unit: ours[unit] / theirs[unit] - 1 for unit in ("bytes", "seconds")}
        lines.append(
            f"| {name} | {case.training().shape.parameters / 1e6:.1f}M | {case.microbatches * case.rows * case.width:,} "
            f"| {ours['bytes'] / 2**30:.2f} GiB | {theirs['bytes'] / 2**30:.2f} GiB | {errors['bytes']:+.1%} "
            f"| {ours['seconds']:.2f} s | {theirs['seconds']:.2f} s | {errors['seconds']:+.1%} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ceilings", help="a file that was measured before, instead of measuring")
    parser.add_argument("--write", action="store_true", help="write docs/measured/plan.md")
    options = parser.parse_args()
    given = options.ceilings
    ceilings = yaml.safe_load(Path(given).read_text()) if given else run(options.threads, "ceilings")
    measured = {}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as directory:
            measured[name] = run(options.threads, "case", "--name", name, "--directory", directory)
        print(name, measured[name], flush=True)
    if not given and FITTED in measured:
        ceilings["allocator_gaps"] = gaps_of(
            CASES[FITTED], Hardware.model_validate(ceilings), measured[FITTED]["bytes"]
        )
    hardware = Hardware.model_validate(ceilings)
    found = {
        name: {"predicted": predict(CASES[name], hardware), "measured": figures} for name, figures in measured.items()
    }
    print("\n".join(table(found)))
    if options.write:
        CEILINGS.write_text(yaml.safe_dump(ceilings, sort_keys=False))
        path = MEASURED / "plan.md"
        before = path.read_text() if path.exists() else "# Plans, measured\n\n<!-- table -->\n"
        head, _, rest = before.partition("<!-- table -->\n")
        tail = rest.partition("<!-- end -->\n")[2]
        path.write_text("\n".join([head + "<!-- table -->", *table(found), "<!-- end -->", tail]))
    print(json.dumps({"ceilings": ceilings, "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
