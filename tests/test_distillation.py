"""On-policy distillation: advantages by hand, the gradient of the reverse KL, vocabularies that differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from posttrain import distillation, grpo
from posttrain.errors import RunStopped
from posttrain.objective import objective
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection
from posttrain.types import Sample


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


def test_the_learner_scores_under_reference_and_teacher(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from posttrain.conformance import make_samples, save_tiny_policy
    from posttrain.learner import Learner
    from posttrain.recipe import GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
    from tests.oracles.grpo_loss import completion_logprobs

    for name in ("policy", "teacher"):
        (tmp_path / name).mkdir()
        save_tiny_policy(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    model.set_experts_implementation("eager")
    learner = Learner(
        ModelSection(model_name_or_path=str(tmp_path / "policy"), experts_implementation="eager"),
        OptimizerSection(),
        LearnerSection(),
        reference_path=str(tmp_path / "policy"),
        teacher_path=str(tmp_path / "teacher"),
        router_section=GrpoRouterSection(),
        temperature=1.0,
        max_completion_length=16,
        total_steps=1,
        seed=0,
    )
    samples = make_samples(3)
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    scores = learner.score(batch, samples, near_tie_margin=0.0)
    for index, sample in enumerate(samples):
        expected = completion_logprobs(model, sample).tolist()
        assert scores.teacher_logprobs[index] == pytest.approx(expected, abs=1e-5)
        assert scores.ref_logprobs[index] == pytest.approx(scores.logprobs[index], abs=1e-6)
        assert scores.teacher_logprobs[index] != pytest.approx(scores.logprobs[index], abs=1e-3)
