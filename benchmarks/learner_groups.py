"""Memory and seconds of a rank when experts or rows are divided over ranks: a forward and backward pass of a packed row.

    python benchmarks/learner_groups.py [--ranks 2] [--tokens 4096] [--experts 64] [--layers 4]

A DeepSeek-V3 whose experts are most of it, random, in float32. Each layout runs in processes of its own. `held` is what a rank
keeps between the passes beyond the process itself, `passing` what the fullest moment of a pass has on top of that: gathered
layers, activations, tokens on their way. The most of all ranks counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Whether all ranks share the experts of a layer, and each row.
LAYOUTS = {
    "neither divided": (False, False),
    "experts divided": (True, False),
    "rows divided": (False, True),
    "both divided": (True, True),
}
MIB = 2**20


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def settle() -> None:
    """Let go of what is free, and forget what the most has been."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def policy_config(vocab_size: int, tokens: int, options: argparse.Namespace) -> Any:
    """Of a DeepSeek-V3 whose experts are most of it, for rows of so many tokens."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=512, moe_intermediate_size=512,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=8, n_routed_experts=options.experts,
        num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=None,
        qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, max_position_embeddings=tokens,
    )  # fmt: skip


def measure(layout: str, options: argparse.Namespace) -> dict[str, float]:
    """On this rank."""
    from accelerate import Accelerator
    from transformers import DeepseekV3ForCausalLM

    from posttrain import learner_parallel
    from posttrain.context_parallel import ContextParallel
    from posttrain.model.token_scorer import TokenScorer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    experts, rows = LAYOUTS[layout]
    settle()
    start = memory("VmRSS")
    model = DeepseekV3ForCausalLM(policy_config(1024, options.tokens, options))
    model.set_experts_implementation("grouped_mm")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    context = ContextParallel(options.ranks, options.ranks, "cpu") if rows else None
    scorer = TokenScorer(model, 512, context)
    learner_parallel.shard(scorer, accelerator, options.ranks if experts else 1)
    # As a learner packs them: a row for each rank, or one that all share.
    ids_RW = torch.randint(
        0, 1024, (1, options.tokens), generator=torch.Generator().manual_seed(accelerator.process_index)
    )
    positions_RW = torch.arange(options.tokens // 4).repeat(4)[None]

    def passes() -> float:
        began = time.perf_counter()
        logprobs_RW, _ = scorer(ids_RW, positions_RW, positions_RW >= 64, 1.0)
        logprobs_RW.sum().backward()
        return time.perf_counter() - began

    passes()  # gradients are there from now on
    settle()
    held = memory("VmRSS")
    seconds = min(passes() for _ in range(options.passes))
    torch.distributed.barrier()
    return {"held_mib": (held - start) / MIB, "passing_mib": (memory("VmHWM") - held) / MIB, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--run", choices=list(LAYOUTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options)))
        return 0
    found = {layout: on_all_ranks(layout, options.ranks) for layout in LAYOUTS}
    for layout, values in found.items():
        print(
            f"{layout:24} held {values['held_mib']:7,.0f} MiB  passing {values['passing_mib']:7,.0f} MiB  "
            f"{values['seconds']:6.2f} s"
        )
    print(json.dumps(found))
    return 0


def on_all_ranks(layout: str, ranks: int) -> dict[str, Any]:
    """The most of what the ranks say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-P", __file__, *sys.argv[1:], "--run", layout]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{layout}: a rank ended with {[process.returncode for process in processes]}")
    values = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(one[name] for one in values) for name in values[0]}


if __name__ == "__main__":
    sys.exit(main())
