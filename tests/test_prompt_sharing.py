"""Prompts that are computed once for several samples: the same numbers as sample by sample, from fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.learner import Learner
from posttrain.packing import pack, padding_fraction
from posttrain.prompt_sharing import require_shareable
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Sample, TrainBatch
from tests.oracles.grpo_loss import random_samples, tiny_policy

LENGTHS = [(3, 7), (3, 2), (5, 11), (3, 4), (5, 9), (2, 3)]


def group_samples() -> list[Sample]:
    """Six samples with three prompts, those of one prompt not side by side."""
    samples = random_samples(LENGTHS)
    first = {len(sample.prompt_ids): sample.prompt_ids for sample in reversed(samples)}
    return [replace(sample, prompt_ids=first[len(sample.prompt_ids)]) for sample in samples]


def packed(samples: list[Sample], *, share: bool, tokens: int = 999, **settings: Any) -> TrainBatch:
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=tokens, row_length=32, pad_token_id=0, share_prompts=share,
        **settings,
    )  # fmt: skip
    return batch


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Learner]:
    from data.chat import build_tokenizer

    tiny_policy().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)

    def learner(attention: str = "sdpa", **router: Any) -> Learner:
        return Learner(
            ModelSection(
                model_name_or_path=str(tmp_path), experts_implementation="eager", attn_implementation=attention
            ),
            OptimizerSection(learning_rate=1e-3),
            LearnerSection(share_prompts=True),
            reference_path=str(tmp_path),
            router_section=GrpoRouterSection(**router),
            temperature=0.7,
            max_completion_length=16,
            total_steps=10,
            seed=0,
        )

    return learner


def test_a_row_by_hand() -> None:
    a = Sample((5, 6), (7, 8), (-1.0, -1.0), 1.0)
    b = Sample((5, 6), (9,), (-1.0,), 1.0)
    c = Sample((3,), (4,), (-1.0,), 1.0)
    (microbatch,) = packed([a, c, b], share=True).microbatches
    shared = microbatch.shared
    assert shared is not None
    assert shared.input_ids_QX.tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert shared.position_ids_QX.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    # Rows of whole samples are what they always were, and lead into the row that is computed.
    assert microbatch.input_ids_RW.tolist() == [[5, 6, 7, 8, 5, 6, 9, 3, 4]]
    assert microbatch.sample_ids_RW.tolist() == [[0, 0, 0, 0, 2, 2, 2, 1, 1]]
    assert shared.places_N.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    seen = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert shared.attention_mask(additive=False)[0, 0].int().tolist() == seen
    additive = shared.attention_mask(additive=True)[0, 0]
    assert (additive == 0).int().tolist() == seen and additive.min() == torch.finfo(torch.float32).min


def test_a_family_that_is_longer_than_a_row_is_computed_in_parts() -> None:
    samples = [Sample((1, 2, 3), tuple(range(4, 14)), (-1.0,) * 10, 1.0) for _ in range(5)]
    (microbatch,) = packed(samples, share=True).microbatches
    assert microbatch.shared is not None
    # 3 + 10 + 10 tokens twice, and 3 + 10 in a row that has room for 32: 23, 23, 13.
    rows_Q = (microbatch.shared.families_QX >= 0).sum(dim=1).tolist()
    assert sorted(rows_Q) == [13, 23, 23] and sorted(microbatch.sample_ids_RW.unique().tolist()) == [-1, 0, 1, 2, 3, 4]
    assert padding_fraction([packed(samples, share=True)]) == pytest.approx(10 / 69)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [999, 32])
def test_gradient_logprobs_and_loads_are_those_of_the_samples_alone(
    make: Callable[..., Learner], attention: str, tokens: int
) -> None:
    learner, samples = make(attention, bias_update_speed=0.01), group_samples()
    algorithm = AlgorithmSection(beta=0.05, num_minibatches=1, entropy_coef=0.01)
    found = []
    for batch in (packed(samples, share=False, samples_per_row=1), packed(samples, share=True, tokens=tokens)):
        scores = learner.score(batch, samples, near_tie_margin=0.0)
        learner.drop_gradients()
        learner.forward_backward(batch, algorithm)
        found.append((scores, learner.gradients(), learner._balance._step_LE.tolist()))
        learner.drop_gradients()
    (alone, gradients, loads), (shared, shared_gradients, shared_loads) = found
    for index in range(len(samples)):
        assert shared.logprobs[index] == pytest.approx(alone.logprobs[index], abs=2e-6)
        assert shared.ref_logprobs[index] == pytest.approx(alone.ref_logprobs[index], abs=2e-6)
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (shared_gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * whole), name
    # A prompt counts for each of its completions, as it does where each is computed.
    assert shared_loads == loads
    computed = [
        int((part.shared.families_QX >= 0).sum()) for part in packed(samples, share=True).microbatches if part.shared
    ]
    assert (sum(computed), sum(map(sum, LENGTHS))) == (3 + 13 + 5 + 20 + 2 + 3, 57)


def test_replayed_experts_reach_each_token(make: Callable[..., Learner]) -> None:
    learner, samples = make(replay=True), group_samples()
    rng = np.random.default_rng(0)
    experts_of: dict[
        tuple[int, ...], np.ndarray
    ] = {}  # of tokens read so far: a prompt's are the same for each completion
    layers, experts, chosen = len(learner._routers), 4, 2

    def planned(sample: Sample) -> np.ndarray:
        read = sample.prompt_ids + sample.completion_ids
        for length in range(1, len(read)):
            if read[:length] not in experts_of:
                experts_of[read[:length]] = np.stack([rng.permutation(experts)[:chosen] for _ in range(layers)]).astype(
                    np.int16
                )
        return np.stack([experts_of[read[:length]] for length in range(1, len(read))])

    samples = [replace(sample, experts_TLK=planned(sample)) for sample in samples]
    found = []
    for share in (False, True):
        batch = packed(samples, share=share, with_experts=True)
        scores = learner.score(batch, samples, near_tie_margin=0.0)
        assert scores.parity.metrics()["parity/routing_agreement"].value == 1.0
        found.append(scores.logprobs)
    for index in range(len(samples)):
        assert found[1][index] == pytest.approx(found[0][index], abs=2e-6)


def test_what_would_not_heed_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="share_prompts with logits_chunk: null.*set logits_chunk: 1024"):
        LearnerSection(share_prompts=True, logits_chunk=None)
    model = tiny_policy()
    require_shareable(model)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding window.*set share_prompts: false"):
        require_shareable(model)
    model.config.sliding_window = None
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask.*attn_implementation: sdpa"):
        require_shareable(model)
