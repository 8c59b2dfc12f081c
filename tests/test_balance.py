"""Expert balance in training: losses, counting, the correction bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from posttrain.balance_losses import sequence_balance, switch_balance
from posttrain.model import router
from posttrain.model.balance import RouterBalance
from posttrain.sft_recipe import SftRouterSection


class Gate(torch.nn.Module):
    """A router of DeepSeek-V3's kind as far as balance is concerned."""

    def __init__(self, num_experts: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(num_experts, 2))
        self.top_k = 1
        if bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))


def trace_of(logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> router.RouterTrace:
    return router.RouterTrace([logits_NE], [chosen_NK])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_sequence_balance_by_hand() -> None:
    """Two experts, K = 1. Sequence 0: affinities (.75 .25), (.75 .25): f = (2, 0), P = (.75, .25): 1.5.
    Sequence 1: (.75 .25), (.25 .75): f = (1, 1), P = (.5, .5): 1."""
    affinity_NE = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
    assert sequence_balance(affinity_NE, torch.tensor([0, 0, 1, 1]), 1) == pytest.approx(2.5)
    assert sequence_balance(affinity_NE, torch.tensor([0, 0, -1, -1]), 1) == pytest.approx(1.5)  # padding


def test_sequence_balance_is_a_sum_over_sequences() -> None:
    torch.manual_seed(0)
    affinity_NE = router.affinities(torch.randn(30, 6), sigmoid=True)
    sequence_N = torch.tensor([0] * 10 + [1] * 5 + [-1] * 3 + [2] * 12)
    parts = [
        sequence_balance(affinity_NE[sequence_N == number], torch.zeros(int((sequence_N == number).sum())).long(), 2)
        for number in range(3)
    ]
    torch.testing.assert_close(sequence_balance(affinity_NE, sequence_N, 2), torch.stack(parts).sum())
    shuffled = torch.randperm(30)
    torch.testing.assert_close(
        sequence_balance(affinity_NE[shuffled], sequence_N[shuffled], 2), torch.stack(parts).sum()
    )


def test_sequence_balance_pushes_the_favoured_expert_down() -> None:
    logits_NE = torch.tensor([[2.0, 0.0, 0.0]]).repeat(8, 1).requires_grad_()
    sequence_balance(router.affinities(logits_NE, sigmoid=True), torch.zeros(8).long(), 1).backward()
    assert logits_NE.grad is not None
    assert (logits_NE.grad[:, 0] > 0).all() and (logits_NE.grad[:, 1:] <= 0).all()


def test_padding_alone_has_no_loss_and_a_gradient_of_zero() -> None:
    logits_NE = torch.randn(4, 3, requires_grad=True)
    nothing = torch.full((4,), -1)
    loss = sequence_balance(router.affinities(logits_NE, sigmoid=True), nothing, 1) + switch_balance(
        [logits_NE], [torch.zeros(4, 1).long()], nothing >= 0
    )
    loss.backward()
    assert float(loss) == 0.0 and logits_NE.grad is not None and not logits_NE.grad.any()


def test_switch_balance_is_transformers_own() -> None:
    torch.manual_seed(1)
    logits = [torch.randn(2 * 7, 5) for _ in range(3)]
    mask_RW = torch.ones(2, 7, dtype=torch.long)
    mask_RW[0, 5:] = 0
    chosen = [layer.topk(2, dim=-1).indices for layer in logits]
    expected = load_balancing_loss_func(tuple(logits), num_experts=5, top_k=2, attention_mask=mask_RW)
    torch.testing.assert_close(switch_balance(logits, chosen, mask_RW.flatten() == 1), expected)


# --- counting and the bias --------------------------------------------------------------------------------------------


def test_the_bias_follows_the_load_of_all_microbatches_of_a_step() -> None:
    gate = Gate(3)
    balance = RouterBalance([gate], SftRouterSection(bias_update_speed=0.5))
    real_N = torch.tensor([True, True, True, False])
    logits_NE = torch.zeros(4, 3)
    balance.observe(trace_of(logits_NE, torch.tensor([[0], [0], [1], [2]])), real_N)  # the last one is padding
    balance.observe(trace_of(logits_NE, torch.tensor([[0], [1], [1], [2]])), real_N)
    balance.end_step()  # loads 3, 3, 0: mean 2
    assert gate.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5]
    found = balance.metrics()
    assert found["router/max_violation"].value == pytest.approx(0.5)
    assert found["router/layer_00/unused_experts"].value == 1
    assert found["router/layer_00/entropy"].value == pytest.approx(torch.tensor(3.0).log().item())
    assert found["router/layer_00/bias_range"].value == 1.0
    balance.observe(trace_of(logits_NE, torch.tensor([[2], [2], [2], [2]])), real_N)
    balance.end_step()  # a new step starts from nothing
    assert gate.e_score_correction_bias.tolist() == [0.0, 0.0, 0.0]


def test_a_frozen_bias_stays_and_is_still_watched() -> None:
    gate = Gate(2)
    balance = RouterBalance([gate], SftRouterSection())
    balance.observe(trace_of(torch.zeros(2, 2), torch.tensor([[0], [0]])), torch.ones(2).bool())
    balance.end_step()
    assert not gate.e_score_correction_bias.any() and not balance.needs_gradient
    assert balance.metrics()["router/max_violation"].value == pytest.approx(1.0)


def test_a_frozen_router_does_not_train() -> None:
    gate = Gate(2)
    RouterBalance([gate], SftRouterSection(freeze=True))
    assert not gate.weight.requires_grad


def test_the_balance_loss_does_not_depend_on_how_a_step_is_cut() -> None:
    torch.manual_seed(2)
    balance = RouterBalance([Gate(4)], SftRouterSection(sequence_balance_alpha=0.3))
    logits_NE, sequence_N = torch.randn(12, 4), torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    chosen_NK = logits_NE.topk(2).indices
    whole = balance.loss(trace_of(logits_NE, chosen_NK), sequence_N, num_sequences=3, num_microbatches=1)
    halves = [
        balance.loss(
            trace_of(logits_NE[part], chosen_NK[part]),
            sequence_N[part] - sequence_N[part].min(),
            num_sequences=3,
            num_microbatches=2,
        )
        for part in (slice(0, 8), slice(8, 12))
    ]
    torch.testing.assert_close(whole, halves[0] + halves[1])


@pytest.mark.parametrize(
    ("routers", "section", "words"),
    [
        ([], {"bias_update_speed": 0.1}, "dense"),
        ([Gate(2, bias=False)], {"bias_update_speed": 0.1}, "router_aux_loss_coef"),
        ([Gate(2, bias=False)], {"sequence_balance_alpha": 0.1}, "router_aux_loss_coef"),
        ([Gate(2)], {"router_aux_loss_coef": 0.1}, "bias_update_speed"),
    ],
)
def test_what_a_router_cannot_do_is_refused(routers: list[Any], section: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterBalance(routers, SftRouterSection(**section))
