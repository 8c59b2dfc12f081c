"""What a misbehaving reward costs a GRPO run.

    python benchmarks/reward_isolation.py CHECKPOINT [--steps 12]

Runs `recipes/tiny/grpo.yaml` twice from the same SFT checkpoint: with its accuracy reward as it is, and with the same reward
hanging on 5% of calls, crashing on 5% (half by an exception, half by the death of its process), leaking a megabyte and, on
one call in twenty, leaving a process behind. Compared is the time of the loop, after a warm-up step, with that of the
well-behaved reward plus the time limits that hanging calls used up.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.5  # seconds
WILD = """
import os, random, subprocess, sys, time
from rewards.task_answer import score as right

hoard = []
dice = random.SystemRandom()

def score(completion, answer, **metadata):
    hoard.append(bytearray(b"x" * 2**20))
    throw = dice.random()
    if throw < 0.05:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    throw = dice.random()
    if throw < 0.05:
        time.sleep(3600)
    if throw < 0.075:
        raise RuntimeError("an exception")
    if throw < 0.10:
        os._exit(1)
    return right(completion, answer, **metadata)
"""
EVENTS = ("timeout", "crash", "infrastructure", "retried", "restarts", "strays", "recycled")


def run(name: str, func: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One run's figures."""
    rewards = f"rewards=[{{func: '{func}', name: accuracy, timeout_seconds: {LIMIT}}}]"
    words = [
        f"model.model_name_or_path={arguments.checkpoint}",
        f"output_dir={directory / name}",
        f"max_steps={arguments.steps}",
        rewards,
        "eval=null",
        "checkpoint.save_steps=0",
        "algorithm.beta=0",
    ]
    command = [sys.executable, "-m", "posttrain.grpo", "recipes/tiny/grpo.yaml", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    counts = {event: sum(line[f"reward/accuracy/{event}"] for line in lines[1:]) for event in EVENTS}
    seconds = sum(line["time/step"] for line in lines[1:])
    return {
        "steps": len(lines),
        "seconds": round(seconds, 1),
        "seconds_of_limits": round(LIMIT * counts["timeout"], 1),
        "seconds_in_rewards": round(sum(line["time/reward"] for line in lines[1:]), 1),
        "reward_first": lines[0]["reward/mean"],
        "reward_last": lines[-1]["reward/mean"],
        **counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="an SFT checkpoint of recipes/tiny/sft.yaml")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    arguments.checkpoint = Path(arguments.checkpoint).resolve()
    with tempfile.TemporaryDirectory() as place:
        wild = Path(place) / "wild.py"
        wild.write_text(WILD)
        found = {
            "well-behaved": run("good", "rewards.task_answer:score", arguments, Path(place)),
            "misbehaving": run("wild", f"{wild}:score", arguments, Path(place)),
        }
    wild = found["misbehaving"]
    ratio = wild["seconds"] / (found["well-behaved"]["seconds"] + wild["seconds_of_limits"])
    for name, figures in found.items():
        print(name)
        print("".join(f"  {key:<24}{value}\n" for key, value in figures.items()))
    print(json.dumps({"ratio": round(ratio, 3), **found}))


if __name__ == "__main__":
    main()
