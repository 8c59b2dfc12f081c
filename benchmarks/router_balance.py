"""Expert balance with and without the update of the router's correction bias, on a lopsided mixture.

    python benchmarks/router_balance.py [--quick] [--speeds 0 0.001] [--seeds 0 1 2]

Trains `recipes/tiny/balance.yaml` once per speed and seed. Shown are MaxVio over the last fifth of the steps (maximum
expert load / mean load - 1, of the worst layer, over the steps between two log lines), the loss on held-out problems, and
how far vLLM, given the saved checkpoint, chooses the same experts as the learner.

The last line is one JSON object with a list of runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "tiny" / "balance.yaml"


def train(speed: float, seed: int, steps: int | None, directory: Path) -> dict[str, Any]:
    """One run; its figures."""
    words = [f"output_dir={directory}", f"seed={seed}", f"router.bias_update_speed={speed}"]
    if steps is not None:
        words.append(f"training.max_steps={steps}")
    subprocess.run(
        [sys.executable, "-m", "posttrain.sft", str(RECIPE), *words], check=True, cwd=ROOT, stdout=sys.stderr
    )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = lines[-max(1, len(lines) // 5) :]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    return {
        "speed": speed,
        "seed": seed,
        "max_violation": statistics.fmean(line["router/max_violation"] for line in last),
        "validation_loss": losses[-1],
        "routing_agreement": routing_agreement(directory / "checkpoints" / "latest"),
    }


def routing_agreement(checkpoint: Path) -> float:
    """Share of (token, layer) pairs for which vLLM and transformers choose the same set of experts."""
    words = [sys.executable, str(Path(__file__).resolve()), "--compare", str(checkpoint)]
    done = subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def compare(checkpoint: str) -> None:
    """Print the agreement; in a process of its own, for the engine."""
    from posttrain.sampler import Sampler, engine_environment

    os.environ.update(engine_environment(2, 1))
    import torch

    from data.tasks import get_task
    from posttrain.model.load import load_policy, load_tokenizer
    from posttrain.model.router import find_routers, record_routing

    kinds = (("chain_sum", 1), ("letter_counting", 2))
    items = [item for name, level in kinds for item in get_task(name).items(level, "eval", 50, 7)]
    tokenizer = load_tokenizer(checkpoint)
    texts = [tokenizer(f"{item.prompt}{item.worked}")["input_ids"] for item in items]
    sampler = Sampler(
        checkpoint,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=64,
        gpu_memory_utilization=0.5,
        trust_remote_code=False,
        seed=0,
    )
    learner = load_policy(
        checkpoint,
        dtype="float32",
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        trust_remote_code=False,
    )
    same = total = 0
    for tokens, (_, experts_TLK) in zip(texts, sampler.prompt_logprobs(texts), strict=True):
        with torch.no_grad(), record_routing(find_routers(learner)) as trace:
            learner(input_ids=torch.tensor([tokens]))
        ours_TLK = trace.chosen_NLK()[: len(experts_TLK)].sort(dim=-1).values
        theirs_TLK = torch.as_tensor(experts_TLK.astype("int64")).sort(dim=-1).values
        same += int((ours_TLK == theirs_TLK).all(dim=-1).sum())
        total += ours_TLK.shape[0] * ours_TLK.shape[1]
    print(same / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed")
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.0, 0.001])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compare", metavar="CHECKPOINT", help="only the routing agreement of a checkpoint")
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(arguments.compare)
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in seeds:
            for speed in arguments.speeds:
                place = Path(directory) / f"{speed}-{seed}"
                runs.append(train(speed, seed, 60 if arguments.quick else None, place))
    table = Table(title="expert balance on a lopsided mixture")
    for column in ("bias update speed", "seed", "MaxVio", "held-out loss", "routing agreement with vLLM"):
        table.add_column(column, justify="right")
    for run in sorted(runs, key=lambda run: (run["speed"], run["seed"])):
        table.add_row(
            f"{run['speed']:g}",
            str(run["seed"]),
            f"{run['max_violation']:.3f}",
            f"{run['validation_loss']:.4f}",
            f"{run['routing_agreement']:.4%}",
        )
    Console().print(table)
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
