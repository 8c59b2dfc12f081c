"""Experts divided over ranks compute what they compute together: outputs and gradients, whatever kernels and router."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_learner_parallel import free_port, on_processes
from test_sampler_layout import recipe
from torch.distributed.device_mesh import init_device_mesh
from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from posttrain import expert_parallel
from posttrain.cli import check_recipe
from posttrain.dry_run import describe
from posttrain.recipe import LearnerSection

RANKS, TOKENS, EXPERTS, CHOSEN, HIDDEN = 2, 24, 4, 2, 16
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN}


def experts(kind: str, implementation: str) -> Any:
    """A layer's experts, the same on every rank."""
    made: dict[str, Any] = {
        "deepseek": lambda: DeepseekV3Experts(DeepseekV3Config(**SIZES, n_routed_experts=EXPERTS, moe_intermediate_size=8)),
        "qwen": lambda: Qwen3MoeExperts(Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=8)),
        "gpt_oss": lambda: GptOssExperts(GptOssConfig(**SIZES, num_local_experts=EXPERTS, intermediate_size=8)),
    }  # fmt: skip
    module = made[kind]()
    generator = torch.Generator().manual_seed(0)
    for tensor in module.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator)
    module.config._experts_implementation = implementation
    return module


def inputs(rank: int, routing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a rank, the experts that its router chose, their weights, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(1 + rank)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    if routing == "spread":
        chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(CHOSEN).indices
    else:  # to the first rank's experts alone
        chosen = torch.tensor([[1, 0]]).expand(TOKENS, CHOSEN)
    return (
        hidden,
        chosen,
        torch.rand(TOKENS, CHOSEN, generator=generator),
        torch.randn(TOKENS, HIDDEN, generator=generator),
    )


def run(module: Any, rank: int, routing: str, cast: bool) -> list[torch.Tensor]:
    """What comes out, and the gradients of what went in."""
    hidden, chosen, weights, gradient = inputs(rank, routing)
    hidden.requires_grad_()
    weights.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        found = module(hidden, chosen, weights)
    assert found.dtype == hidden.dtype
    found.backward(gradient)
    assert hidden.grad is not None and weights.grad is not None
    return [found.detach(), hidden.grad, weights.grad]


def divided(rank: int, port: int, cases: list[tuple[str, str, str, bool]]) -> list[dict[str, Any]]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("spread", "experts"))
    found = []
    for kind, implementation, routing, cast in cases:
        module = experts(kind, implementation)
        held = expert_parallel.spread(torch.nn.Sequential(module), mesh)
        assert held == set(module.parameters())
        tensors = run(module, rank, routing, cast)
        locals_ = {name: p.to_local().numel() for name, p in module.named_parameters()}
        gradients = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
        found.append(
            {
                "tensors": [t.numpy() for t in tensors],
                "held": locals_,
                "gradients": {n: g.numpy() for n, g in gradients.items()},
            }
        )
    torch.distributed.destroy_process_group()
    return found


CASES = [
    ("deepseek", "eager", "spread", False),
    ("deepseek", "grouped_mm", "spread", False),
    ("deepseek", "batched_mm", "spread", False),
    ("deepseek", "eager", "first rank only", False),
    ("deepseek", "grouped_mm", "first rank only", False),
    ("deepseek", "eager", "spread", True),
    ("qwen", "eager", "spread", False),
    ("gpt_oss", "eager", "spread", False),
]


@pytest.fixture(scope="module")
def found() -> Iterator[dict[tuple[str, str, str, bool], list[dict[str, Any]]]]:
    port = free_port()
    ranks = on_processes(RANKS, lambda pool, rank: pool.submit(divided, rank, port, CASES))
    yield {case: [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_divided_experts_compute_what_whole_ones_do(
    found: dict[tuple[str, str, str, bool], list[dict[str, Any]]], case: tuple[str, str, str, bool]
) -> None:
    kind, implementation, routing, cast = case
    whole = experts(kind, implementation)
    limit = 2e-2 if cast else 1e-5  # bfloat16 has 8 bits
    for rank, ours in enumerate(found[case]):
        theirs = run(whole, rank, routing, cast)  # gradients of both ranks' tokens add up in `whole`
        for mine, wanted in zip(ours["tensors"], theirs, strict=True):
            assert float((torch.tensor(mine) - wanted).norm()) <= limit * float(wanted.norm())
    for name, tensor in whole.named_parameters():
        assert tensor.grad is not None
        for ours in found[case]:
            assert ours["held"][name] == tensor.numel() // RANKS
            # Of a sum over the group's tokens, the mean over its ranks, as of the other weights.
            gap = torch.tensor(ours["gradients"][name]) - tensor.grad / RANKS
            assert float(gap.norm()) <= limit * float(tensor.grad.norm()), name
    assert any(float(tensor.grad.norm()) > 0 for tensor in whole.parameters() if tensor.grad is not None)


def test_experts_are_found_and_nothing_else_is() -> None:
    module = experts("gpt_oss", "eager")
    config = DeepseekV3Config(**SIZES, intermediate_size=8)
    router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
    router.num_experts = EXPERTS  # type: ignore[assignment]
    assert expert_parallel.find_experts(torch.nn.Sequential(DeepseekV3MLP(config), module, router)) == [module]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"expert_parallel_size": 2, "num_workers": 2},
            "expert_parallel_size=2 with parallel: ddp: .* set parallel: fsdp",
        ),
        (
            {"expert_parallel_size": 2, "num_workers": 3, "parallel": "fsdp"},
            "num_workers=3: .* a number that divides 3",
        ),
    ],
)
def test_groups_that_do_not_come_out_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerSection(**section)


def test_a_recipe_whose_experts_do_not_divide_is_refused_before_anything_starts() -> None:
    words = ("learner.num_workers=12", "learner.expert_parallel_size=12")
    with pytest.raises(ValueError, match=r"learner.expert_parallel_size=12: .*128 .* use one of 1, 2, 4"):
        check_recipe(recipe("qwen3_30b_a3b", *words), "grpo.yaml")


def test_a_dry_run_says_how_many_ranks_share_experts() -> None:
    text = describe(recipe("qwen3_30b_a3b", "learner.expert_parallel_size=8"))
    assert "the experts of a layer over 8 of them" in text
