"""What asynchrony brings: GRPO with rollout.max_lag 0 and 1 on two cores, one for the sampler and one for the learner.

    python benchmarks/overlap.py [--model CHECKPOINT] [--steps 30]

Generation and learning are made about equally long by sampler.max_num_seqs, which lets the sampler decode in turns. From the
run without lag come the seconds of generation and of learning alone, each with the core that it has in the other run too. Both
runs evaluate the same held-out problems at the end. The first two steps are left out of the times.

The last line is one JSON object: step_over_longer, samples_per_second_ratio, and the parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
WARMUP = 2


def recipe(model: str, steps: int, lag: int, max_num_seqs: int, *, in_flight: bool) -> dict[str, Any]:
    return {
        "stage": "grpo",
        "max_steps": steps,
        "model": {"model_name_or_path": model},
        "datasets": [{"task": "letter_counting", "levels": [2, 3], "size": 8000}],
        "rewards": [{"func": "rewards.task_answer:score", "name": "accuracy"}],
        "rollout": {
            "num_prompts": 16,
            "num_generations": 16,
            "max_completion_length": 48,
            "max_lag": lag,
            "in_flight_updates": in_flight,
        },
        "algorithm": {"beta": 0.0, "num_minibatches": 2, "importance": "truncate"},
        "optimizer": {"learning_rate": 1e-4, "adam_beta2": 0.99},
        "sampler": {"num_threads": 1, "max_num_seqs": max_num_seqs},
        "learner": {"num_threads": 1},
        "eval": {
            "datasets": [{"task": "letter_counting", "levels": [2, 3], "size": 400}],
            "max_completion_length": 48,
            "greedy": False,
        },
    }


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        (out / "recipe.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "posttrain.grpo", str(out / "recipe.yaml"), f"output_dir={out / 'run'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()][WARMUP:]
        summary = json.loads((out / "run" / "summary.json").read_text())
    seconds = {
        name: statistics.median(line[f"time/{name}"] for line in lines)
        for name in ("rollout", "learn", "publish", "step")
    }
    return {
        "seconds": seconds,
        "samples_per_second": statistics.median(line["throughput/samples_per_second"] for line in lines),
        "lag_mean": statistics.fmean(line["lag/mean"] for line in lines),
        "accuracy": summary["eval"]["after"]["pass_at_1"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/sft/checkpoints/latest")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-num-seqs", type=int, default=96)
    parser.add_argument("--in-flight", action="store_true", help="publish while the sampler generates")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        parser.error(f"{options.model} is no checkpoint; run `make quickstart` first, or give --model")
    model = str(Path(options.model).resolve())
    turns = measured(recipe(model, options.steps, 0, options.max_num_seqs, in_flight=False))
    overlapped = measured(recipe(model, options.steps, 1, options.max_num_seqs, in_flight=options.in_flight))
    longer = max(turns["seconds"]["rollout"], turns["seconds"]["learn"])
    print(
        json.dumps(
            {
                "step_over_longer": overlapped["seconds"]["step"] / longer,
                "samples_per_second_ratio": overlapped["samples_per_second"] / turns["samples_per_second"],
                "in_turns": turns,
                "overlapped": overlapped,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
