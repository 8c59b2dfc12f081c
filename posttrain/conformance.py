"""Does a policy loss give the same gradient however its samples are laid out?

    python -m posttrain.conformance [PRESET or module:function ...] [--ranks 1 2]

Trainers have shipped gradients that were half or four times what they should be, because a mean was taken over a microbatch
and not over the minibatch. Here one minibatch of a tiny DeepSeek-V3 is laid out in many ways (microbatches of one sample
and of all, other orders, wide and narrow rows, side by side and end to end, several ranks), and every gradient is
compared with that of the samples one by one. Without arguments all presets are checked.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from posttrain.algorithms import PRESETS
from posttrain.recipe import (
    AlgorithmSection,
    BuildSection,
    GrpoRouterSection,
    LearnerSection,
    ModelSection,
    OptimizerSection,
)
from posttrain.types import Sample

TOLERANCE = 1e-5  # relative, of the norm of a parameter's gradient
# Prompt and completion of each sample; prompts of the same length are the same prompt.
LENGTHS = ((3, 7), (5, 2), (2, 11), (3, 4), (6, 9), (2, 3), (7, 1), (3, 5))
LONGEST = 16
ROW = 24
POLICY = BuildSection(
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=64,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay out a minibatch: the order of its samples, and `posttrain.packing.pack`'s settings."""

    name: str
    order: int  # seed; 0 is the order given
    settings: Mapping[str, Any]


LAYOUTS = (
    Layout("one by one", 0, {"max_tokens_per_microbatch": ROW, "row_length": ROW, "samples_per_row": 1}),
    Layout("all side by side", 0, {"max_tokens_per_microbatch": 999, "row_length": ROW, "samples_per_row": 1}),
    Layout("all packed", 0, {"max_tokens_per_microbatch": 999, "row_length": ROW}),
    Layout("packed, microbatches of a row", 0, {"max_tokens_per_microbatch": ROW, "row_length": ROW}),
    Layout("in one long row", 0, {"max_tokens_per_microbatch": 999, "row_length": 96}),
    Layout("another order, packed", 1, {"max_tokens_per_microbatch": 2 * ROW, "row_length": ROW}),
    Layout("another order, one by one", 2, {"max_tokens_per_microbatch": ROW, "row_length": ROW, "samples_per_row": 1}),
    Layout("prompts shared", 0, {"max_tokens_per_microbatch": 999, "row_length": ROW, "share_prompts": True}),
    Layout(
        "another order, prompts shared, microbatches of a row",
        1,
        {"max_tokens_per_microbatch": ROW, "row_length": ROW, "share_prompts": True},
    ),
    Layout("two samples to a row", 3, {"max_tokens_per_microbatch": 40, "row_length": 40, "samples_per_row": 2}),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """How far a layout's gradient is from that of the samples one by one."""

    loss: str
    layout: str
    error: float  # the largest over the parameters, relative

    @property
    def is_equal(self) -> bool:
        return self.error <= TOLERANCE


def check(sections: Mapping[str, AlgorithmSection], ranks: Sequence[int] = (1, 2)) -> list[Finding]:
    """Compare the gradients of all layouts.

    Args:
        sections: name -> algorithm.
        ranks: numbers of processes (gloo); 1 must be among them, it is what others are compared with.

    Raises:
        ValueError: `ranks` without 1.
    """
    if 1 not in ranks:
        raise ValueError(f"ranks={list(ranks)} must hold 1, with which the others are compared")
    findings = []
    with tempfile.TemporaryDirectory() as place:
        save_tiny_policy(Path(place))
        found = {count: _in_processes(count, place, sections) for count in sorted(ranks)}
    for name in sections:
        expected = found[1][name][LAYOUTS[0].name]
        for count, gradients in found.items():
            for layout, gradient in gradients[name].items():
                label = layout if count == 1 else f"{layout}, {count} ranks"
                findings.append(Finding(name, label, _distance(gradient, expected)))
    return findings


def save_tiny_policy(path: Path) -> None:
    """Write a tiny DeepSeek-V3 with random weights."""
    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, save_policy

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    save_policy(build_policy(POLICY.model_dump(), tokenizer, seed=0), tokenizer, path)


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Random samples under policies that differ, so that ratios are clipped on both sides."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    prompts: dict[int, list[int]] = {}
    for prompt, completion in LENGTHS[:count]:
        ids = torch.randint(4, 100, (prompt + completion,), generator=generator).tolist()
        ids[:prompt] = prompts.setdefault(prompt, ids[:prompt])
        old, sampler, ref = (-4.6 + 0.3 * torch.randn(3, completion, generator=generator)).tolist()
        found.append(
            Sample(
                tuple(ids[:prompt]),
                tuple(ids[prompt:]),
                tuple(sampler),
                float(torch.randn((), generator=generator)),
                old_logprobs=tuple(old),
                ref_logprobs=tuple(ref),
            )
        )
    return found


Gradients = dict[str, dict[str, dict[str, torch.Tensor]]]  # loss -> layout -> parameter -> gradient


def _in_processes(count: int, path: str, sections: Mapping[str, AlgorithmSection]) -> Gradients:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        calls = [pool.submit(_one_rank, rank, count, port, path, dict(sections)) for rank in range(count)]
        found = [call.result() for call in calls]
        return found[0]


def _one_rank(rank: int, count: int, port: int, path: str, sections: Mapping[str, AlgorithmSection]) -> Gradients:
    """The gradients of every loss in every layout, on one rank; all ranks hold the same afterwards."""
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    from posttrain.learner import Learner

    learner = Learner(
        ModelSection(model_name_or_path=path, experts_implementation="eager"),
        OptimizerSection(learning_rate=1e-3),
        LearnerSection(share_prompts=True),  # which a batch makes use of or not
        reference_path=None,
        router_section=GrpoRouterSection(),
        temperature=1.0,
        max_completion_length=LONGEST,
        total_steps=1,
        seed=0,
    )
    return {
        name: {layout.name: _gradient(learner, layout, section, rank, count) for layout in LAYOUTS}
        for name, section in sections.items()
    }


def _gradient(
    learner: Any, layout: Layout, section: AlgorithmSection, rank: int, count: int
) -> dict[str, torch.Tensor]:
    from posttrain.packing import pack

    samples = make_samples(len(LENGTHS))
    if layout.order:
        samples = random.Random(layout.order).sample(samples, len(samples))
    # A loss of another policy's samples needs ratios near 1, whatever the tiny policy's own logprobs are.
    own = learner.score(
        pack(samples, world_size=1, max_tokens_per_microbatch=999, row_length=ROW, pad_token_id=0)[0],
        samples,
        near_tie_margin=0.0,
    ).logprobs
    samples = [_near(sample, own[index]) for index, sample in enumerate(samples)]
    learner.drop_gradients()
    batch = pack(samples, world_size=count, pad_token_id=0, **layout.settings)[rank]
    learner.forward_backward(batch, section)
    found: dict[str, torch.Tensor] = learner.gradients()
    return found


def _near(sample: Sample, own: Sequence[float]) -> Sample:
    """The sample with its policies' logprobs moved to where the learner's are."""

    def moved(values: Sequence[float] | None) -> tuple[float, ...]:
        return tuple(value + 4.6 + mine for value, mine in zip(values or (), own, strict=True))

    return replace(
        sample,
        sampler_logprobs=moved(sample.sampler_logprobs),
        old_logprobs=moved(sample.old_logprobs),
        ref_logprobs=moved(sample.ref_logprobs),
    )


def _distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    # Relative to the whole gradient's scale too: a parameter that hardly matters is all rounding.
    whole = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    return max(
        float((found[name] - gradient).norm() / max(float(gradient.norm()), 1e-3 * whole, 1e-12))
        for name, gradient in expected.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.conformance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("losses", nargs="*", default=list(PRESETS), help="presets, policy losses or module:function")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    options = parser.parse_args(arguments)
    try:
        sections = {
            name: AlgorithmSection.model_validate(
                name if name in PRESETS else {"policy_loss": name, "num_minibatches": 1}
            )
            for name in options.losses
        }
        findings = check(sections, options.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("loss", "layouts", "largest difference", "")
    for name in sections:
        own = [finding for finding in findings if finding.loss == name]
        bad = [finding.layout for finding in own if not finding.is_equal]
        worst = max(finding.error for finding in own)
        table.add_row(name, str(len(own)), f"{worst:.1e}", f"differs: {'; '.join(bad)}" if bad else "equal")
    Console().print(table)
    failed = [finding for finding in findings if not finding.is_equal]
    if failed:
        print("a loss must return the loss of each token; what it is divided by is decided for the whole minibatch")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
