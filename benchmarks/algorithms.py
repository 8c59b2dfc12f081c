"""Does every algorithm learn? Short GRPO runs of the presets from one checkpoint, accuracy before and after.

    python benchmarks/algorithms.py [--model CHECKPOINT] [--steps 30] [--out runs/algorithms] [--only gspo ppo]

The checkpoint is that of the quickstart's SFT (`make quickstart` writes it). All runs have the same prompts, batch and steps;
what differs is the preset and, where a paper's own values are for another scale of steps, the keys below. GRPO, DAPO, GSPO and
PPO run with three seeds, the others with one. A run that is there already is not run again.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SEEDS: dict[str, tuple[int, ...]] = {"grpo": (0, 1, 2), "dapo": (0, 1, 2), "gspo": (0, 1, 2), "ppo": (0, 1, 2)}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "r1": {},
    "dr_grpo": {},
    "dapo": {},
    "rloo": {},
    "reinforce_plus_plus": {},
    "gspo": {},
    "cispo": {},
    "deepseek_v3_2": {},
    "ppo": {"critic": {"optimizer": {"learning_rate": 3e-4}}},
}


def recipe(model: str, name: str, steps: int, seed: int) -> dict[str, Any]:
    minibatches = 1 if name == "rloo" else 2
    return {
        "stage": "grpo",
        "seed": seed,
        "max_steps": steps,
        "model": {"model_name_or_path": model},
        "datasets": [{"task": "letter_counting", "levels": [2, 3], "size": 8000}],
        "rewards": [
            {"func": "rewards.task_answer:score", "name": "accuracy"},
            {"func": "rewards.format:score", "name": "format", "weight": 0.1},
        ],
        "rollout": {"num_prompts": 16, "num_generations": 8, "max_completion_length": 48},
        "algorithm": {"preset": name, "num_minibatches": minibatches},
        "optimizer": {"learning_rate": 1e-4, "adam_beta2": 0.99},
        "eval": {
            "datasets": [{"task": "letter_counting", "levels": [2, 3], "size": 400}],
            "max_completion_length": 48,
            "greedy": False,
        },
        "sampler": {"num_threads": 1},
        "learner": {"num_threads": 1},
        **ALGORITHMS[name],
    }


def run(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and return the summary."""
    summary = out / "summary.json"
    if not summary.exists():
        out.mkdir(parents=True, exist_ok=True)
        file = out / "benchmark.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "posttrain.grpo", str(file), f"output_dir={out.resolve()}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/sft/checkpoints/latest")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--only", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        parser.error(f"{options.model} is no checkpoint; run `make quickstart` first, or give --model")
    model = str(Path(options.model).resolve())
    table = Table("algorithm", "seed", "before", "after", "95%", "seconds")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.only:
        for seed in SEEDS.get(name, (0,)):
            summary = run(options.out / f"{name}-{seed}", recipe(model, name, options.steps, seed))
            before, after = (summary["eval"][when]["pass_at_1"] for when in ("before", "after"))
            found.setdefault(name, []).append({"seed": seed, "before": before, "after": after})
            table.add_row(
                name,
                str(seed),
                f"{before['value']:.1%}",
                f"{after['value']:.1%}",
                f"{after['low']:.1%} to {after['high']:.1%}",
                f"{summary['seconds']:.0f}",
            )
            print(f"{name} {seed}: {before['value']:.1%} -> {after['value']:.1%}", flush=True)
    Console().print(table)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
