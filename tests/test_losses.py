"""Losses: numbers worked by hand, gradients against plain loops, and the loss of TRL's GRPOTrainer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain import losses
from posttrain.packing import pack
from posttrain.policy_losses import PolicyTokens, clipped
from tests.oracles.grpo_loss import completion_logprobs, grpo_loss, random_samples, tiny_policy, trl_inputs, trl_trainer

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


# --- token_logprobs -------------------------------------------------------------------------------------------------


def test_token_logprobs_by_hand() -> None:
    # Softmax of (0, ln 3) is (1/4, 3/4); of (0, 0) is (1/2, 1/2). The last position predicts nothing.
    logits_RWV = torch.tensor([[[0.0, LN3], [0.0, 0.0], [5.0, -5.0]]])
    logprobs_RW, entropy_RW = losses.token_logprobs(logits_RWV, torch.tensor([[0, 1, 0]]), 1.0)
    assert logprobs_RW.tolist() == [pytest.approx([0.0, math.log(3 / 4), -LN2])]
    assert entropy_RW.tolist() == [pytest.approx([0.0, LN4 - 0.75 * LN3, LN2])]


def test_temperature_divides_the_logits() -> None:
    # (0, 2 ln 3) at temperature 2 is (0, ln 3): probabilities 1/4 and 3/4.
    logits_RWV = torch.tensor([[[0.0, 2 * LN3], [0.0, 0.0]]])
    logprobs_RW, entropy_RW = losses.token_logprobs(logits_RWV, torch.tensor([[1, 0]]), 2.0)
    assert logprobs_RW.tolist() == [pytest.approx([0.0, -LN4])]
    assert entropy_RW.tolist() == [pytest.approx([0.0, LN4 - 0.75 * LN3])]
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="is not above 0"):
            losses.token_logprobs(logits_RWV, torch.tensor([[1, 0]]), temperature)


@pytest.mark.parametrize("chunk", [1, 5, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_give_the_values_and_gradient_of_the_whole(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    ids_RW = torch.randint(0, 11, (3, 7))
    logits_RWV = (3 * torch.randn(3, 7, 11, dtype=torch.float64)).requires_grad_()
    expected_RWV = torch.log_softmax(logits_RWV / temperature, dim=-1)
    expected = expected_RWV[:, :-1].gather(2, ids_RW[:, 1:, None]).squeeze(2)
    entropy = -(expected_RWV.exp() * expected_RWV).sum(-1)[:, :-1].detach()
    upstream = torch.randn(3, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), logits_RWV)

    ours = logits_RWV.detach().float().requires_grad_()
    logprobs_RW, entropy_RW = losses.token_logprobs(ours, ids_RW, temperature)
    (our_gradient,) = torch.autograd.grad((logprobs_RW[:, 1:] * upstream).sum(), ours)
    assert not entropy_RW.requires_grad
    assert not logprobs_RW[:, 0].any() and not entropy_RW[:, 0].any()
    torch.testing.assert_close(logprobs_RW[:, 1:].double(), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy_RW[:, 1:].double(), entropy, rtol=0, atol=5e-6)
    torch.testing.assert_close(our_gradient.double(), gradient, rtol=0, atol=5e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    # exp(8) times 1,000 tokens: in bfloat16 the sum would keep 3 digits.
    logits_RWV = torch.full((1, 2, 1000), 8.0, dtype=torch.bfloat16)
    logprobs_RW, entropy_RW = losses.token_logprobs(logits_RWV, torch.tensor([[3, 7]]), 1.0)
    assert logprobs_RW.dtype == entropy_RW.dtype == torch.float32
    assert logprobs_RW[0, 1].item() == pytest.approx(-math.log(1000), abs=1e-5)
    assert entropy_RW[0, 1].item() == pytest.approx(math.log(1000), abs=1e-4)


def test_excluded_tokens_do_not_spoil_the_entropy() -> None:
    logits_RWV = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    logprobs_RW, entropy_RW = losses.token_logprobs(logits_RWV, torch.tensor([[0, 1]]), 1.0)
    assert logprobs_RW[0, 1].item() == pytest.approx(-LN2)
    assert entropy_RW[0, 1].item() == pytest.approx(LN2)


# --- kl_estimate ----------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand() -> None:
    # policy 1/2, reference 1/4: d = ln 2, reference / policy = 1/2
    logprobs, ref_logprobs = torch.tensor([-LN2, -LN2]), torch.tensor([-LN4, -LN2])
    for kind, value in (("k1", LN2), ("k2", LN2**2 / 2), ("k3", 0.5 + LN2 - 1)):
        assert losses.kl_estimate(logprobs, ref_logprobs, kind).tolist() == pytest.approx([value, 0.0], abs=1e-7)  # type: ignore[arg-type]
    assert torch.equal(losses.kl_estimate(logprobs, ref_logprobs), losses.kl_estimate(logprobs, ref_logprobs, "k3"))
    with pytest.raises(ValueError, match="choose k1, k2, k3 or unbiased"):
        losses.kl_estimate(logprobs, ref_logprobs, "k4")  # type: ignore[arg-type]


def test_kl_estimates_and_their_gradients_on_average() -> None:
    """What the docstring says of each, summed exactly over a vocabulary of 5."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(5, dtype=torch.float64), dim=0)
    logprobs = torch.log_softmax(logits, dim=0)
    weights = logprobs.exp().detach()  # how often each token is sampled
    forward_kl = (logprobs.exp() * (logprobs - ref)).sum()
    reverse_kl = (ref.exp() * (ref - logprobs)).sum()
    (policy_gradient,) = torch.autograd.grad(forward_kl, logits, retain_graph=True)
    (reference_gradient,) = torch.autograd.grad(reverse_kl, logits, retain_graph=True)
    expected = {"k1": torch.zeros(5).double(), "k2": policy_gradient, "k3": reference_gradient}
    for kind, gradient in expected.items():
        mean = (weights * losses.kl_estimate(logprobs, ref, kind)).sum()  # type: ignore[arg-type]
        if kind != "k2":
            assert mean.item() == pytest.approx(forward_kl.item())
        torch.testing.assert_close(torch.autograd.grad(mean, logits, retain_graph=True)[0], gradient)


# --- the clipped loss -------------------------------------------------------------------------------------------------


def clipped_sum(
    logprobs_RW: torch.Tensor,
    old_logprobs_RW: torch.Tensor,
    advantages_RW: torch.Tensor,
    mask_RW: torch.Tensor,
    epsilon_high: float = 0.28,
    weights_RW: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = PolicyTokens(logprobs_RW, old_logprobs_RW, advantages_RW, mask_RW, torch.zeros_like(mask_RW).long())
    loss_RW, metrics = clipped(tokens, epsilon_low=0.2, epsilon_high=epsilon_high)
    return (loss_RW * weights_RW).sum(), metrics


# ratio, advantage -> loss, gradient with respect to the logprob, clipped; epsilon 0.2 below and 0.28 above
CLIP_CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.25, 2.0, -2.5, -2.5, False),  # inside 1.28
    (1.5, 2.0, -2.56, 0.0, True),  # too high and still encouraged
    (0.5, 2.0, -1.0, -1.0, False),  # too low, encouraged: nothing holds it
    (1.5, -2.0, 3.0, 3.0, False),  # too high, discouraged: nothing holds it
    (0.5, -2.0, 1.6, 0.0, True),  # too low and still discouraged
    (0.9, -1.0, 0.9, 0.9, False),
    (3.0, 0.0, 0.0, 0.0, False),  # without advantage nothing is taken away
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), CLIP_CASES)
def test_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    logprobs_RW = torch.tensor([[0.0, math.log(ratio) - 1.0]], requires_grad=True)
    mask_RW = torch.tensor([[False, True]])
    loss_sum, metrics = clipped_sum(logprobs_RW, torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, advantage]]), mask_RW)
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs_RW.grad is not None
    assert logprobs_RW.grad.tolist() == [pytest.approx([0.0, gradient], abs=1e-6)]
    assert metrics["clip_fraction"].item() == float(clipped)
    assert metrics["ratio_mean"].item() == pytest.approx(ratio)
    assert not any(value.requires_grad for value in metrics.values())


def test_sums_over_trained_tokens_and_weights_by_hand() -> None:
    columns = list(zip(*CLIP_CASES, strict=True))
    ratios, advantages = (torch.tensor([column]) for column in columns[:2])
    mask_RW = torch.tensor([[True, True, True, True, True, True, False, False]])
    loss_sum, metrics = clipped_sum(ratios.log(), torch.zeros_like(ratios), advantages, mask_RW)
    assert loss_sum.item() == pytest.approx(-2 - 2.5 - 2.56 - 1 + 3 + 1.6)
    assert metrics["clip_fraction"].item() == 2
    assert metrics["ratio_mean"].item() == pytest.approx(1 + 1.25 + 1.5 + 0.5 + 1.5 + 0.5)
    weights_RW = torch.tensor([[0.5, 0.25, 0, 0, 0, 1, 9, 9]])
    loss_sum, weighted = clipped_sum(ratios.log(), torch.zeros_like(ratios), advantages, mask_RW, weights_RW=weights_RW)
    assert loss_sum.item() == pytest.approx(-1 - 0.625 + 1.6)
    assert weighted == metrics  # metrics count tokens, whatever their weight


def test_untrained_tokens_cannot_spoil_loss_or_gradient() -> None:
    # exp(200) is infinite in float32: computed and then masked it would be NaN.
    logprobs_RW = torch.tensor([[0.0, 0.0, -1.0]], requires_grad=True)
    loss_sum, metrics = clipped_sum(
        logprobs_RW,
        torch.tensor([[0.0, -200.0, -1.0]]),
        torch.tensor([[0.0, 0.0, 1.0]]),
        torch.tensor([[False, False, True]]),
        epsilon_high=0.2,
    )
    loss_sum.backward()
    assert loss_sum.item() == -1
    assert logprobs_RW.grad is not None and logprobs_RW.grad.tolist() == [[0, 0, -1]]
    assert metrics["ratio_mean"].item() == 1


def test_sequence_mean_weights_by_hand() -> None:
    sample_ids_RW = torch.tensor([[2, 2, 2, 0, 0, -1], [5, 5, 5, 5, 5, 5]])
    mask_RW = torch.tensor([[False, True, True, False, True, False], [False, False, True, True, True, True]])
    weights_RW = losses.sequence_mean_weights(sample_ids_RW, mask_RW)
    assert weights_RW.tolist() == [[0, 0.5, 0.5, 0, 1, 0], [0, 0, 0.25, 0.25, 0.25, 0.25]]
    empty = losses.sequence_mean_weights(torch.tensor([[-1, -1]]), torch.tensor([[False, False]]))
    assert empty.tolist() == [[0, 0]]


def test_nll_by_hand() -> None:
    logprobs_RW = torch.tensor([[0.0, -1.5, -math.inf], [0.0, -0.25, -2.0]], requires_grad=True)
    loss_sum, metrics = losses.nll(logprobs_RW, torch.tensor([[False, True, False], [False, True, True]]))
    loss_sum.backward()
    assert loss_sum.item() == metrics["nll"].item() == 3.75
    assert not metrics["nll"].requires_grad
    assert logprobs_RW.grad is not None and logprobs_RW.grad.tolist() == [[0, -1, 0], [0, -1, -1]]


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_is_that_of_plain_loops(aggregation: str) -> None:
    """Of logprobs directly, no model: R samples, one per row, of unlike lengths."""
    torch.manual_seed(0)
    samples = random_samples([(2, 7), (1, 3), (3, 1), (2, 5)])
    current = [torch.tensor(s.old_logprobs) + 0.4 * torch.randn(len(s.completion_ids)) for s in samples]
    expected_inputs = [values.clone().requires_grad_() for values in current]
    expected = grpo_loss(
        samples, expected_inputs, epsilon_low=0.2, epsilon_high=0.28, beta=0.04, aggregation=aggregation
    )
    expected.backward()

    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=99, row_length=9, pad_token_id=0, samples_per_row=1
    )
    (m,) = batch.microbatches
    logprobs_RW = torch.zeros(m.input_ids_RW.shape)
    for index, values in enumerate(current):
        logprobs_RW[(m.sample_ids_RW == index) & m.loss_mask_RW] = values
    logprobs_RW.requires_grad_()
    sequence_RW = losses.sequence_mean_weights(m.sample_ids_RW, m.loss_mask_RW)
    weights_RW = sequence_RW if aggregation == "sequence" else m.loss_mask_RW.float()
    loss_sum, metrics = clipped_sum(
        logprobs_RW, m.old_logprobs_RW, m.advantages_RW, m.loss_mask_RW, weights_RW=weights_RW
    )
    kl_RW = losses.kl_estimate(logprobs_RW * m.loss_mask_RW, m.ref_logprobs_RW)
    denominator = batch.num_loss_tokens if aggregation == "token" else batch.num_samples
    loss = (loss_sum + 0.04 * (kl_RW * weights_RW).sum()) / denominator
    loss.backward()
    assert metrics["clip_fraction"] > 2  # both sides of the clip are in play
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logprobs_RW.grad is not None
    for index, values in enumerate(expected_inputs):
        ours = logprobs_RW.grad[(m.sample_ids_RW == index) & m.loss_mask_RW]
        torch.testing.assert_close(ours, values.grad, rtol=1e-5, atol=1e-7)


# --- TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.04, 0.0])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_loss_and_gradient_are_those_of_trl(
    loss_type: str, beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's GRPOTrainer on padded rows and our losses on packed rows: same tokens, same model, same loss."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    temperature, max_completion_length = 0.8, 16
    model = tiny_policy()
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    samples = []
    for sample in random_samples([(3, 9), (2, 5), (1, 1), (4, 12)], seed=3):
        with torch.no_grad():
            logprobs = completion_logprobs(model, sample, temperature)
        old, ref = (
            tuple((logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator)).tolist()) for _ in range(2)
        )
        samples.append(replace(sample, old_logprobs=old, ref_logprobs=ref))

    trainer = trl_trainer(
        tmp_path / "model",
        tmp_path / "trl",
        num_generations=4,
        max_completion_length=max_completion_length,
        loss_type=loss_type,
        beta=beta,
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=temperature,
        # TRL's default multiplies the KL by the ratio (DeepSeek-V3.2); DeepSeekMath's equation 3 does not.
        use_bias_correction_kl=False,
    )
    theirs = trainer.compute_loss(trainer.model, trl_inputs(samples))
    theirs.backward()

    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=60, row_length=30, pad_token_id=0)
    (m,) = batch.microbatches
    logits_RWV = model(input_ids=m.input_ids_RW, position_ids=m.position_ids_RW, use_cache=False).logits
    logprobs_RW, entropy_RW = losses.token_logprobs(logits_RWV, m.input_ids_RW, temperature)
    mean_weights_RW = losses.sequence_mean_weights(m.sample_ids_RW, m.loss_mask_RW)
    weights_RW = mean_weights_RW if loss_type == "grpo" else m.loss_mask_RW.float()
    loss_sum, metrics = clipped_sum(
        logprobs_RW, m.old_logprobs_RW, m.advantages_RW, m.loss_mask_RW, weights_RW=weights_RW
    )
    kl_RW = losses.kl_estimate(logprobs_RW * m.loss_mask_RW, m.ref_logprobs_RW)
    denominator = {"grpo": batch.num_samples, "dr_grpo": batch.num_samples * max_completion_length}
    ours = (loss_sum + beta * (kl_RW * weights_RW).sum()) / denominator.get(loss_type, batch.num_loss_tokens)
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    their_gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (parameter.grad - their_gradients[name]).norm() / their_gradients[name].norm().clamp(min=1e-4)
        assert error < 1e-4, name
    # The metrics that users compare.
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    clip_fraction = metrics["clip_fraction"].item() / batch.num_loss_tokens
    assert 0 < clip_fraction == pytest.approx(logged["clip_ratio/region_mean"], abs=1e-6)
    entropy = (entropy_RW * m.loss_mask_RW).sum().item() / batch.num_loss_tokens
    assert entropy == pytest.approx(logged["entropy"], abs=1e-5)
    if beta:
        assert kl_RW.sum().item() / batch.num_loss_tokens == pytest.approx(logged["kl"], abs=1e-5)
