"""The steps within a batch: what is measured before the first of them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import grpo
from posttrain.breaker import Verdict
from posttrain.errors import ParityError, RunInterrupted
from posttrain.grpo_job import GrpoJob
from posttrain.metrics import Metric
from posttrain.parity import Mismatch, ParityReport
from posttrain.recipe import GrpoRecipe
from posttrain.types import Sample

RECIPE: dict[str, Any] = {
    "max_steps": 1,
    "model": {"model_name_or_path": "somewhere"},
    "datasets": [{"task": "letter_counting", "size": 100}],
    "rewards": [{"func": "rewards.format:score"}],
    "rollout": {"num_prompts": 4, "num_generations": 4},
    "algorithm": {"num_minibatches": 2, "num_iterations": 2, "old_policy": "sampler", "beta": 0},
    "parity": {"measured_on": "first_minibatch"},
}


class Scripted:
    """A learner that writes down what it is asked for."""

    def __init__(self, gap: float) -> None:
        self.calls: list[str] = []
        self._parity = ParityReport(tokens=1, gap_max=gap, relative_gap_max=gap)

    def forward_backward(self, samples: list[Sample], algorithm: Any) -> dict[str, Metric]:
        self.calls.append("gradient")
        return {"policy/loss": Metric(0.0, "mean")}

    def forward_backward_compared(self, samples: list[Sample], algorithm: Any, *, near_tie_margin: float) -> Any:
        self.calls.append("compared")
        return {"policy/loss": Metric(0.0, "mean")}, (self._parity, Mismatch())

    def optim_step(self) -> dict[str, Metric]:
        self.calls.append("step")
        return {}


def learn(learner: Scripted, advantages: list[float]) -> Any:
    samples = [Sample((1,), (2,), (-1.0,), advantage) for advantage in advantages]
    recipe = GrpoRecipe.model_validate(RECIPE)
    bundles = SimpleNamespace(watch=lambda *_: nullcontext({}))
    job: Any = SimpleNamespace(recipe=recipe, learner=learner, bundles=bundles, critic=None, critic_warmup=0, step=0)
    return grpo.learn(samples, job, Verdict(None), measure=True)


def test_only_what_is_trained_on_first_is_compared() -> None:
    learner = Scripted(gap=1e-6)
    _, agreement = learn(learner, [1.0, -1.0, 1.0, -1.0])
    assert learner.calls == ["compared", "step", "gradient", "step", "gradient", "step", "gradient", "step"]
    assert agreement[0].gap_max == 1e-6


def test_no_step_is_taken_on_what_was_not_sampled_by_the_policy() -> None:
    learner = Scripted(gap=0.5)
    with pytest.raises(ParityError, match="differ by 5"):
        learn(learner, [1.0, -1.0, 1.0, -1.0])
    assert learner.calls == ["compared"]


def test_a_batch_without_signal_is_not_compared_in_training() -> None:
    learner = Scripted(gap=1e-6)
    assert learn(learner, [0.0, 0.0, 0.0, 0.0])[1] is None and learner.calls == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"algorithm": {"old_policy": "learner", "beta": 0}}, "algorithm.old_policy: learner"),
        ({"algorithm": {"old_policy": "sampler", "beta": 0.1}}, "algorithm.beta=0.1"),
        ({"breaker": {"max_kl": 0.1}}, "breaker"),
        (
            {"algorithm": {"preset": "on_policy_distillation", "old_policy": "sampler", "importance": "none"},
             "teacher": {"model_name_or_path": "there"}},
            "algorithm.distill_coef",
        ),
    ],
)  # fmt: skip
def test_what_needs_the_batch_scored_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"first_minibatch with {named}"):
        GrpoRecipe.model_validate({**RECIPE, **changes})


@pytest.mark.parametrize(
    ("step", "saved_step", "is_tripped", "saves"),
    [(7, 5, False, 1), (5, 5, False, 0), (0, -1, False, 0), (7, 5, True, 0)],
)
def test_when_no_sampler_is_left_the_policy_between_two_steps_is_saved(
    step: int, saved_step: int, is_tripped: bool, saves: int
) -> None:
    def rollouts() -> Any:
        raise RunInterrupted("no sampler is left")
        yield

    calls: list[int] = []
    breaker = SimpleNamespace(is_tripped=is_tripped)
    job: Any = SimpleNamespace(step=step, saved_step=saved_step, breaker=breaker, save=lambda: calls.append(step))
    with pytest.raises(RunInterrupted, match="no sampler is left"):
        GrpoJob.next_rollout(job, rollouts())
    assert len(calls) == saves
