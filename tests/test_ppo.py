"""PPO's parts: advantage estimation, the value loss, and the critic's gradient however its samples are laid out."""

from __future__ import annotations

import math
import os
import random
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posttrain import advantages, losses
from posttrain.grpo import with_returns
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, CriticSection, GrpoRecipe, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Sample
from tests.oracles.grpo_loss import random_samples, tiny_policy

LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4), (6, 9), (2, 3)]


def test_advantages_worked_by_hand() -> None:
    # delta: 0 + 0.9 x 0.2 - 0.5 = -0.32; 0 + 0.9 x 0.1 - 0.2 = -0.11; 1 - 0.1 = 0.9
    found, returns = advantages.generalized((0.0, 0.0, 1.0), (0.5, 0.2, 0.1), gamma=0.9, gae_lambda=0.5)
    last = 0.9
    middle = -0.11 + 0.45 * last
    first = -0.32 + 0.45 * middle
    assert found == pytest.approx((first, middle, last))
    assert returns == pytest.approx((first + 0.5, middle + 0.2, last + 0.1))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.97, 0.6)])
def test_advantages_are_the_sum_of_k_step_estimates(gamma: float, gae_lambda: float) -> None:
    """Equation 11 of the paper, written out: a weighted sum of k-step advantages, of which the last takes all that is left."""
    rng = random.Random(0)
    rewards, values = [rng.gauss(0, 1) for _ in range(7)], [rng.gauss(0, 1) for _ in range(7)]

    def k_steps(start: int, k: int) -> float:
        end = min(start + k, 7)
        total = sum(gamma ** (place - start) * rewards[place] for place in range(start, end))
        return total + (gamma**k * values[end] if end < 7 else 0.0) - values[start]

    found, _ = advantages.generalized(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    for start in range(7):
        left = 7 - start
        weights = [(1 - gae_lambda) * gae_lambda ** (k - 1) for k in range(1, left)]
        expected = sum(w * k_steps(start, k) for k, w in enumerate(weights, 1)) + gae_lambda ** (left - 1) * k_steps(
            start, left
        )
        assert found[start] == pytest.approx(expected)


def test_values_must_fit_the_rewards() -> None:
    with pytest.raises(ValueError, match="2 values for 3 rewards"):
        advantages.generalized((0.0, 0.0, 1.0), (0.5, 0.2), gamma=1.0, gae_lambda=1.0)


def test_the_reward_comes_last_and_each_token_pays_its_kl() -> None:
    assert advantages.token_rewards(2.0, (-1.0, -2.0), (-1.5, -1.0), 0.1) == pytest.approx((-0.05, 2.1))
    assert advantages.token_rewards(2.0, (-1.0, -2.0), None, 0.1) == (0.0, 2.0)


def test_without_a_critics_knowledge_it_is_the_kl_to_go() -> None:
    """Values of 0, gamma and lambda of 1: what REINFORCE with the KL in the reward takes."""
    algorithm = AlgorithmSection(preset="ppo", beta=0.3, gae_lambda=1.0)
    sample = Sample(
        (1,),
        (2, 3, 4),
        (-1.0,) * 3,
        0.7,
        old_logprobs=(-1.0, -2.0, -0.5),
        ref_logprobs=(-1.2, -1.0, -0.9),
        values=(0.0,) * 3,
    )
    expected = advantages.with_kl_to_go(0.7, sample.old_logprobs or (), sample.ref_logprobs or (), 0.3)
    found = with_returns(sample, algorithm)
    assert found.advantage == pytest.approx(expected) and found.returns == pytest.approx(expected)


def test_explained_variance() -> None:
    assert advantages.explained_variance([(1.0, 2.0), (4.0,)], [(1.0, 2.0), (4.0,)]) == 1.0
    assert advantages.explained_variance([(0.0, 0.0), (0.0,)], [(1.0, 2.0), (4.0,)]) == pytest.approx(0.0)
    assert advantages.explained_variance([(1.0,), (2.0,)], [(3.0,), (3.0,)]) == 0.0


def test_value_loss_worked_by_hand() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0, 0.1, 9.0]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    loss, metrics = losses.value_loss(values, old, returns, mask, 0.2)
    # 1.0 -> held at 0.7, the worse of 1 and 1.69; 1.0 -> worse of 1 and 0.49; 0.1 is within the clip: 0.81
    assert float(loss) == pytest.approx(0.5 * (1.69 + 1.0 + 0.81))
    loss.backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.0, 1.0, -0.9, 0.0])  # what is clipped has no gradient
    assert metrics["clip_fraction"] == 1 and float(metrics["value_mean"]) == pytest.approx(2.1)


# --- the critic -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.chat import build_tokenizer

    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def make_critic(checkpoint: Path, **learner: Any) -> Any:
    from posttrain.critic import Critic

    return Critic(
        ModelSection(model_name_or_path=str(checkpoint), experts_implementation="eager"),
        CriticSection(head_init_std=0.5, optimizer=OptimizerSection(learning_rate=1e-2)),
        LearnerSection(**learner),
        total_steps=100,
        seed=0,
    )


def with_targets(critic: Any, samples: list[Sample]) -> list[Sample]:
    """Samples with old values near the critic's, so that some errors clip."""
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    values = critic.values(batch, samples)
    rng = random.Random(2)
    return [
        replace(
            sample,
            values=tuple(value + rng.gauss(0, 0.3) for value in values[index]),
            returns=tuple(rng.gauss(0, 1) for _ in values[index]),
        )
        for index, sample in enumerate(samples)
    ]


def critic_gradients(
    critic: Any, samples: list[Sample], rank: int = 0, ranks: int = 1, **layout: Any
) -> dict[str, Any]:
    settings = {"max_tokens_per_microbatch": 64, "row_length": 32, **layout}
    critic.forward_backward(pack(samples, world_size=ranks, pad_token_id=0, **settings)[rank])
    found: dict[str, Any] = critic.gradients()
    critic._optimizer.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * max(float(value.norm()), 1e-3 * scale), name


def test_values_and_gradient_are_those_of_plain_transformers(checkpoint: Path) -> None:
    """Sample by sample, token by token: the head on the trunk's state before each token, and the loss as it is written."""
    critic = make_critic(checkpoint)
    samples = with_targets(critic, random_samples(LENGTHS))
    model = make_critic(checkpoint)._model.classifier
    total = sum(len(sample.completion_ids) for sample in samples)
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    found = critic.values(batch, samples)
    for index, sample in enumerate(samples):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        start = len(sample.prompt_ids)
        values = [model.score(states[start + offset - 1])[0] for offset in range(len(sample.completion_ids))]
        assert found[index] == pytest.approx([float(value) for value in values], abs=1e-5)
        for value, old, target in zip(values, sample.values or (), sample.returns or (), strict=True):
            near = old + torch.clamp(value - old, -0.2, 0.2)
            (torch.maximum((value - target) ** 2, (near - target) ** 2) / 2 / total).backward(retain_graph=True)
    expected = {f"classifier.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(critic_gradients(critic, samples), expected)


@pytest.mark.parametrize(
    "layout",
    [
        {"max_tokens_per_microbatch": 32},
        {"max_tokens_per_microbatch": 999},
        {"samples_per_row": 1, "max_tokens_per_microbatch": 32},
        {"row_length": 96, "max_tokens_per_microbatch": 999},
    ],
)
def test_gradient_does_not_depend_on_the_layout(checkpoint: Path, layout: dict[str, Any]) -> None:
    critic = make_critic(checkpoint)
    samples = with_targets(critic, random_samples(LENGTHS))
    assert_same(critic_gradients(critic, samples, **layout), critic_gradients(critic, samples))


def rank_gradients(rank: int, ranks: int, port: int, path: str) -> dict[str, Any]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    critic = make_critic(Path(path))
    samples = with_targets(critic, random_samples(LENGTHS))
    return critic_gradients(critic, samples, rank, ranks, max_tokens_per_microbatch=32)


def test_two_ranks_have_the_gradient_of_one(checkpoint: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        calls = [pool.submit(rank_gradients, rank, 2, port, str(checkpoint)) for rank in range(2)]
        found = [call.result() for call in calls]
    critic = make_critic(checkpoint)
    expected = critic_gradients(critic, with_targets(critic, random_samples(LENGTHS)))
    for gradients in found:
        names = {name.removeprefix("module."): value for name, value in gradients.items()}
        assert_same(names, expected)


def test_the_critic_learns_and_goes_on_where_it_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    from posttrain.critic import Critic

    critic = make_critic(checkpoint)
    samples = [
        replace(s, values=(0.0,) * len(s.completion_ids), returns=(2.0,) * len(s.completion_ids))
        for s in random_samples(LENGTHS)
    ]
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)

    def step(one: Any) -> float:
        loss: float = one.forward_backward(batch)["critic/value_loss"].value
        one.optim_step()
        return loss

    seen = [step(critic) for _ in range(5)]
    critic.save(tmp_path)
    again = Critic(
        ModelSection(model_name_or_path=str(checkpoint), experts_implementation="eager"),
        CriticSection(model_name_or_path=str(tmp_path), optimizer=OptimizerSection(learning_rate=1e-2)),
        LearnerSection(),
        total_steps=100,
        seed=0,
    )
    again.restore(tmp_path)
    assert [step(again) for _ in range(3)] == pytest.approx([step(critic) for _ in range(3)], rel=1e-6)
    assert step(critic) < 0.5 * seen[0] and math.isfinite(seen[0])


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": 1,
        "model": {"model_name_or_path": "some/model"},
        "datasets": [{"task": "chain_sum", "size": 10}],
        "rewards": [{"func": "rewards.task_answer:score"}],
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"num_generations": 1}}, "compared with others of its prompt"),
        ({"critic": {}}, "has no use with algorithm.baseline=group_mean"),
        ({"algorithm": {"preset": "ppo", "scale_rewards": "group"}}, "set scale_rewards: none"),
        ({"algorithm": {"gae_lambda": 0.9}}, "no meaning without baseline: critic"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GrpoRecipe.model_validate(recipe(**changes))
    GrpoRecipe.model_validate(recipe(algorithm="ppo", critic={}, rollout={"num_generations": 1}))
