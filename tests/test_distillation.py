"""On-policy distillation: advantages by hand, the gradient of the reverse KL, vocabularies that differ."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import distillation, grpo
from posttrain.conformance import make_samples
from posttrain.errors import RunStopped
from posttrain.objective import objective
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection
from posttrain.types import Sample
from tests.oracles.distillation import divergence_of, on_policy_loss
from tests.oracles.grpo_loss import completion_logprobs


def test_advantages_by_hand() -> None:
    assert distillation.with_teacher(0.0, (-1.0, -2.0), (-3.0, -0.5), 1.0) == (-2.0, 1.5)
    assert distillation.with_teacher((1.0, 0.0), (-1.0, -2.0), (-3.0, -0.5), 0.5) == (0.0, 0.75)
    with pytest.raises(ValueError):
        distillation.with_teacher(0.0, (-1.0,), (), 1.0)


def test_the_metric_is_the_mean_over_tokens() -> None:
    samples = [
        Sample((1,), (2, 3), (-1.0, -1.0), 0.0, old_logprobs=(-1.0, -2.0), teacher_logprobs=(-3.0, -0.5)),
        Sample((1,), (2,), (-1.0,), 0.0, old_logprobs=(-1.0,), teacher_logprobs=(-2.0,)),
    ]
    assert distillation.metrics(samples)["policy/kl_teacher"].value == pytest.approx((2.0 - 1.5 + 1.0) / 3)
    assert distillation.metrics([Sample((1,), (2,), (-1.0,), 0.0)]) == {}


def test_the_expected_gradient_is_that_of_the_reverse_kl() -> None:
    """One token from a vocabulary of four: the expectation is taken exactly, over all four."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 4, generator=generator, dtype=torch.float64).float().unbind()
    logits.requires_grad_()
    own = torch.log_softmax(logits, -1)
    log_teacher = torch.log_softmax(teacher, -1)
    kl = (own.exp() * (own - log_teacher)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)

    algorithm = AlgorithmSection.model_validate({"preset": "on_policy_distillation"})
    found = torch.zeros(4)
    for token in range(4):
        logprob = float(own[token].detach())
        sample = Sample(
            (1,), (token,), (logprob,), 0.0, old_logprobs=(logprob,), teacher_logprobs=(float(log_teacher[token]),)
        )
        (batch,) = pack(
            grpo.token_advantages([sample], algorithm),
            world_size=1,
            max_tokens_per_microbatch=8,
            row_length=8,
            pad_token_id=0,
        )
        logprobs_RW = torch.stack([torch.zeros(()), own[token]])[None]
        loss, _ = objective(logprobs_RW, torch.zeros(1, 2), batch.microbatches[0], algorithm)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        found += own[token].exp().detach() * gradient
    assert torch.allclose(found, expected, atol=1e-6)


def test_over_all_sequences_the_gradient_is_that_of_the_reverse_kl_at_each_place() -> None:
    """A policy with a row of logits for each beginning, 3 tokens and length 2: all nine samples, weighed by their
    probability, through advantages, packing and loss; against the sum over the four places of their KL, written out."""
    generator = torch.Generator().manual_seed(2)
    V, places = 3, [(), (0,), (1,), (2,)]
    own_PV, teacher_PV = torch.randn(2, len(places), V, generator=generator)
    own_PV.requires_grad_()
    own, taught = own_PV.log_softmax(-1), teacher_PV.log_softmax(-1)
    first = own[0].exp().detach()
    expected_loss = sum(
        weight * divergence_of(taught[place].double().exp(), own[place].double().exp(), "reverse_kl")
        for place, weight in enumerate([1.0, *first.tolist()])
    )
    (expected,) = torch.autograd.grad(expected_loss, own_PV, retain_graph=True)

    algorithm = AlgorithmSection.model_validate({"preset": "on_policy_distillation"})
    found, value = torch.zeros_like(own_PV), 0.0
    for a, b in itertools.product(range(V), repeat=2):
        chosen = torch.stack([own[0, a], own[1 + a, b]])
        likely, logprobs = float(chosen.sum().exp().detach()), tuple(chosen.tolist())
        by_teacher = (float(taught[0, a]), float(taught[1 + a, b]))
        sample = Sample((1,), (a, b), logprobs, 0.0, old_logprobs=logprobs, teacher_logprobs=by_teacher)
        samples = grpo.token_advantages([sample], algorithm)
        (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=8, row_length=8, pad_token_id=0)
        logprobs_RW = torch.cat([torch.zeros(1), chosen])[None]
        loss, _ = objective(logprobs_RW, torch.zeros(1, 3), batch.microbatches[0], algorithm)
        (gradient,) = torch.autograd.grad(loss, own_PV, retain_graph=True)
        found += likely * gradient
        value += likely * float(loss.detach())
    assert value == pytest.approx(float(expected_loss.detach()), abs=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Words:
    """A tokenizer's vocabulary."""

    words: tuple[str, ...]

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    distillation.require_same_vocabulary(Words(("a", "b")), Words(("a", "b")), "x/y")
    with pytest.raises(RunStopped, match=r"'x/y' has another vocabulary .* first 'c': 2 and None"):
        distillation.require_same_vocabulary(Words(("a", "b")), Words(("a", "b", "c")), "x/y")
    with pytest.raises(RunStopped, match="2 differ, first 'a': 1 and 0"):
        distillation.require_same_vocabulary(Words(("a", "b")), Words(("b", "a")), "x/y")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a policy, and a teacher that is another."""
    from transformers import AutoModelForCausalLM

    from posttrain.conformance import save_tiny_policy

    place = tmp_path_factory.mktemp("pair")
    for name in ("policy", "teacher"):
        (place / name).mkdir()
        save_tiny_policy(place / name)
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(place / "teacher")
    return place


def plain(path: Path) -> Any:
    """The model of a checkpoint by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


def build_learner(pair: Path, *, reference: bool) -> Any:
    from posttrain.learner import Learner
    from posttrain.recipe import GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection

    return Learner(
        ModelSection(model_name_or_path=str(pair / "policy"), experts_implementation="eager"),
        OptimizerSection(),
        LearnerSection(),
        reference_path=str(pair / "policy") if reference else None,
        teacher_path=str(pair / "teacher"),
        router_section=GrpoRouterSection(),
        temperature=1.0,
        max_completion_length=16,
        total_steps=1,
        seed=0,
    )


def test_the_learner_scores_under_reference_and_teacher(pair: Path) -> None:
    learner, model = build_learner(pair, reference=True), plain(pair / "teacher")
    samples = make_samples(3)
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    scores = learner.score(batch, samples, near_tie_margin=0.0)
    for index, sample in enumerate(samples):
        expected = completion_logprobs(model, sample).tolist()
        assert scores.teacher_logprobs[index] == pytest.approx(expected, abs=1e-5)
        assert scores.ref_logprobs[index] == pytest.approx(scores.logprobs[index], abs=1e-6)
        assert scores.teacher_logprobs[index] != pytest.approx(scores.logprobs[index], abs=1e-3)


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_loss_and_gradient_of_a_batch_are_those_of_plain_transformers(pair: Path, moved: float) -> None:
    """Scored, packed and trained on by the learner, against samples one by one; `moved` is how far, in deviations of a
    token's logprob, the policy is from the one that sampled, so that ratios are clipped on both sides."""
    learner = build_learner(pair, reference=False)
    algorithm = AlgorithmSection.model_validate({"preset": "on_policy_distillation"})
    samples = [replace(sample, advantage=0.0) for sample in make_samples(6)]
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    scores = learner.score(batch, samples, near_tie_margin=0.0)
    generator = torch.Generator().manual_seed(3)
    scored = []
    for index, sample in enumerate(samples):
        own = torch.tensor(scores.logprobs[index])
        old = tuple((own + moved * torch.randn(own.shape, generator=generator)).tolist())
        scored.append(replace(sample, old_logprobs=old, teacher_logprobs=scores.teacher_logprobs[index]))
    taught = grpo.token_advantages(scored, algorithm)
    (batch,) = pack(taught, world_size=1, max_tokens_per_microbatch=32, row_length=32, pad_token_id=0)
    assert len(batch.microbatches) > 1
    metrics = learner.forward_backward(batch, algorithm)

    policy, teacher = plain(pair / "policy"), plain(pair / "teacher")
    loss = on_policy_loss(
        [completion_logprobs(policy, sample) for sample in samples],
        [sample.old_logprobs or () for sample in scored],
        [completion_logprobs(teacher, sample).tolist() for sample in samples],
        epsilon=algorithm.epsilon,
    )
    loss.backward()
    value = float(loss.detach())
    assert metrics["policy/loss"].value == pytest.approx(value, abs=1e-5)
    if not moved:
        assert distillation.metrics(scored)["policy/kl_teacher"].value == pytest.approx(value, abs=1e-5)
        assert metrics["policy/clip_fraction"].value == 0
    else:
        assert metrics["policy/clip_fraction"].value > 0
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    found = learner.gradients()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    apart = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    assert float(apart / whole) < 1e-5
