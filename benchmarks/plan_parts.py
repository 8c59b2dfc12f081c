"""The parts of benchmarks/plan.py that run in processes of their own: the machine's ceilings, and one case."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan_cases import CASES, Case
from posttrain.planning.hardware import Calibration, Hardware
from posttrain.planning.learner import memory, sum_bytes
from posttrain.recipe import (
    AlgorithmSection,
    BuildSection,
    GrpoRouterSection,
    LearnerSection,
    ModelSection,
    OptimizerSection,
)
from posttrain.types import Sample

ROWS, WIDTHS = (16, 64, 256, 1024), (64, 128, 256, 512, 1024)
STEPS = 4  # of a case; the first is left out
# Hardly anything, to see what a process that trains takes at least.
LEAST = Case(BuildSection(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2), 1, 32)


def seconds_of(call: Callable[[], Any], least: float = 0.05) -> float:
    """Median seconds of a call, over as many as take `least` seconds."""
    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


Rates = dict[int, dict[int, float]]


def matmul_gflops() -> tuple[Rates, Rates]:
    """Of `linear` forward, and of its backward pass: the gradients of input and weight."""

    def rates(rows: int, width: int) -> tuple[float, float]:
        x, weight, gradient = torch.randn(rows, width), torch.randn(width, width), torch.randn(rows, width)
        work = 2e-9 * rows * width * width
        forward = seconds_of(lambda: torch.nn.functional.linear(x, weight))
        return work / forward, 2 * work / seconds_of(lambda: (gradient @ weight, gradient.t() @ x))

    found = {rows: {width: rates(rows, width) for width in WIDTHS} for rows in ROWS}
    forward, backward = (
        {rows: {width: pair[place] for width, pair in row.items()} for rows, row in found.items()} for place in (0, 1)
    )
    return forward, backward


def pass_gbps() -> float:
    """Products of two arrays of 2 MB into fresh memory, 64 of them kept, as a forward pass keeps them."""
    a, b = torch.randn(512, 1024), torch.randn(512, 1024)
    return 64 * 3 * a.nbytes * 1e-9 / seconds_of(lambda: [a * b for _ in range(64)], 0.5)


def update_gbps() -> float:
    a, b = torch.randn(4_000_000), torch.randn(4_000_000)
    return 3 * a.nbytes * 1e-9 / seconds_of(lambda: a.add_(b, alpha=1e-6), 0.3)


def scores_ns(rates: Rates, backward_rates: Rates) -> tuple[float, float]:
    """Nanoseconds of one attention score beside its products, forward and backward: mask, softmax and what checks them.

    With values shorter than keys, as MLA has them, which sdpa's fused CPU kernel does not take.
    """
    rows, heads, width, keys, values = 4, 6, 256, 96, 32
    q, k = (torch.randn(rows, heads, width, keys, requires_grad=True) for _ in range(2))
    v = torch.randn(rows, heads, width, values, requires_grad=True)
    hidden = torch.ones(width, width, dtype=torch.bool).tril().logical_not()
    mask = torch.zeros(rows, 1, width, width).masked_fill_(hidden, torch.finfo(torch.float32).min)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    with torch.no_grad():
        alone = seconds_of(forward, 0.3)
    both = seconds_of(lambda: forward().sum().backward(), 0.5)
    count = rows * heads * width * width
    plain = {"pass_gbps": 1, "update_gbps": 1, "scores_forward_ns": 1, "scores_backward_ns": 1, "operation_us": 1}
    calibration = Calibration(matmul_gflops=rates, matmul_backward_gflops=backward_rates, **plain)

    def products(backward: bool) -> float:
        work = 2.0 * count * (2 if backward else 1)
        return sum(
            calibration.matmul_seconds(work * size, width, size, width, backward=backward) for size in (keys, values)
        )

    nano = 1e9 / count
    return max(0.1, (alone - products(False)) * nano), max(0.1, (both - alone - products(True)) * nano)


def operation_us() -> float:
    x = torch.randn(4, requires_grad=True)

    def many() -> None:
        y = x
        for _ in range(200):
            y = y * 1.0

    return seconds_of(many) / 200 * 1e6


def sha256_gbps() -> float:
    data = bytes(20_000_000)
    return len(data) * 1e-9 / seconds_of(lambda: hashlib.sha256(data).digest(), 0.1)


def peak_bytes() -> int:
    """Most memory that this process has had in use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not say VmHWM")


def runtime_gb() -> float:
    """What a process that trains takes beside its model. It differs by a tenth between machines, and between a first start
    and a later one: pages of the libraries' files count as far as the system has them at hand.
    """
    with tempfile.TemporaryDirectory() as directory:
        measured = run_case(LEAST, directory)
    bare = Hardware.model_validate(description(0.0, {}))
    return (measured["bytes"] - sum_bytes(memory(LEAST.training(), bare))) * 1e-9


def ceilings() -> dict[str, Any]:
    runtime = runtime_gb()
    rates, backward_rates = matmul_gflops()
    forward, backward = scores_ns(rates, backward_rates)
    calibration = {
        "matmul_gflops": rates,
        "matmul_backward_gflops": backward_rates,
        "pass_gbps": pass_gbps(),
        "update_gbps": update_gbps(),
        "scores_forward_ns": forward,
        "scores_backward_ns": backward,
        "operation_us": operation_us(),
    }
    return description(runtime, calibration)


def description(runtime_gb: float, calibration: dict[str, Any]) -> dict[str, Any]:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    gigabytes = int(total.split()[1]) * 1024 * 1e-9
    rate = max((rate for row in calibration.get("matmul_gflops", {}).values() for rate in row.values()), default=1.0)
    stream = calibration.get("update_gbps", 1.0)
    measured = "measured by benchmarks/plan.py"
    return {
        "name": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "memory_gb": gigabytes,
        "tflops": {"float32": rate * 1e-3, "bfloat16": rate * 1e-3},
        "memory_gbps": stream,
        "node_link_gbps": stream,
        "network_gbps": stream,
        "gpus_per_node": 1,
        "host_memory_gb": gigabytes,
        "host_link_gbps": stream,
        "sha256_gbps": sha256_gbps(),
        "runtime_gb": runtime_gb,
        "training_efficiency": 1.0,
        "prefill_efficiency": 1.0,
        "decode_efficiency": 1.0,
        "link_efficiency": 1.0,
        "layer_overhead_us": 0.0,
        "allocator_gaps": 0.0,
        "sources": {
            "memory_gb": "/proc/meminfo",
            "tflops": f"{measured}; bfloat16 is taken to be no faster",
            "runtime_gb": f"{measured}: a learner of next to nothing",
            "sha256_gbps": measured,
            "allocator_gaps": f"{measured}: glibc, on its case `medium`",
            **dict.fromkeys(("memory_gbps", "node_link_gbps", "network_gbps", "host_link_gbps"), f"{measured}: memory"),
            **dict.fromkeys(
                ("training_efficiency", "prefill_efficiency", "decode_efficiency"), "rates are measured ones"
            ),
        },
        **({"calibration": calibration} if calibration else {}),
    }


def run_case(case: Case, directory: str) -> dict[str, float]:
    """Peak memory of this process, and median seconds of a step."""
    from data.chat import build_tokenizer
    from posttrain.learner import Learner
    from posttrain.model.load import build_policy, save_policy
    from posttrain.packing import pack

    tokenizer = build_tokenizer()
    if not (Path(directory) / "config.json").exists():
        save_policy(build_policy(case.build.model_dump(), tokenizer, seed=0), tokenizer, directory)
    algorithm = AlgorithmSection(beta=0.001 if case.reference else 0.0)
    tokens = case.rows * case.width
    learner = Learner(
        ModelSection(model_name_or_path=directory),
        OptimizerSection(learning_rate=1e-4),
        LearnerSection(
            row_length=case.width, max_tokens_per_microbatch=tokens, gradient_checkpointing=case.checkpointing
        ),
        reference_path=directory if case.reference else None,
        router_section=GrpoRouterSection(),
        temperature=1.0,
        max_completion_length=case.width,
        total_steps=STEPS,
        seed=0,
    )
    samples = samples_of(case, len(tokenizer))
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=tokens, row_length=case.width, pad_token_id=0)
    assert len(batch.microbatches) == case.microbatches
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        learner.score(batch, samples, near_tie_margin=1e-5)
        learner.forward_backward(batch, algorithm)
        learner.optim_step()
        times.append(time.perf_counter() - start)
    return {"bytes": peak_bytes(), "seconds": statistics.median(times[1:])}


def samples_of(case: Case, vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    prompt = case.width // 4
    rows = torch.randint(0, vocabulary, (case.rows * case.microbatches, case.width), generator=generator).tolist()
    zeros = (0.0,) * (case.width - prompt)
    return [
        Sample(
            tuple(row[:prompt]),
            tuple(row[prompt:]),
            zeros,
            (-1.0) ** index,
            None,
            old_logprobs=zeros,
            ref_logprobs=zeros,
        )
        for index, row in enumerate(rows)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("ceilings", "runtime", "case"))
    parser.add_argument("--name", choices=list(CASES))
    parser.add_argument("--directory")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, Callable[[], Any]] = {
        "ceilings": ceilings,
        "runtime": runtime_gb,
        "case": lambda: run_case(CASES[options.name], options.directory),
    }
    print(json.dumps(parts[options.part]()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
