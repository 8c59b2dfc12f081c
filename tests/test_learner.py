"""The learner's gradient against plain transformers and a hand-written loss, and against its own other layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.learner import Learner
from posttrain.model.router import find_routers
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Sample
from tests.oracles.grpo_loss import completion_logprobs, grpo_loss, random_samples, tiny_policy

LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4), (6, 9), (2, 3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.chat import build_tokenizer

    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def arguments(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": ModelSection(model_name_or_path=str(checkpoint), experts_implementation="eager"),
        "optimizer": OptimizerSection(learning_rate=1e-3),
        "reference_path": str(checkpoint),
        "router_section": GrpoRouterSection(),
        "temperature": 1.0,
        "max_completion_length": 16,
        "total_steps": 10,
        "seed": 0,
        **changes,
    }


@pytest.fixture
def learner(checkpoint: Path) -> Iterator[Learner]:
    yield Learner(learner=LearnerSection(), **arguments(checkpoint))


def near(samples: list[Sample], model: Any) -> list[Sample]:
    """Samples whose old and reference logprobs are close to the policy's, so that some ratios clip and some do not."""
    generator = torch.Generator().manual_seed(1)
    moved = []
    for sample in samples:
        logprobs = completion_logprobs(model, sample).detach()
        old = logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator)
        ref = logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator)
        moved.append(replace(sample, old_logprobs=tuple(old.tolist()), ref_logprobs=tuple(ref.tolist())))
    return moved


def gradients(learner: Learner, samples: list[Sample], algorithm: AlgorithmSection, **layout: Any) -> dict[str, Any]:
    settings = {"max_tokens_per_microbatch": 64, "row_length": 32, **layout}
    (batch,) = pack(samples, world_size=1, pad_token_id=0, **settings)
    learner.forward_backward(batch, algorithm)
    found = learner.gradients()
    learner._optimizer.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * max(float(value.norm()), 1e-3 * scale), name


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_equals_plain_transformers_and_a_hand_written_loss(learner: Learner, aggregation: Any) -> None:
    model = tiny_policy()
    model.set_experts_implementation("eager")
    samples = near(random_samples(LENGTHS), model)
    algorithm = AlgorithmSection(epsilon=0.2, epsilon_high=0.28, beta=0.05, loss_aggregation=aggregation)
    logprobs = [completion_logprobs(model, sample) for sample in samples]
    grpo_loss(samples, logprobs, epsilon_low=0.2, epsilon_high=0.28, beta=0.05, aggregation=aggregation).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients(learner, samples, algorithm), expected, 1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(
    "layout",
    [
        {"max_tokens_per_microbatch": 32},
        {"max_tokens_per_microbatch": 4096},
        {"max_tokens_per_microbatch": 64, "samples_per_row": 1},
        {"max_tokens_per_microbatch": 90, "row_length": 90},
    ],
    ids=["one row each", "one microbatch", "padded", "long rows"],
)
def test_gradient_does_not_depend_on_the_layout(learner: Learner, layout: dict[str, Any], aggregation: Any) -> None:
    samples = near(random_samples(LENGTHS), tiny_policy())
    algorithm = AlgorithmSection(beta=0.05, loss_aggregation=aggregation)
    assert_same(gradients(learner, samples, algorithm, **layout), gradients(learner, samples, algorithm), 1e-5)


def test_gradient_checkpointing_changes_neither_gradient_nor_expert_counts(learner: Learner, checkpoint: Path) -> None:
    samples = near(random_samples(LENGTHS), tiny_policy())
    expected = gradients(learner, samples, AlgorithmSection())
    counted = learner._balance.step_counts_LE
    saving = Learner(learner=LearnerSection(gradient_checkpointing=True), **arguments(checkpoint))
    assert_same(gradients(saving, samples, AlgorithmSection()), expected, 1e-5)
    assert saving._balance.step_counts_LE.tolist() == counted.tolist()
    # Every real token goes to two experts, padding to none.
    assert int(counted.sum()) == 2 * sum(prompt + completion for prompt, completion in LENGTHS)


def test_scores_are_the_models_own_and_name_what_differs(learner: Learner) -> None:
    model = tiny_policy()
    samples = random_samples(LENGTHS[:3])
    exact = [replace(s, sampler_logprobs=tuple(completion_logprobs(model, s).tolist())) for s in samples]
    (batch,) = pack(exact, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    scores = learner.score(batch, exact, near_tie_margin=1e-5)
    for index, sample in enumerate(exact):
        assert scores.logprobs[index] == pytest.approx(sample.sampler_logprobs, abs=1e-5)
        assert scores.ref_logprobs[index] == pytest.approx(sample.sampler_logprobs, abs=1e-5)
    assert scores.parity.gap_max < 1e-5
    wrong = [exact[0], replace(exact[1], sampler_logprobs=tuple(v - 0.5 for v in exact[1].sampler_logprobs))]
    (batch,) = pack(wrong, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    parity = learner.score(batch, wrong, near_tie_margin=1e-5).parity
    assert parity.gap_max == pytest.approx(0.5, abs=1e-4)
    assert parity.worst.startswith("sample 1,")


def test_parity_in_the_forward_pass_of_training_is_that_of_scoring_and_changes_no_gradient(learner: Learner) -> None:
    samples = near(random_samples(LENGTHS), tiny_policy())
    algorithm = AlgorithmSection(old_policy="sampler")
    expected = gradients(learner, samples, algorithm)
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=32, row_length=32, pad_token_id=0)
    assert len(batch.microbatches) > 1
    scores = learner.score(batch, samples, near_tie_margin=1e-5)
    metrics, (parity, apart) = learner.forward_backward_compared(batch, samples, algorithm, near_tie_margin=1e-5)
    assert_same(learner.gradients(), expected, 1e-6)
    learner.drop_gradients()
    assert metrics.keys() == learner.forward_backward(batch, algorithm).keys()
    learner.drop_gradients()
    assert parity.tokens == scores.parity.tokens == apart.tokens and parity.gap_max > 0.01
    assert parity.gap_max == pytest.approx(scores.parity.gap_max, abs=1e-5)
    assert apart.kl == pytest.approx(scores.mismatch.kl, rel=1e-4)


def test_a_step_moves_the_bias_against_the_load(checkpoint: Path) -> None:
    learner = Learner(
        learner=LearnerSection(), **arguments(checkpoint, router_section=GrpoRouterSection(bias_update_speed=0.01))
    )
    samples = near(random_samples(LENGTHS), tiny_policy())
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    learner.forward_backward(batch, AlgorithmSection())
    counts = learner._balance.step_counts_LE[0].clone()
    learner.optim_step()
    bias = find_routers(learner._model)[0].e_score_correction_bias
    assert bias.tolist() == pytest.approx((0.01 * torch.sign(counts.mean() - counts)).tolist())


def test_saving_and_restoring_continues_exactly(learner: Learner, checkpoint: Path, tmp_path: Path) -> None:
    samples = near(random_samples(LENGTHS), tiny_policy())
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)

    def step(which: Learner) -> None:
        which.forward_backward(batch, AlgorithmSection())
        which.optim_step()

    step(learner)
    learner.save(tmp_path)
    resumed = Learner(learner=LearnerSection(), **arguments(tmp_path))
    resumed.restore(tmp_path)
    for which in (learner, resumed):
        step(which)
    expected = dict(learner.checkpoint_tensors())
    for name, tensor in resumed.checkpoint_tensors():
        assert torch.equal(tensor, expected[name]), name


# --- routing replay ---------------------------------------------------------------------------------------------------


def foreign_experts(samples: list[Sample], seed: int = 3) -> list[Sample]:
    """Samples with experts as another router would choose them: for each token one of the two groups."""
    generator = np.random.default_rng(seed)
    return [
        replace(
            sample,
            experts_TLK=np.array(
                [
                    [generator.permutation(2) + 2 * generator.integers(2)]
                    for _ in range(len(sample.prompt_ids) + len(sample.completion_ids) - 1)
                ],
                np.int16,
            ),
        )
        for sample in samples
    ]


def replaying(checkpoint: Path, **section: Any) -> Learner:
    return Learner(
        learner=LearnerSection(**section), **arguments(checkpoint, router_section=GrpoRouterSection(replay=True))
    )


def forced_logprobs(model: Any, sample: Sample) -> torch.Tensor:
    """An independent forward pass: the router's own code with a bias that makes it choose the given experts."""
    assert sample.experts_TLK is not None
    (router,) = find_routers(model)
    ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
    planned = torch.from_numpy(sample.experts_TLK[:, 0].astype(np.int64))
    bias_TE = torch.zeros(len(ids), 4).index_put_((torch.arange(len(planned))[:, None], planned), torch.full((), 9.0))
    router.e_score_correction_bias = bias_TE  # of each token its own
    logits = model(ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[len(sample.prompt_ids) - 1 : -1].float(), dim=-1)
    return logprobs.gather(1, torch.tensor(sample.completion_ids)[:, None])[:, 0]


def test_replayed_experts_are_used_and_the_gates_stay_the_learners(checkpoint: Path) -> None:
    samples = foreign_experts(random_samples(LENGTHS))
    learner = replaying(checkpoint)
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0, with_experts=True
    )
    scores = learner.score(batch, samples, near_tie_margin=1e-5)
    assert scores.parity.routing_agreement == 1.0
    assert sum(scores.mismatch.flips) > 0  # the learner's own router would have chosen others
    for index, sample in enumerate(samples):
        assert scores.logprobs[index] == pytest.approx(forced_logprobs(tiny_policy(), sample).tolist(), abs=1e-5)
    own = Learner(learner=LearnerSection(), **arguments(checkpoint)).score(batch, samples, near_tie_margin=1e-5)
    assert own.parity.routing_agreement < 1.0
    assert own.logprobs[0] != pytest.approx(scores.logprobs[0], abs=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_with_replay_is_that_of_the_forced_router(checkpoint: Path, checkpointing: bool) -> None:
    samples = foreign_experts(random_samples(LENGTHS))
    learner = replaying(checkpoint, gradient_checkpointing=checkpointing)
    algorithm = AlgorithmSection(policy_loss="reinforce", num_minibatches=1, beta=0.0)
    found = gradients(learner, near(samples, tiny_policy()), algorithm, with_experts=True)
    model = tiny_policy()
    total = sum(len(sample.completion_ids) for sample in samples)
    for sample in samples:
        (-float(sample.advantage) * forced_logprobs(model, sample).sum() / total).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(found[next(n for n in found if n.endswith("gate.weight"))].norm()) > 0  # the router goes on learning
    assert_same(found, expected, 1e-5)


def test_replay_refuses_another_models_experts(checkpoint: Path) -> None:
    samples = [replace(s, experts_TLK=np.zeros((9, 3, 2), np.int16)) for s in random_samples([(3, 7)])]
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0, with_experts=True
    )
    with pytest.raises(ValueError, match="experts of 3 layers and the model has 1"):
        replaying(checkpoint).forward_backward(batch, AlgorithmSection())


def with_answers(samples: list[Sample]) -> list[Sample]:
    """Samples of which every third token and the last but two came from an environment."""
    marked = []
    for sample in samples:
        count = len(sample.completion_ids)
        marked.append(replace(sample, trained=tuple(place % 3 != 1 and place != count - 3 for place in range(count))))
    return marked


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_an_environments_tokens_are_seen_but_not_trained(learner: Learner, aggregation: Any) -> None:
    """The gradient is that of a hand-written loss over the sampled tokens, each predicted from all tokens before it."""
    model = tiny_policy()
    model.set_experts_implementation("eager")
    samples = with_answers(near(random_samples(LENGTHS), model))
    algorithm = AlgorithmSection(epsilon=0.2, epsilon_high=0.28, beta=0.05, loss_aggregation=aggregation)

    def only_trained(sample: Sample) -> Sample:
        keep = [place for place, trained in enumerate(sample.trained or ()) if trained]
        old, ref = sample.old_logprobs or (), sample.ref_logprobs or ()
        return replace(
            sample,
            completion_ids=tuple(sample.completion_ids[place] for place in keep),
            old_logprobs=tuple(old[place] for place in keep),
            ref_logprobs=tuple(ref[place] for place in keep),
        )

    logprobs = [completion_logprobs(model, sample)[torch.tensor(sample.trained)] for sample in samples]
    shortened = [only_trained(sample) for sample in samples]
    grpo_loss(shortened, logprobs, epsilon_low=0.2, epsilon_high=0.28, beta=0.05, aggregation=aggregation).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients(learner, samples, algorithm), expected, 1e-5)

    # Whatever stands where nobody sampled is not looked at ...
    def spoilt(values: tuple[float, ...] | None, sample: Sample) -> tuple[float, ...]:
        return tuple(v if trained else 99.0 for v, trained in zip(values or (), sample.trained or (), strict=True))

    wrong = [
        replace(
            s,
            old_logprobs=spoilt(s.old_logprobs, s),
            ref_logprobs=spoilt(s.ref_logprobs, s),
            sampler_logprobs=spoilt(s.sampler_logprobs, s),
        )
        for s in samples
    ]
    assert_same(gradients(learner, wrong, algorithm), expected, 1e-5)
    # ... but the tokens themselves are what the others follow on.
    other = [replace(s, completion_ids=(s.completion_ids[0], 4, *s.completion_ids[2:])) for s in samples]
    name = "model.embed_tokens.weight"
    assert not torch.allclose(gradients(learner, other, algorithm)[name], expected[name], rtol=1e-2)


def test_scores_and_parity_of_several_turns_stay_aligned(learner: Learner) -> None:
    model = tiny_policy()
    samples = with_answers(random_samples(LENGTHS))
    exact = []
    for sample in samples:
        values = completion_logprobs(model, sample).tolist()
        kept = tuple(v if trained else 0.0 for v, trained in zip(values, sample.trained or (), strict=True))
        exact.append(replace(sample, sampler_logprobs=kept))
    (batch,) = pack(exact, world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    count = sum(sum(sample.trained or ()) for sample in exact)
    assert batch.num_loss_tokens == count
    scores = learner.score(batch, exact, near_tie_margin=1e-5)
    for index, sample in enumerate(exact):
        assert scores.logprobs[index] == pytest.approx(sample.sampler_logprobs, abs=1e-5)  # 0 where nobody sampled
        assert scores.ref_logprobs[index] == pytest.approx(sample.sampler_logprobs, abs=1e-5)
    assert scores.parity.tokens == scores.mismatch.tokens == count
    assert scores.parity.gap_max < 1e-5 and scores.mismatch.kl < 1e-8
