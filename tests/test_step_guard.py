"""Steps that must not be taken: nothing moves, they are counted, and too many of them end in going back or stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_trainers import build_trainer, write_chats
from transformers import TrainerCallback

from data.chat import build_tokenizer
from posttrain import checkpoint as checkpoints
from posttrain.errors import RunStopped
from posttrain.learner import Learner
from posttrain.metrics import Metric
from posttrain.model.router import find_routers
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.sft_trainer import PolicyTrainer
from posttrain.skip_watch import SkipWatch
from posttrain.step_guard import StepGuard
from posttrain.types import Sample, TrainBatch
from tests.oracles.grpo_loss import random_samples, tiny_policy

# --- the rule


def test_what_is_not_finite_or_beyond_the_limit_is_not_allowed() -> None:
    guard = StepGuard(OptimizerSection(skip_grad_norm=5.0, max_skipped_steps=2))
    assert guard.allows(4.9) and guard.in_a_row == 0
    guard.see(torch.tensor(1.0))
    guard.see(torch.tensor(math.nan))
    assert not guard.allows(1.0) and guard.reason == "the loss is no number" and not guard.is_exhausted
    assert not guard.allows(5.1) and "5.1 (limit optimizer.skip_grad_norm=5)" in guard.reason and guard.is_exhausted
    assert guard.metrics("optim")["optim/skipped_in_a_row"].value == 2
    assert guard.allows(1.0) and not guard.is_exhausted and guard.metrics("optim")["optim/skipped"].value == 0
    for norm in (math.nan, math.inf):
        assert not guard.allows(norm)
    assert StepGuard(OptimizerSection()).allows(1e30)  # no limit unless the recipe sets one


def batch(skipped: int, in_a_row: int) -> dict[str, Metric]:
    return {"optim/skipped": Metric(skipped, "sum"), "optim/skipped_in_a_row": Metric(in_a_row, "last")}


def test_a_loop_goes_back_once_and_stops_if_that_does_not_help() -> None:
    watch = SkipWatch(OptimizerSection(max_skipped_steps=3), "optim")
    assert [watch.look(found) for found in ({}, batch(0, 0), batch(1, 1), batch(2, 3))] == ["", "", "", "rollback"]
    again = SkipWatch(OptimizerSection(max_skipped_steps=3), "optim")
    again.restore(watch.state())
    assert [again.look(found) for found in (batch(2, 2), batch(1, 3))] == ["", "stop"]
    # A step that was taken in between begins a new story.
    assert [watch.look(found) for found in (batch(1, 0), batch(3, 3))] == ["", "rollback"]


# --- GRPO's learner

LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Learner]:
    tiny_policy().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)

    def learner(path: Path = tmp_path, **optimizer: Any) -> Learner:
        return Learner(
            ModelSection(model_name_or_path=str(path), experts_implementation="eager"),
            OptimizerSection(learning_rate=1e-3, **optimizer),
            LearnerSection(),
            reference_path=None,
            router_section=GrpoRouterSection(bias_update_speed=0.01),
            temperature=1.0,
            max_completion_length=16,
            total_steps=10,
            seed=0,
        )

    return learner


def packed(samples: list[Sample]) -> TrainBatch:
    (found,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    return found


def step(learner: Learner, samples: list[Sample]) -> dict[str, Metric]:
    learner.forward_backward(packed(samples), AlgorithmSection(beta=0.0))
    return learner.optim_step()


@pytest.mark.parametrize("bad", [math.nan, 1e30])
def test_a_step_that_is_no_number_moves_nothing(make: Callable[..., Learner], bad: float) -> None:
    good = random_samples(LENGTHS)
    poisoned = [replace(good[0], advantage=bad), *good[1:]]
    broken, calm = make(), make()
    for learner in (broken, calm):
        assert step(learner, good)["optim/skipped"].value == 0
    found = step(broken, poisoned)
    assert (found["optim/skipped"].value, found["optim/steps"].value) == (1, 0)
    assert "optim/grad_norm" not in found and found["optim/skipped_in_a_row"].value == 1
    for learner in (broken, calm):
        assert step(learner, good)["optim/steps"].value == 1
    expected = dict(calm.checkpoint_tensors())
    for name, tensor in broken.checkpoint_tensors():
        assert torch.equal(tensor, expected[name]), name
    assert bool(find_routers(broken._model)[0].e_score_correction_bias.any())


def test_dropped_gradients_take_their_loss_with_them(make: Callable[..., Learner]) -> None:
    learner, good = make(), random_samples(LENGTHS)
    learner.forward_backward(packed([replace(good[0], advantage=math.nan), *good[1:]]), AlgorithmSection(beta=0.0))
    learner.drop_gradients()
    assert step(learner, good)["optim/skipped"].value == 0


def test_a_restored_learner_draws_the_same_and_has_the_numbers_of_its_recipe(
    make: Callable[..., Learner], tmp_path: Path
) -> None:
    learner, good = make(warmup_steps=4), random_samples(LENGTHS)
    step(learner, good)
    saved = tmp_path / "saved"
    saved.mkdir()
    learner.save(saved)
    drawn = torch.rand(3).tolist()
    resumed = make(saved, warmup_steps=4)
    torch.manual_seed(99)
    resumed.restore(saved)
    assert torch.rand(3).tolist() == drawn
    assert step(resumed, good)["optim/learning_rate"].value == step(learner, good)["optim/learning_rate"].value
    # A change that was allowed has an effect: the optimizer's state does not bring the old numbers back.
    changed = make(saved, warmup_steps=2, weight_decay=0.1, adam_beta2=0.9)
    changed.restore(saved)
    groups = changed._optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.9)
    assert step(changed, good)["optim/learning_rate"].value == pytest.approx(1e-3 / 2)


# --- the trainers of SFT and reward model


class Poison(TrainerCallback):
    """Makes the loss of some steps NaN, and remembers a weight before and after each."""

    def __init__(self, trainer: Any, steps: set[int]) -> None:
        self.seen: list[torch.Tensor] = [weight(trainer)]
        self._trainer, compute = trainer, trainer.compute_loss

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            return loss * math.nan if trainer.state.global_step + 1 in steps else loss

        trainer.compute_loss = poisoned
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(weight(self._trainer))

    def moved(self) -> list[bool]:
        """Of each step, whether it changed the weight."""
        return [not torch.equal(before, after) for before, after in zip(self.seen, self.seen[1:], strict=False)]


class Watch(TrainerCallback):
    """Calls something after each step."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look()


def weight(trainer: Any) -> torch.Tensor:
    # The last one: an adapter's second factor, which starts at zero and moves in the first step.
    return [p for name, p in trainer.model.named_parameters() if "o_proj" in name][-1].detach().clone()


@pytest.fixture
def sft(policy_path: Path, tmp_path: Path) -> Callable[..., PolicyTrainer]:
    write_chats(tmp_path / "chats.jsonl")

    def make(**changes: Any) -> PolicyTrainer:
        return build_trainer(policy_path, tmp_path / "chats.jsonl", tmp_path / "run", **changes)

    return make


def test_sft_skips_a_batch_that_is_no_number_and_goes_on(
    sft: Callable[..., PolicyTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = sft(training={"max_steps": 4}, router={"bias_update_speed": 0.01}, checkpoint={"save_steps": 1})
    poison = Poison(trainer, {2})
    trainer.train()
    trainer.require_progress(trainer._checkpoints)
    assert poison.moved() == [True, False, True, True]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["skipped_steps"] for line in logged] == [0, 1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in logged) and logged[2]["loss"] > 0.1
    assert "step 2 was not taken: the gradient norm is nan" in capsys.readouterr().err
    trainer.save_last(finished=True)
    assert [path.name for path in checkpoints.whole(trainer._checkpoints)] == ["step-3", "step-4"]


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4.0}])
def test_sft_goes_back_to_the_checkpoint_from_before_and_on_with_other_rows(
    sft: Callable[..., PolicyTrainer], capsys: pytest.CaptureFixture[str], lora: dict[str, Any] | None
) -> None:
    trainer = sft(
        training={"max_steps": 8},
        optimizer={"max_skipped_steps": 3, "warmup_steps": 20},
        checkpoint={"save_steps": 2},
        **({"lora": lora} if lora else {}),
    )
    poison = Poison(trainer, {4, 5, 6})
    rates: list[float] = []
    trainer.add_callback(Watch(lambda: rates.append(trainer.optimizer.param_groups[0]["lr"])))
    trainer.train()
    trainer.require_progress(trainer._checkpoints)
    # Step 3 moved, 4 to 6 did not, and after the sixth the weights were those of step 2.
    assert not torch.equal(poison.seen[3], poison.seen[2])
    assert torch.equal(poison.seen[5], poison.seen[3]) and torch.equal(poison.seen[6], poison.seen[2])
    assert poison.moved()[6:] == [True, True] and trainer.state.global_step == 8
    assert "those of step-2 again; the training goes on after step 6" in capsys.readouterr().err
    # So is the optimizer: two steps before, two after. The schedule has gone on.
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {4.0}
    assert rates == pytest.approx([1e-3 * step / 20 for step in range(1, 9)])


def test_sft_stops_after_too_many_and_keeps_the_checkpoint_from_before(sft: Callable[..., PolicyTrainer]) -> None:
    trainer = sft(
        training={"max_steps": 9},
        optimizer={"max_skipped_steps": 2},
        checkpoint={"save_steps": 1, "save_total_limit": 1},
    )
    Poison(trainer, {3, 4, 5, 6, 7, 8})
    trainer.train()
    assert trainer.state.global_step == 6  # back after step 4, and that did not help
    trainer._settle(require=True)
    with pytest.raises(
        RunStopped, match="2 steps in a row were not taken, the last one at step 6.*step-2 is the newest"
    ):
        trainer.require_progress(trainer._checkpoints)


def test_a_reward_model_skips_a_gradient_beyond_the_limit(policy_path: Path, tmp_path: Path) -> None:
    from posttrain.ranks import join_ranks
    from posttrain.recipe import RewardModelRecipe
    from posttrain.reward_parts import build_trainer as build_reward_trainer
    from posttrain.reward_parts import load_job
    from posttrain.run_dir import RunDir

    recipe = RewardModelRecipe.model_validate(
        {
            "run_name": "rm",
            "output_dir": str(tmp_path),
            "model": {"model_name_or_path": str(policy_path)},
            "datasets": [{"task": "letter_counting", "levels": [1], "size": 32}],
            "training": {"max_length": 96, "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
            "optimizer": {"learning_rate": 1e-3, "skip_grad_norm": 1e-9, "max_skipped_steps": 2},
            "validation": {"datasets": [{"task": "letter_counting", "levels": [1], "size": 8}]},
        }
    )
    trainer = build_reward_trainer(recipe, RunDir(tmp_path), load_job(recipe, None, join_ranks()))
    poison = Poison(trainer, set())
    trainer.train()
    assert poison.moved() == [False, False]
    with pytest.raises(RunStopped, match=r"limit optimizer.skip_grad_norm=1e-09\); there is no checkpoint yet"):
        trainer.require_progress(tmp_path / "checkpoints")
