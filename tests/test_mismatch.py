"""What another sampler does to the gradient, and what restores it; expectations taken exactly, over every completion.

Completions are single tokens, so all of them can be listed: the expectation of a gradient estimate is the sum over all tokens
of the sampler's probability times that token's term. The truth is the gradient of the expected reward under the policy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.learner import Learner
from posttrain.model.router import find_routers, record_routing
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Sample
from tests.oracles.grpo_loss import VOCAB_SIZE, tiny_policy

PROMPTS = [tuple(3 + (7 * number + 5 * place) % 37 for place in range(4)) for number in range(6)]


def reward(prompt: int, token: int) -> float:
    return float((token * (prompt + 2)) % 5 == 0)


@dataclass
class Situation:
    """A learner, and a sampler that is not the same."""

    learner: Learner
    batch: list[Sample]  # every token after every prompt, as the sampler says
    sampler_probabilities: list[float]

    def gradient(self, weights: list[float], **algorithm: Any) -> dict[str, torch.Tensor]:
        """The sum over the samples of weight x reward x the loss's own gradient."""
        rewards = [reward(PROMPTS.index(s.prompt_ids), s.completion_ids[0]) for s in self.batch]
        samples = [replace(s, advantage=w * r) for s, w, r in zip(self.batch, weights, rewards, strict=True)]
        settings: dict[str, Any] = {"max_tokens_per_microbatch": 4096, "row_length": 256, "with_experts": True}
        (packed,) = pack(samples, world_size=1, pad_token_id=0, **settings)
        scores = self.learner.score(packed, samples, near_tie_margin=1e-5)
        self.scores = scores
        samples = [replace(s, old_logprobs=scores.logprobs[index]) for index, s in enumerate(samples)]
        (packed,) = pack(samples, world_size=1, pad_token_id=0, **settings)
        section = AlgorithmSection(policy_loss="reinforce", num_minibatches=1, beta=0.0, **algorithm)
        self.learner.forward_backward(packed, section)
        found = self.learner.gradients()
        self.learner.drop_gradients()
        return found

    def truth(self) -> dict[str, torch.Tensor]:
        """The gradient of the expected reward under the learner's policy (with the sampler's experts, if it replays them)."""
        self.gradient([0.0] * len(self.batch))
        return self.gradient([float(np.exp(self.scores.logprobs[index][0])) for index in range(len(self.batch))])


def situation(tmp_path: Path, *, bias_noise: float, bfloat16: bool, replay: bool) -> Situation:
    from data.chat import build_tokenizer

    policy = tiny_policy()
    policy.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    sampler = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if bfloat16:
            for parameter in sampler.parameters():
                parameter.copy_(parameter.bfloat16().float())
        for router in find_routers(sampler):
            router.e_score_correction_bias += bias_noise * torch.randn(4, generator=generator)
    batch, probabilities = [], []
    for prompt in PROMPTS:
        with torch.no_grad(), record_routing(find_routers(sampler)) as trace:
            logprobs_V = sampler(torch.tensor([prompt]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        experts = trace.chosen_NLK().numpy().astype(np.int16)
        for token in range(VOCAB_SIZE):
            logprob = float(logprobs_V[token])
            batch.append(Sample(prompt, (token,), (logprob,), 0.0, experts))
            probabilities.append(float(np.exp(logprob)))
    learner = Learner(
        learner=LearnerSection(),
        model=ModelSection(model_name_or_path=str(tmp_path), experts_implementation="eager"),
        optimizer=OptimizerSection(),
        reference_path=None,
        router_section=GrpoRouterSection(replay=replay),
        temperature=1.0,
        max_completion_length=4,
        total_steps=1,
        seed=0,
    )
    return Situation(learner, batch, probabilities)


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative, over all parameters together."""
    apart = sum(float((found[name] - value).square().sum()) for name, value in truth.items())
    return (apart / sum(float(value.square().sum()) for value in truth.values())) ** 0.5


def test_without_correction_the_gradient_is_wrong_and_importance_weights_restore_it(tmp_path: Path) -> None:
    found = situation(tmp_path, bias_noise=0.3, bfloat16=True, replay=False)
    truth, weights = found.truth(), found.sampler_probabilities
    plain = error(found.gradient(weights), truth)
    truncated = error(found.gradient(weights, importance="truncate", importance_cap=2.0), truth)
    exact = error(found.gradient(weights, importance="truncate", importance_cap=1e6), truth)
    assert plain > 0.05 and truncated < 0.5 * plain and exact < 1e-5
    assert found.scores.parity.routing_agreement < 0.9


def test_replay_makes_another_routers_samples_on_policy(tmp_path: Path) -> None:
    """Where only the choice of experts differs, replay leaves nothing to correct."""
    found = situation(tmp_path, bias_noise=0.3, bfloat16=False, replay=True)
    truth = found.truth()
    assert error(found.gradient(found.sampler_probabilities), truth) < 1e-5
    assert found.scores.parity.routing_agreement == 1.0 and found.scores.parity.gap_max < 1e-5
    assert sum(found.scores.mismatch.flips) > 0


def test_replay_and_importance_weights_together_restore_it(tmp_path: Path) -> None:
    """Rounded weights and a perturbed router: replay takes the larger part, the weights the rest."""
    neither = situation(tmp_path, bias_noise=0.3, bfloat16=True, replay=False)
    truth = neither.truth()
    uncorrected = error(neither.gradient(neither.sampler_probabilities), truth)
    found = situation(tmp_path, bias_noise=0.3, bfloat16=True, replay=True)
    truth, weights = found.truth(), found.sampler_probabilities
    replayed = error(found.gradient(weights), truth)
    assert found.scores.parity.routing_agreement == 1.0
    assert replayed < 0.2 * uncorrected
    assert error(found.gradient(weights, importance="truncate"), truth) < 1e-5
    assert neither.scores.mismatch.kl > 20 * found.scores.mismatch.kl > 0


@pytest.mark.parametrize("importance", ["truncate", "mask"])
def test_how_much_is_cut_is_said(tmp_path: Path, importance: str) -> None:
    found = situation(tmp_path, bias_noise=0.3, bfloat16=False, replay=False)
    found.gradient(found.sampler_probabilities)
    ratios = [
        float(np.exp(found.scores.logprobs[index][0] - sample.sampler_logprobs[0]))
        for index, sample in enumerate(found.batch)
    ]
    samples = [replace(s, old_logprobs=found.scores.logprobs[i], advantage=1.0) for i, s in enumerate(found.batch)]
    (packed,) = pack(samples, world_size=1, max_tokens_per_microbatch=4096, row_length=256, pad_token_id=0)
    bounds = {"importance_cap": 1.2, "importance_floor": 0.8}
    section = AlgorithmSection(policy_loss="reinforce", num_minibatches=1, beta=0.0, importance=importance, **bounds)
    metrics = found.learner.forward_backward(packed, section)
    name, expected = {
        "truncate": ("policy/truncated_fraction", np.mean([ratio > 1.2 for ratio in ratios])),
        "mask": ("policy/masked_fraction", np.mean([not 0.8 <= ratio <= 1.2 for ratio in ratios])),
    }[importance]
    assert 0 < metrics[name].value == pytest.approx(expected)
