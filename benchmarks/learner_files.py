"""Memory of a rank while a learner of several ranks starts and while it saves, against what it keeps.

    python benchmarks/learner_files.py [--ranks 2] [--experts 64] [--layers 4]

A DeepSeek-V3 whose experts are most of it, random, in float32, spread by FSDP2. `keeps` is the memory of a rank when it has
taken a step (weights, optimizer, gradients let go), `starting` and `saving` the most it has while it does so; each beyond the
process itself, the most of all ranks. `policy` is the size of the weights. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.learner_groups import MIB, memory, policy_config, settle


def build(directory: Path, options: argparse.Namespace) -> int:
    """Write the policy. Returns its bytes."""
    from transformers import DeepseekV3ForCausalLM

    from data.chat import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = DeepseekV3ForCausalLM(policy_config(len(tokenizer), 4096, options))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """On this rank."""
    from posttrain.learner import Learner
    from posttrain.packing import pack
    from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
    from posttrain.types import Sample

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    settle()
    start = memory("VmRSS")
    began = time.perf_counter()
    learner = Learner(
        model=ModelSection(model_name_or_path=str(directory / "policy")),
        optimizer=OptimizerSection(),
        learner=LearnerSection(num_workers=options.ranks, parallel="fsdp"),
        reference_path=None,
        router_section=GrpoRouterSection(replay=False),
        temperature=1.0,
        max_completion_length=16,
        total_steps=10,
        seed=0,
    )
    found = {"starting": memory("VmHWM") - start, "start seconds": time.perf_counter() - began}
    samples = [Sample((1, 2, 3), (4, 5), (-1.0, -1.0), (-1.0) ** n, None, old_logprobs=(-1.0, -1.0)) for n in range(4)]
    batch = pack(samples, world_size=options.ranks, max_tokens_per_microbatch=32, row_length=32, pad_token_id=0)[rank]
    learner.forward_backward(batch, AlgorithmSection(beta=0.0))
    learner.optim_step()
    settle()
    found["keeps"] = memory("VmRSS") - start
    began = time.perf_counter()
    learner.save(directory / "saved")
    found |= {"saving": memory("VmHWM") - start, "save seconds": time.perf_counter() - began}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # this is a rank
    options = parser.parse_args()
    if options.directory:
        print(json.dumps(measure(options.directory, options)))
        return
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for name in ("policy", "saved"):
            (directory / name).mkdir()
        policy = build(directory / "policy", options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.learner_files", *sys.argv[1:], "--directory", place],
                env={**os.environ, **shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(options.ranks)
        ]
        outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank failed; see its output above")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    most = {name: max(one[name] for one in found) for name in found[0]} | {"policy": policy}
    values = {name: value / (1 if "seconds" in name else MIB) for name, value in most.items()}
    for name, value in values.items():
        print(f"{name:>14} {value:10,.1f} {'s' if 'seconds' in name else 'MiB'}")
    print(json.dumps({"ranks": options.ranks, **{name: round(value, 1) for name, value in values.items()}}))


if __name__ == "__main__":
    main()
