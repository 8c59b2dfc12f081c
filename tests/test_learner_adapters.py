"""GRPO with adapters: their gradient, what is published and saved, the reference, going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.learner import Learner
from posttrain.model import lora
from posttrain.model.load import load_policy
from posttrain.packing import pack
from posttrain.recipe import (
    AlgorithmSection,
    GrpoRecipe,
    GrpoRouterSection,
    LearnerSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
)
from posttrain.types import TrainBatch
from tests.oracles.grpo_loss import completion_logprobs, grpo_loss, random_samples, tiny_policy

LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4), (6, 9), (2, 3)]
SECTION = LoraSection(r=4, alpha=8, targets=("attention", "routed_experts", "shared_experts", "router"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.chat import build_tokenizer

    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def make(
    checkpoint: Path, origin: Path | None = None, adapters: LoraSection | None = SECTION, **section: Any
) -> Learner:
    return Learner(
        model=ModelSection(model_name_or_path=str(checkpoint), experts_implementation="eager"),
        optimizer=OptimizerSection(learning_rate=1e-2),
        learner=LearnerSection(**section),
        reference_path=str(origin or checkpoint),
        origin=str(origin or checkpoint),
        lora=adapters,
        router_section=GrpoRouterSection(),
        temperature=1.0,
        max_completion_length=16,
        total_steps=10,
        seed=0,
    )


def batch(**layout: Any) -> TrainBatch:
    settings = {"max_tokens_per_microbatch": 64, "row_length": 32, **layout}
    return pack(random_samples(LENGTHS), world_size=1, pad_token_id=0, **settings)[0]


def step(learner: Learner) -> None:
    learner.forward_backward(batch(), AlgorithmSection())
    learner.optim_step()


def score(learner: Learner) -> Any:
    return learner.score(batch(), random_samples(LENGTHS), near_tie_margin=1e-5)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * max(float(value.norm()), 1e-3 * scale), name


def moved(learner: Learner) -> Learner:
    """With adapters that do something: their second factors start at 0."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in learner._model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


@pytest.mark.parametrize(
    ("section", "layout"),
    [
        ({}, {}),
        ({"logits_chunk": None}, {"max_tokens_per_microbatch": 32}),
        ({"logits_chunk": 3}, {"samples_per_row": 1}),
        ({"gradient_checkpointing": True}, {}),
    ],
    ids=["plain", "all logits", "small chunks, padded", "checkpointing"],
)
def test_gradient_is_that_of_peft_and_a_hand_written_loss(
    checkpoint: Path, section: dict[str, Any], layout: dict[str, Any]
) -> None:
    learner = moved(make(checkpoint, **section))
    model = tiny_policy()
    model.set_experts_implementation("eager")
    adapted = lora.apply_lora(model, r=4, alpha=8, dropout=0.0, targets=SECTION.targets)
    adapted.get_base_model().load_state_dict(learner._model.state_dict())
    samples = random_samples(LENGTHS)
    logprobs = [completion_logprobs(adapted, sample) for sample in samples]
    grpo_loss(samples, logprobs, epsilon_low=0.2, epsilon_high=0.2, beta=0.05, aggregation="token").backward()
    expected = {name: p.grad for name, p in adapted.get_base_model().named_parameters() if p.grad is not None}
    learner.forward_backward(batch(**layout), AlgorithmSection(beta=0.05))
    found = learner.gradients()
    assert all(".lora_" in name for name in found) and any("experts" in name for name in found)
    assert_same(found, expected, 1e-5)


def test_what_is_published_is_what_is_saved_and_what_merging_gives(checkpoint: Path, tmp_path: Path) -> None:
    learner = make(checkpoint)
    for _ in range(3):
        step(learner)
    before = {name: tensor.clone() for name, tensor in learner._model.state_dict().items()}
    published = dict(learner.checkpoint_tensors())
    learner.save(tmp_path)
    # Neither leaves a trace in what is trained.
    assert all(torch.equal(before[name], tensor) for name, tensor in learner._model.state_dict().items())
    options = {"attn_implementation": "sdpa", "experts_implementation": "eager", "trust_remote_code": False}
    saved = load_policy(str(tmp_path), dtype="float32", **options)  # type: ignore[arg-type]
    plain = load_policy(str(checkpoint), dtype="float32", **options)  # type: ignore[arg-type]
    from posttrain.model.load import checkpoint_tensors

    for name, tensor in checkpoint_tensors(saved):
        assert torch.equal(tensor, published[name]), name
    start = dict(checkpoint_tensors(plain))
    assert published.keys() == start.keys()
    changed = {name for name, tensor in published.items() if not torch.equal(tensor, start[name])}
    assert any("experts.3." in name for name in changed) and any("q_proj" in name for name in changed)
    assert not [name for name in changed if "embed" in name or "norm" in name or "lm_head" in name]
    # A learner of all weights that begins there is the same policy.
    own, theirs = score(learner), score(make(tmp_path, adapters=None))
    for index, values in own.logprobs.items():
        assert values == pytest.approx(theirs.logprobs[index], abs=1e-5)
    merged = lora.merge(learner._policy._adapted)  # uses it up
    for name, tensor in checkpoint_tensors(merged):
        assert torch.equal(tensor, published[name]), name


def test_the_reference_is_the_policy_with_adapters_off(checkpoint: Path) -> None:
    learner = make(checkpoint)
    assert learner._frozen == {}  # no second model
    start = score(learner)
    assert start.logprobs == start.ref_logprobs
    for _ in range(3):
        step(learner)
    later = score(learner)
    assert later.ref_logprobs == start.ref_logprobs
    assert later.logprobs[0] != pytest.approx(start.logprobs[0], abs=1e-3)
    # Looking at the reference in between changes nothing of the training.
    other = make(checkpoint)
    for _ in range(4):
        step(other)
    step(learner)
    assert all(torch.equal(a, b) for a, b in zip(learner._model.parameters(), other._model.parameters(), strict=True))
    with pytest.raises(ValueError, match="reference_refresh_steps: 0"):
        learner.renew_reference()


def test_going_on_is_exact_and_rolling_back_too(checkpoint: Path, tmp_path: Path) -> None:
    learner = make(checkpoint)
    for _ in range(2):
        step(learner)
    learner.save(tmp_path)
    resumed = make(tmp_path, origin=checkpoint)
    resumed.restore(tmp_path)
    for which in (learner, resumed):
        step(which)
        step(which)
    expected = dict(learner.checkpoint_tensors())
    for name, tensor in resumed.checkpoint_tensors():
        assert torch.equal(tensor, expected[name]), name
    assert score(resumed).ref_logprobs == score(learner).ref_logprobs  # the run's start, not the checkpoint
    learner.roll_back(tmp_path)
    step(learner)
    step(learner)
    for name, tensor in learner.checkpoint_tensors():
        assert torch.equal(tensor, expected[name]), name
    whole = make(checkpoint, adapters=None)
    directory = tmp_path / "whole"
    directory.mkdir()
    whole.save(directory)
    with pytest.raises(ValueError, match="its run trained all weights"):
        resumed.restore(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"dropout": 0.1, "targets": ["attention"]}}, "which has no dropout; set it to 0"),
        ({"lora": {"quantization": "nf4"}}, "weights in 4 bits cannot be"),
        ({"learner": {"parallel": "fsdp", "num_workers": 2}}, "adapters are not spread over ranks"),
        ({"algorithm": "r1"}, "cannot be renewed; set reference_refresh_steps: 0"),
        ({"router": {"bias_update_speed": 0.001}}, "set bias_update_speed: 0"),
        ({"router": {"freeze": True}, "lora": {"targets": ["router"]}}, "contradicts lora.targets"),
        ({"learner": {"offload_reference": True}}, "adapters need no second model"),
    ],
)
def test_what_adapters_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    recipe = {
        "max_steps": 1,
        "model": {"model_name_or_path": "somewhere"},
        "datasets": [{"task": "letter_counting", "size": 100}],
        "rewards": [{"func": "rewards.format:score"}],
        "rollout": {"num_prompts": 4, "num_generations": 4},
        "lora": {},
    }
    GrpoRecipe.model_validate({**recipe, "run_name": "fine"})
    with pytest.raises(ValueError, match=message):
        GrpoRecipe.model_validate({**recipe, "run_name": "not", **changes})
