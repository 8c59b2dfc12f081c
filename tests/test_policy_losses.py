"""Policy losses: values worked by hand, the papers' formulas written out sample by sample, and TRL on the same batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import losses
from posttrain.algorithms import PRESETS
from posttrain.objective import denominator, find_loss, objective
from posttrain.packing import pack
from posttrain.policy_losses import (
    LOSSES,
    PolicyTokens,
    cispo,
    masked_importance,
    off_policy_mask,
    reinforce,
    sample_means,
    sequence_clipped,
    truncated_importance,
)
from posttrain.recipe import AlgorithmSection
from posttrain.types import Microbatch, Sample
from tests.oracles.grpo_loss import completion_logprobs, random_samples, tiny_policy, trl_inputs, trl_trainer

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}


def tokens(
    ratios: list[list[float]], advantages: list[list[float]], ids: list[list[int]], mask: list[list[int]]
) -> PolicyTokens:
    ratios_RW = torch.tensor(ratios)
    return PolicyTokens(
        ratios_RW.log().requires_grad_(),
        torch.zeros_like(ratios_RW),
        torch.tensor(advantages),
        torch.tensor(mask).bool(),
        torch.tensor(ids),
    )


def gradient(loss_RW: torch.Tensor, found: PolicyTokens) -> torch.Tensor:
    return torch.autograd.grad(loss_RW.sum(), found.logprobs_RW)[0]


def test_sequence_ratio_by_hand() -> None:
    """Two samples in one row: ratios of tokens 2 and 0.5 make 1 together, 1.5 and 1.5 make 1.5, which is clipped."""
    found = tokens([[1.0, 2.0, 0.5, 1.5, 1.5]], [[0.0, 1.0, 1.0, 2.0, 2.0]], [[4, 4, 4, 0, 0]], [[0, 1, 1, 1, 1]])
    loss_RW, metrics = sequence_clipped(found, **CLIP)
    torch.testing.assert_close(loss_RW, torch.tensor([[0.0, -1.0, -1.0, -2.56, -2.56]]))
    assert metrics["clip_fraction"].item() == 2
    assert metrics["ratio_mean"].item() == pytest.approx(1 + 1 + 1.5 + 1.5)
    # d/dlogprob of -s A summed over the sample's two tokens, s = exp(mean): -2 A s / 2
    torch.testing.assert_close(gradient(loss_RW, found), torch.tensor([[0.0, -1.0, -1.0, 0.0, 0.0]]))


def test_cispo_and_reinforce_by_hand() -> None:
    found = tokens([[1.5, 0.5, 1.0, 9.0]], [[2.0, 1.0, -1.0, 5.0]], [[0, 0, 0, 0]], [[1, 1, 1, 0]])
    loss_RW, metrics = cispo(found, **CLIP)
    expected = [-1.28 * 2 * math.log(1.5), -0.8 * math.log(0.5), 0.0, 0.0]
    torch.testing.assert_close(loss_RW, torch.tensor([expected]))
    torch.testing.assert_close(gradient(loss_RW, found), torch.tensor([[-2.56, -0.8, 1.0, 0.0]]))  # no token loses it
    assert metrics["clip_fraction"].item() == 2
    loss_RW, metrics = reinforce(found, **CLIP)
    torch.testing.assert_close(gradient(loss_RW, found), torch.tensor([[-2.0, -1.0, 1.0, 0.0]]))
    assert metrics["ratio_mean"].item() == pytest.approx(3.0)


def test_sample_means_keep_samples_and_gradients_apart() -> None:
    found = tokens([[1.0] * 4, [1.0] * 4], [[0.0] * 4] * 2, [[3, 3, 0, 0], [1, 1, 1, -1]], [[1, 1, 0, 1], [0, 1, 1, 0]])
    values_RW = torch.tensor([[1.0, 3.0, 50.0, 7.0], [9.0, 2.0, 4.0, 99.0]], requires_grad=True)
    means_RW = sample_means(values_RW, found)
    assert means_RW.tolist() == [[2.0, 2.0, 0.0, 7.0], [0.0, 3.0, 3.0, 0.0]]
    means_RW[0].sum().backward()
    assert values_RW.grad is not None and values_RW.grad.tolist() == [[1.0, 1.0, 0.0, 1.0], [0.0] * 4]


@pytest.mark.parametrize("name", LOSSES)
def test_untrained_tokens_cannot_spoil_any_loss(name: str) -> None:
    logprobs_RW = torch.tensor([[300.0, -1.0, -math.inf]], requires_grad=True)
    found = PolicyTokens(
        logprobs_RW,
        torch.tensor([[0.0, -1.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.0]]),
        torch.tensor([[False, True, False]]),
        torch.tensor([[0, 0, -1]]),
    )
    loss_RW, _ = LOSSES[name](found, **CLIP)
    assert loss_RW.isfinite().all()
    assert gradient(loss_RW, found).tolist() == [[0.0, -1.0, 0.0]]


def test_corrections_by_hand() -> None:
    old, sampler = torch.tensor([[0.0, math.log(3.0), math.log(0.4), 5.0]]), torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    weights, metrics = truncated_importance(old, sampler, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.4, 0.0]]))
    assert metrics["truncated_fraction"].item() == 1
    weights, metrics = masked_importance(old, sampler, mask, low=0.5, high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 3.0, 0.0, 0.0]]))
    assert metrics["masked_fraction"].item() == 1


def test_samples_left_behind_are_masked_by_hand() -> None:
    """Three samples; log(sampler / policy) is 0.3 on average in the first two, of which one has a positive advantage."""
    found = PolicyTokens(
        torch.tensor([[-1.0, -1.6, -1.3, -1.3, -1.0]]),
        torch.zeros(1, 5),
        torch.tensor([[-1.0, -1.0, 2.0, 2.0, -1.0]]),
        torch.ones(1, 5, dtype=torch.bool),
        torch.tensor([[0, 0, 1, 1, 2]]),
    )
    sampler_RW = torch.full((1, 5), -1.0)
    weights, metrics = off_policy_mask(found, sampler_RW, threshold=0.2)
    assert weights.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]
    assert metrics["off_policy_masked_fraction"].item() == 2
    assert off_policy_mask(found, sampler_RW, threshold=0.31)[0].sum() == 5


def test_unbiased_kl_has_the_value_and_gradient_of_the_kl() -> None:
    """Averaged over what the old policy samples; k3 alone is off when policy and old policy differ."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    old, ref = (torch.log_softmax(torch.randn(5, dtype=torch.float64), dim=0) for _ in range(2))
    logprobs = torch.log_softmax(logits, dim=0)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    mean = (old.exp() * losses.kl_estimate(logprobs, ref, "unbiased", old)).sum()
    assert mean.item() == pytest.approx(exact.item())
    torch.testing.assert_close(torch.autograd.grad(mean, logits, retain_graph=True)[0], expected)
    biased = (old.exp() * losses.kl_estimate(logprobs, ref, "k3")).sum()
    assert abs(biased.item() - exact.item()) > 0.05
    with pytest.raises(ValueError, match="needs old_logprobs"):
        losses.kl_estimate(logprobs, ref, "unbiased")


def test_entropy_with_gradient_is_the_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 7, requires_grad=True)
    ids = torch.randint(0, 7, (1, 4))
    _, plain = losses.token_logprobs(logits, ids, 0.7)
    _, entropy = losses.token_logprobs(logits, ids, 0.7, entropy_gradient=True)
    torch.testing.assert_close(plain, entropy)
    assert not plain.requires_grad
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()[:, :-1].sum()
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (entropy.sum(), expected))
    torch.testing.assert_close(ours, theirs)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_expand_to_visible_keys(name: str) -> None:
    section = AlgorithmSection.model_validate(name)
    assert section.preset == name
    for key, value in PRESETS[name].items():
        assert getattr(section, key) == value
    assert AlgorithmSection.model_validate({"preset": name, "epsilon": 0.123}).epsilon == 0.123
    assert AlgorithmSection.model_validate(section.model_dump()) == section
    find_loss(section.policy_loss)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("dappo", "preset 'dappo' is unknown; choose one of grpo, r1"),
        ({"policy_loss": "clipp"}, "choose one of clip, sequence_clip, cispo, reinforce, or module:function"),
        ({"kl_in": "reward"}, "set kl_estimator: k1"),
        ({"dynamic_sampling_batches": 2}, "set drop_zero_signal_groups: true"),
        ({"policy_loss": "reinforce"}, "set num_minibatches and num_iterations to 1"),
        ({"importance_cap": 0.5}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused(section: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmSection.model_validate(section)


def test_a_loss_that_does_not_resolve() -> None:
    with pytest.raises(ValueError, match="give module:function"):
        find_loss("posttrain.policy_losses:nothing")


# --- TRL --------------------------------------------------------------------------------------------------------------


def perturbed_samples(model: Any, temperature: float) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for sample in random_samples([(3, 9), (2, 5), (1, 1), (4, 12)], seed=3):
        with torch.no_grad():
            logprobs = completion_logprobs(model, sample, temperature)
        noise = (0.3 * torch.randn(2, *logprobs.shape, generator=generator)).unbind()
        old, ref = (tuple((logprobs + part).tolist()) for part in noise)
        found.append(replace(sample, old_logprobs=old, ref_logprobs=ref))
    return found


def run_objective(
    model: Any, samples: list[Sample], algorithm: AlgorithmSection, temperature: float, longest: int
) -> torch.Tensor:
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=60, row_length=30, pad_token_id=0)
    m: Microbatch
    (m,) = batch.microbatches
    logits_RWV = model(input_ids=m.input_ids_RW, position_ids=m.position_ids_RW, use_cache=False).logits
    logprobs_RW, entropy_RW = losses.token_logprobs(
        logits_RWV, m.input_ids_RW, temperature, entropy_gradient=bool(algorithm.entropy_coef)
    )
    loss_sum, _ = objective(logprobs_RW, entropy_RW, m, algorithm)
    return loss_sum / denominator(batch, algorithm, longest)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"preset": "grpo"}, {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}),
        ({"preset": "dapo"}, {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28}),
        ({"preset": "dr_grpo"}, {"loss_type": "dr_grpo", "beta": 0.0}),
        (
            {"preset": "gspo", "epsilon": 0.02, "epsilon_high": 0.03},
            {
                "loss_type": "grpo",
                "beta": 0.0,
                "importance_sampling_level": "sequence",
                "epsilon": 0.02,
                "epsilon_high": 0.03,
            },
        ),
        # TRL's CISPO gives the upper bound of the ratio itself.
        ({"preset": "cispo", "epsilon_high": 0.1}, {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.1}),
        (
            {"preset": "deepseek_v3_2", "beta": 0.04, "off_policy_threshold": None},
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        ),
    ],
    ids=["grpo", "dapo", "dr_grpo", "gspo", "cispo", "deepseek_v3_2"],
)
def test_loss_and_gradient_are_those_of_trl(
    ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole objective on packed rows, TRL's on padded ones: same tokens, same model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    temperature, longest = 0.8, 16
    model = tiny_policy()
    model.save_pretrained(tmp_path / "model")
    samples = perturbed_samples(model, temperature)
    settings = {"epsilon": 0.2, "epsilon_high": 0.2, **theirs}
    trainer = trl_trainer(
        tmp_path / "model",
        tmp_path / "trl",
        num_generations=4,
        max_completion_length=longest,
        temperature=temperature,
        **settings,
    )
    expected = trainer.compute_loss(trainer.model, trl_inputs(samples))
    expected.backward()
    loss = run_objective(model, samples, AlgorithmSection.model_validate(ours), temperature, longest)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    their_gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (parameter.grad - their_gradients[name]).norm() / their_gradients[name].norm().clamp(min=1e-4)
        assert error < 1e-4, name


def test_every_term_of_the_objective_by_plain_loops() -> None:
    """Corrections, KL and entropy together against the formulas written out sample by sample."""
    temperature = 0.8
    model = tiny_policy()
    samples = perturbed_samples(model, temperature)
    algorithm = AlgorithmSection(
        policy_loss="sequence_clip",
        epsilon=0.1,
        beta=0.05,
        kl_estimator="unbiased",
        entropy_coef=0.02,
        importance="truncate",
        importance_cap=1.1,
        loss_aggregation="sequence",
    )
    loss = run_objective(model, samples, algorithm, temperature, 16)
    expected = torch.zeros(())
    for sample in samples:
        assert sample.old_logprobs is not None and sample.ref_logprobs is not None
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
        table = torch.log_softmax(logits, dim=-1)
        values = table.gather(1, torch.tensor(sample.completion_ids)[:, None]).squeeze(1)
        old, ref, sampler = map(torch.tensor, (sample.old_logprobs, sample.ref_logprobs, sample.sampler_logprobs))
        ratio = (values - old).mean().exp()
        advantage = sample.advantage
        assert isinstance(advantage, float)
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        weight = (old - sampler).exp().clamp(max=1.1)
        distance = (values - old).exp() * ((ref - values).exp() - (ref - values) - 1)
        entropy = -(table.exp() * table).sum(dim=-1)
        expected = expected + (policy * weight + 0.05 * distance - 0.02 * entropy).mean() / len(samples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    plain = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for one, two in zip(ours, plain, strict=True):
        if one is not None and two is not None:
            assert (one - two).norm() <= 1e-5 * two.norm().clamp(min=1e-3)
