"""Logit distillation: divergences by hand and against TRL's, and the trainer's gradient against samples one by one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_trainers import (
    build_recipe,
    build_trainer,
    first_gradient,
    reference_model,
    relative_gap,
    samples_of,
    save_random,
)
from transformers import LlamaConfig, LlamaForCausalLM

from data.chat import build_tokenizer
from posttrain import sft_parts
from posttrain.distillation_losses import distillation_loss, divergence, event_logprobs
from posttrain.dry_run import describe
from posttrain.errors import RunStopped
from posttrain.memory import expected_memory
from posttrain.model.load import save_policy
from posttrain.recipe import RecipeError, SftTeacherSection
from posttrain.recipe_file import check_files
from tests.oracles.distillation import distilled_loss, divergence_of

LN2, LN3 = math.log(2), math.log(3)
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log() + 3.0  # what is added to all of them does not count


# --- divergences --------------------------------------------------------------------------------------------------------


def test_divergences_by_hand() -> None:
    teacher, student = event_logprobs(logits(0.75, 0.25), 1.0), event_logprobs(logits(0.5, 0.5), 1.0)
    # 3/4 ln(3/2) + 1/4 ln(1/2), and 1/2 ln(2/3) + 1/2 ln 2.
    assert divergence(teacher, student, "forward_kl").tolist() == pytest.approx([0.75 * LN3 - LN2], abs=1e-6)
    assert divergence(teacher, student, "reverse_kl").tolist() == pytest.approx([LN2 - LN3 / 2], abs=1e-6)
    # The mixture is (5/8, 3/8).
    to_teacher = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    to_student = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    expected = 0.5 * to_teacher + 0.5 * to_student
    assert divergence(teacher, student, "jsd", 0.5).tolist() == pytest.approx([expected], abs=1e-6)
    for kind, beta in KINDS:
        assert divergence(teacher, teacher, kind, beta).tolist() == pytest.approx([0.0], abs=1e-7)  # type: ignore[arg-type]


def test_what_is_wrong_is_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="choose forward_kl, reverse_kl or jsd"):
        divergence(one, one, "l2")  # type: ignore[arg-type]
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            divergence(one, one, "jsd", beta)
    with pytest.raises(ValueError, match="no meaning with divergence: reverse_kl"):
        SftTeacherSection.model_validate({"model_name_or_path": "x/y", "divergence": "reverse_kl", "beta": 0.3})


def test_jsd_lies_between_the_two_kls() -> None:
    teacher, student = event_logprobs(torch.randn(2, 6, 11), 1.0).unbind()
    near_0 = divergence(teacher, student, "jsd", 1e-3) / 1e-3
    near_1 = divergence(teacher, student, "jsd", 1 - 1e-3) / 1e-3
    torch.testing.assert_close(near_0, divergence(teacher, student, "forward_kl"), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(near_1, divergence(teacher, student, "reverse_kl"), rtol=2e-2, atol=2e-3)
    assert (divergence(teacher, student, "jsd", 0.5) <= LN2).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_value_and_gradient_are_those_of_trl(kind: Any, beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    teacher_CV, student_CV = 3 * torch.randn(2, 7, 23, generator=generator)
    student_CV.requires_grad_()
    ours, _ = distillation_loss(
        student_CV, event_logprobs(teacher_CV, temperature), None, kind=kind, beta=beta, temperature=temperature
    )
    as_trl = {"forward_kl": 0, "reverse_kl": 1}.get(kind, beta)
    theirs = GKDTrainer.generalized_jsd_loss(
        student_CV[None], teacher_CV[None], beta=as_trl, temperature=temperature, reduction="sum"
    )
    torch.testing.assert_close(ours, temperature**2 * theirs, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours, student_CV)
    (expected,) = torch.autograd.grad(temperature**2 * theirs, student_CV)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_rest_of_the_vocabulary_is_one_event(kind: Any, beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher_CV, student_CV = 2 * torch.randn(2, 5, 13, generator=generator)
    student_CV.requires_grad_()
    tokens_CK = teacher_CV.topk(4).indices
    teacher_CE = event_logprobs(teacher_CV, 1.0, tokens_CK)
    assert teacher_CE.exp().sum(-1).tolist() == pytest.approx([1.0] * 5)
    ours, sums = distillation_loss(student_CV, teacher_CE, tokens_CK, kind=kind, beta=beta, temperature=1.0)
    student = student_CV.double().softmax(-1)
    theirs = sum(
        divergence_of(p, q, kind, beta=beta, top_k=4)
        for p, q in zip(teacher_CV.double().softmax(-1), student, strict=True)
    )
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(ours, student_CV)
    (expected,) = torch.autograd.grad(theirs, student_CV)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-6)
    # Lumping events together hides differences and adds none.
    whole, _ = distillation_loss(
        student_CV, event_logprobs(teacher_CV, 1.0), None, kind=kind, beta=beta, temperature=1.0
    )
    assert 0 < float(ours.detach()) < float(whole.detach())
    assert float(sums["teacher_mass"]) == pytest.approx(float(teacher_CV.softmax(-1).topk(4).values.sum()), rel=1e-5)


def test_a_tail_too_small_for_one_minus_the_sum_is_exact() -> None:
    # The rest has e^-30: 1 - sum of the others is 0 in float32.
    teacher_CV, student_CV = torch.tensor([[0.0, -30.0, -31.0]]), torch.tensor([[0.0, -20.0, -40.0]])
    found = [float(event_logprobs(x, 1.0, torch.tensor([[0]]))[0, 1]) for x in (teacher_CV, student_CV)]
    assert found == pytest.approx([-30 + math.log1p(math.exp(-1)), -20.0], rel=1e-6)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_tokens_that_cannot_come_are_no_numbers_to_fear(kind: Any, beta: float) -> None:
    student_CV = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    teacher_CE = event_logprobs(torch.tensor([[1.0, 0.0, -math.inf]]), 1.0)
    loss, _ = distillation_loss(student_CV, teacher_CE, None, kind=kind, beta=beta, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, student_CV)
    assert loss.isfinite() and loss > 0 and gradient.isfinite().all()


def test_the_square_of_the_temperature_keeps_the_gradient_in_size() -> None:
    """Hinton et al., section 2.1: at high temperature the gradient of a logit is (its own less the teacher's) / V."""
    teacher_CV, student_CV = torch.randn(2, 3, 8, dtype=torch.float64).float()
    teacher_CV, student_CV = (x - x.mean(-1, keepdim=True) for x in (teacher_CV, student_CV))
    student_CV.requires_grad_()
    loss, _ = distillation_loss(
        student_CV, event_logprobs(teacher_CV, 200.0), None, kind="forward_kl", beta=0.5, temperature=200.0
    )
    (gradient,) = torch.autograd.grad(loss, student_CV)
    torch.testing.assert_close(gradient, (student_CV - teacher_CV).detach() / 8, rtol=0.05, atol=5e-3)


def test_what_is_logged_by_hand() -> None:
    student = torch.cat([logits(0.5, 0.25, 0.25), logits(0.25, 0.5, 0.25)])
    teacher_CE = event_logprobs(torch.cat([logits(0.5, 0.25, 0.25)] * 2), 1.0)
    _, sums = distillation_loss(student, teacher_CE, None, kind="forward_kl", beta=0.5, temperature=1.0)
    assert float(sums["divergence"]) == pytest.approx(0.25 * LN2, abs=1e-6)  # 1/2 ln 2 - 1/4 ln 2
    assert float(sums["teacher_entropy"]) == pytest.approx(2 * 1.5 * LN2)
    assert (float(sums["agreement"]), float(sums["teacher_mass"])) == (1.0, 2.0)


# --- the trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama with our tokens and eight rows of padding after them."""
    return save_random(
        tmp_path_factory.mktemp("teacher"),
        LlamaForCausalLM,
        LlamaConfig,
        rows=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,  # decided about its tokens
    )


class WithoutPadding:
    """A model whose logits beyond the vocabulary are cut off."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size = model, size

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits[..., : self.size]
        return output


SECTIONS: list[dict[str, Any]] = [
    {},
    {"weight": 1.0, "temperature": 2.0, "top_k": 5, "logits_chunk": 7},
    {"weight": 0.3, "divergence": "jsd", "beta": 0.2, "logits_chunk": 16},
    {"weight": 0.8, "divergence": "reverse_kl", "top_k": 3},
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_packed_gradient_is_that_of_the_samples_one_by_one(
    section: dict[str, Any], policy_path: Path, teacher_path: Path, chats: Path, tmp_path: Path
) -> None:
    teacher = {"model_name_or_path": str(teacher_path), **section}
    trainer = build_trainer(policy_path, chats, tmp_path, teacher=teacher)
    found, rows = first_gradient(trainer)
    assert max(len(row["seq_lengths"]) for row in rows) > 2
    model = reference_model(policy_path)
    size = len(trainer.processing_class)
    loss = distilled_loss(model, WithoutPadding(reference_model(teacher_path), size), samples_of(rows), section)
    loss.backward()
    assert relative_gap(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}) < 1e-5
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert 0 < logged["distillation/teacher_entropy"] < math.log(size)
    assert logged["distillation/teacher_mass"] == 1.0 or section.get("top_k")


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
)
def test_accumulation_and_checkpointing_do_not_change_the_gradient(
    changes: dict[str, Any], policy_path: Path, teacher_path: Path, chats: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "teacher": {"model_name_or_path": str(teacher_path), "weight": 0.7, "temperature": 1.5},
        "router": {"bias_update_speed": 0.01, "sequence_balance_alpha": 0.1},
        "mtp": {"init": "new"},
    }
    first = build_trainer(policy_path, chats, tmp_path, **settings)
    whole, whole_rows = first_gradient(first)
    second = build_trainer(policy_path, chats, tmp_path, **settings, training=changes)
    parts, rows = first_gradient(second)
    assert rows == whole_rows
    assert relative_gap(parts, whole) < 2e-6
    for name in ("divergence", "agreement", "teacher_entropy"):
        key = f"distillation/{name}"
        assert second.state.log_history[0][key] == pytest.approx(first.state.log_history[0][key], rel=1e-5)


def test_adapters_learn_from_a_teacher(policy_path: Path, teacher_path: Path, chats: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targets": ["attention"]},
        "training": {"max_steps": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    own = {"model_name_or_path": str(policy_path), "weight": 1.0}
    trainer = build_trainer(
        policy_path, chats, tmp_path / "self", **settings | {"training": {"max_steps": 1}}, teacher=own
    )
    gradients, _ = first_gradient(trainer)
    # Adapters begin at nothing, and so does the distance to the model they sit on.
    assert trainer.state.log_history[0]["distillation/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert gradients and all("lora_" in name for name in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-5
    other = {"model_name_or_path": str(teacher_path), "weight": 1.0}
    trainer = build_trainer(policy_path, chats, tmp_path / "other", **settings, teacher=other)
    trainer.train()
    apart = [line["distillation/divergence"] for line in trainer.state.log_history if "loss" in line]
    assert apart[-1] < 0.9 * apart[0]


def test_a_teacher_that_cannot_teach_is_refused(
    policy_path: Path, teacher_path: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, message: str, **section: Any) -> None:
        with pytest.raises(RunStopped, match=message):
            build_trainer(policy_path, chats, tmp_path, teacher={"model_name_or_path": str(path), **section})

    refused(teacher_path, r"teacher\.top_k=107 leaves none of 107 tokens out", top_k=107)
    other = tmp_path / "other"
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["new"])
    save_policy(reference_model(teacher_path), tokenizer, other)
    refused(other, r"another vocabulary .*108 tokens and 107.* python -m posttrain\.distill")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = build_recipe(policy_path, chats, tmp_path, teacher={"model_name_or_path": str(teacher_path)})
    with pytest.raises(RunStopped, match="teacher with FSDP"):
        sft_parts.require_teachable(recipe, build_tokenizer())


def test_the_plan_and_the_preflight_count_the_teacher_in(policy_path: Path, teacher_path: Path, tmp_path: Path) -> None:
    section = {"model_name_or_path": str(teacher_path), "weight": 0.25, "divergence": "jsd", "top_k": 8}
    recipe = build_recipe(policy_path, tmp_path / "chats.jsonl", tmp_path, teacher=section)
    plan = describe(recipe)
    assert f"0.75 x cross-entropy + 0.25 x jsd (beta 0.5) to the teacher {teacher_path}" in plan
    assert "over its 8 likeliest tokens and the rest, at temperature 1" in plan
    assert re.search(r"its teacher [\d.]+ KiB in each process: float32 weights", plan)
    policy, teacher = reference_model(policy_path), reference_model(teacher_path)
    memory = expected_memory(recipe, policy, 107, teacher)
    assert memory["teacher"] > sum(p.numel() * 4 for p in teacher.parameters())
    assert "teacher" not in expected_memory(recipe, policy, 107)


def test_a_teacher_that_is_not_there_is_noticed_at_once(policy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("")
    nowhere = {"model_name_or_path": str(tmp_path / "nowhere")}
    recipe = build_recipe(policy_path, tmp_path / "chats.jsonl", tmp_path, teacher=nowhere)
    with pytest.raises(RecipeError, match=r"teacher\.model_name_or_path: .* does not exist"):
        check_files(recipe, "r.yaml")
