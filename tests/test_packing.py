"""Packing: nothing lost, nothing doubled, ranks in step, and the model cannot tell how samples were packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import losses
from posttrain.packing import pack, padding_fraction, unpack
from posttrain.policy_losses import PolicyTokens, clipped
from posttrain.types import Sample, TrainBatch
from tests.oracles.grpo_loss import completion_logprobs, grpo_loss, random_samples, tiny_policy

PAD = 0


def microbatch_shapes(batches: Sequence[TrainBatch]) -> list[list[tuple[int, ...]]]:
    return [[tuple(m.input_ids_RW.shape) for m in batch.microbatches] for batch in batches]


# --- worked by hand -------------------------------------------------------------------------------------------------


def test_every_field_by_hand() -> None:
    samples = [
        Sample((11, 12), (13,), (-0.5,), 2.0, old_logprobs=(-0.25,), ref_logprobs=(-1.5,)),
        Sample((21,), (22, 23, 24), (-1.0, -2.0, -3.0), -1.0),
    ]
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=8, row_length=8, pad_token_id=9)
    (microbatch,) = batch.microbatches
    # The longer sample goes first; the row is cut to its 7 tokens.
    expected = {
        "input_ids_RW": [[21, 22, 23, 24, 11, 12, 13]],
        "position_ids_RW": [[0, 1, 2, 3, 0, 1, 2]],
        "sample_ids_RW": [[1, 1, 1, 1, 0, 0, 0]],
        "loss_mask_RW": [[False, True, True, True, False, False, True]],
        "advantages_RW": [[0, -1, -1, -1, 0, 0, 2]],
        "sampler_logprobs_RW": [[0, -1, -2, -3, 0, 0, -0.5]],
        "old_logprobs_RW": [[0, 0, 0, 0, 0, 0, -0.25]],
        "ref_logprobs_RW": [[0, 0, 0, 0, 0, 0, -1.5]],
    }
    assert {name: getattr(microbatch, name).tolist() for name in expected} == expected
    types = {name: getattr(microbatch, name).dtype for name in expected}
    assert {types.pop(f"{n}_RW") for n in ("input_ids", "position_ids", "sample_ids")} == {torch.int64}
    assert types.pop("loss_mask_RW") == torch.bool
    assert set(types.values()) == {torch.float32}
    assert (batch.num_loss_tokens, batch.num_samples) == (4, 2)


def test_tokens_that_were_not_sampled_by_hand() -> None:
    mask = (True, False, False, True)
    sample = Sample((11,), (12, 13, 14, 15), (-1.0, 0.0, 0.0, -2.0), (2.0, 3.0, 4.0, 5.0), trained=mask)
    sample = replace(sample, old_logprobs=(-1.5, -9.0, -9.0, -2.5), ref_logprobs=(-3.0, -9.0, -9.0, -4.0))
    (batch,) = pack([sample], world_size=1, max_tokens_per_microbatch=8, row_length=8, pad_token_id=9)
    (microbatch,) = batch.microbatches
    assert microbatch.input_ids_RW.tolist() == [[11, 12, 13, 14, 15]]
    assert microbatch.loss_mask_RW.tolist() == [[False, True, False, False, True]]
    assert microbatch.advantages_RW.tolist() == [[0, 2, 0, 0, 5]]
    assert microbatch.sampler_logprobs_RW.tolist() == [[0, -1, 0, 0, -2]]
    assert microbatch.old_logprobs_RW.tolist() == [[0, -1.5, 0, 0, -2.5]]
    assert microbatch.ref_logprobs_RW.tolist() == [[0, -3, 0, 0, -4]]
    assert (batch.num_loss_tokens, batch.num_samples) == (2, 1)
    assert unpack([torch.arange(5.0)[None]], batch, [sample]) == {0: (1.0, 0.0, 0.0, 4.0)}
    with pytest.raises(ValueError, match="order of pack"):
        unpack([torch.arange(5.0)[None]], batch, [replace(sample, trained=(False, True, False, True))])
    with pytest.raises(ValueError, match="no token that was sampled"):
        pack(
            [replace(sample, trained=(False,) * 4)],
            world_size=1,
            max_tokens_per_microbatch=8,
            row_length=8,
            pad_token_id=9,
        )


def test_padding_by_hand() -> None:
    samples = random_samples([(2, 3), (1, 1)])
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=20, row_length=10, pad_token_id=7, samples_per_row=1
    )
    (microbatch,) = batch.microbatches
    assert microbatch.input_ids_RW.shape == (2, 5)
    assert microbatch.input_ids_RW[1, 2:].tolist() == [7, 7, 7]
    assert microbatch.position_ids_RW[1].tolist() == [0, 1, 0, 0, 0]
    assert microbatch.sample_ids_RW[1].tolist() == [1, 1, -1, -1, -1]
    assert padding_fraction([batch]) == 3 / 10


def test_best_fit_fills_rows() -> None:
    # Into rows of 10: 7+3, 6+4, 5+5; first-fit in the order given would need a fourth row.
    samples = random_samples([(1, n - 1) for n in (3, 5, 4, 6, 5, 7)])
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=30, row_length=10, pad_token_id=PAD)
    assert microbatch_shapes([batch]) == [[(3, 10)]]
    assert padding_fraction([batch]) == 0


def test_best_fit_prefers_the_fullest_row() -> None:
    # Rows of 20: 13 | 9+8, with 7 and 3 left. The first 3 must take the second row, so that 3+2+2 fit the first;
    # first-fit would put both 3s into the first row and need a third one.
    samples = random_samples([(1, n - 1) for n in (13, 9, 8, 3, 3, 2, 2)])
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=60, row_length=20, pad_token_id=PAD)
    assert microbatch_shapes([batch]) == [[(2, 20)]]


def test_microbatches_hold_rows_of_like_length() -> None:
    samples = random_samples([(2, 18), (2, 2), (2, 16), (2, 1)])
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=40, row_length=20, pad_token_id=PAD, samples_per_row=1
    )
    assert microbatch_shapes([batch]) == [[(2, 20), (2, 4)]]
    # Rows come about as 6 | 6 | 5+5, and the longest one must not make the others wide.
    samples = random_samples([(1, n - 1) for n in (6, 6, 5, 5)])
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=20, row_length=10, pad_token_id=PAD)
    assert microbatch_shapes([batch]) == [[(2, 6), (1, 10)]]


def test_work_is_cut_for_all_ranks() -> None:
    # Four rows fit one microbatch, but then the second rank would have nothing to do.
    samples = random_samples([(2, 8)] * 4)
    batches = pack(samples, world_size=2, max_tokens_per_microbatch=100, row_length=10, pad_token_id=PAD)
    assert microbatch_shapes(batches) == [[(2, 10)], [(2, 10)]]


def test_ranks_get_like_numbers_of_tokens() -> None:
    samples = random_samples([(1, n - 1) for n in (40, 30, 20, 10)])
    batches = pack(
        samples, world_size=2, max_tokens_per_microbatch=40, row_length=40, pad_token_id=PAD, samples_per_row=1
    )
    assert microbatch_shapes(batches) == [[(1, 40), (1, 10)], [(1, 30), (1, 20)]]


def test_a_rank_without_work_gets_padding_and_differentiates() -> None:
    batches = pack(random_samples([(2, 3)]), world_size=3, max_tokens_per_microbatch=8, row_length=8, pad_token_id=PAD)
    assert [len(batch.microbatches) for batch in batches] == [1, 1, 1]
    assert [batch.num_loss_tokens for batch in batches] == [3, 3, 3]
    (empty,) = batches[2].microbatches
    assert not empty.loss_mask_RW.any()
    assert (empty.sample_ids_RW == -1).all()
    # Its backward pass must reach every parameter with a zero: gradient hooks wait for it on the other ranks.
    model = tiny_policy()
    loss = policy_loss(model, batches[2], "sequence", beta=0.1)
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert unpack([torch.zeros(empty.input_ids_RW.shape)], batches[2], random_samples([(2, 3)])) == {}


def test_errors_name_the_cure() -> None:
    good = random_samples([(2, 3)])[0]
    arguments: dict[str, Any] = {
        "world_size": 1,
        "max_tokens_per_microbatch": 4,
        "row_length": 5,
        "pad_token_id": PAD,
    }
    pack([good], **arguments)
    for sample, message in (
        (replace(good, prompt_ids=(4, 5, 6)), "sample 1 has 6 tokens .* raise row_length to 6"),
        (replace(good, prompt_ids=()), "sample 1 has an empty prompt"),
        (replace(good, completion_ids=(), sampler_logprobs=()), "sample 1 has an empty completion"),
        (replace(good, sampler_logprobs=(-1.0,)), "sample 1 has 1 sampler_logprobs for 3"),
        (replace(good, old_logprobs=(-1.0,)), "sample 1 has 1 old_logprobs for 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([good, sample], **arguments)
    with pytest.raises(ValueError, match="no samples"):
        pack([], **arguments)
    for name in ("world_size", "max_tokens_per_microbatch", "row_length", "samples_per_row"):
        with pytest.raises(ValueError, match=f"{name}=0 is below 1"):
            pack([good], **{**arguments, name: 0})


def test_unpack_refuses_what_is_not_its_own() -> None:
    samples = random_samples([(2, 3), (1, 4)])
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=10, row_length=10, pad_token_id=PAD)
    with pytest.raises(ValueError, match="not of a microbatch"):
        unpack([torch.zeros(2, 10)], batch, samples)
    with pytest.raises(ValueError, match="order of pack"):
        unpack([torch.zeros(1, 10)], batch, samples[::-1])


# --- properties -----------------------------------------------------------------------------------------------------

layouts = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 4),
        "max_tokens_per_microbatch": st.integers(1, 100),
        "row_length": st.integers(12, 30),
        "samples_per_row": st.sampled_from([None, 1, 2]),
    }
)
lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(lengths, layouts)
def test_every_token_exactly_once(sizes: list[tuple[int, int]], layout: dict[str, Any]) -> None:
    samples = random_samples(sizes)
    batches = pack(samples, pad_token_id=PAD, **layout)
    assert len(batches) == layout["world_size"]
    assert len({len(batch.microbatches) for batch in batches}) == 1

    found: dict[int, Sample] = {}
    real_tokens = 0
    for microbatch in (m for batch in batches for m in batch.microbatches):
        R, W = microbatch.input_ids_RW.shape
        most_rows = max(1, layout["max_tokens_per_microbatch"] // layout["row_length"])
        assert 1 <= W <= layout["row_length"] and 1 <= R <= most_rows
        real_tokens += int((microbatch.sample_ids_RW >= 0).sum())
        for row in range(R):
            ids = microbatch.sample_ids_RW[row]
            present = [i for i in ids.unique().tolist() if i >= 0]
            assert len(present) <= (layout["samples_per_row"] or len(samples))
            for index in present:
                assert index not in found  # whole samples in one row, each once
                at = (ids == index).nonzero().flatten()
                assert at.tolist() == list(range(int(at[0]), int(at[-1]) + 1))
                assert microbatch.position_ids_RW[row, at].tolist() == list(range(len(at)))
                trained = at[microbatch.loss_mask_RW[row, at]]
                tokens = microbatch.input_ids_RW[row, at].tolist()
                found[index] = Sample(
                    tuple(tokens[: len(at) - len(trained)]),
                    tuple(tokens[len(at) - len(trained) :]),
                    tuple(microbatch.sampler_logprobs_RW[row, trained].tolist()),
                    float(microbatch.advantages_RW[row, trained[0]]),
                    old_logprobs=tuple(microbatch.old_logprobs_RW[row, trained].tolist()),
                    ref_logprobs=tuple(microbatch.ref_logprobs_RW[row, trained].tolist()),
                )
        outside = ~microbatch.loss_mask_RW
        for name in ("advantages_RW", "sampler_logprobs_RW", "old_logprobs_RW", "ref_logprobs_RW"):
            assert not getattr(microbatch, name)[outside].any()

    assert real_tokens == sum(map(sum, sizes))
    assert sorted(found) == list(range(len(samples)))
    for index, sample in enumerate(samples):
        again = found[index]
        assert (again.prompt_ids, again.completion_ids) == (sample.prompt_ids, sample.completion_ids)
        for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs"):
            assert getattr(again, name) == pytest.approx(getattr(sample, name), rel=1e-6)
        assert again.advantage == pytest.approx(sample.advantage, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(lengths, layouts)
def test_unpack_undoes_pack(sizes: list[tuple[int, int]], layout: dict[str, Any]) -> None:
    samples = random_samples(sizes)
    merged: dict[int, tuple[float, ...]] = {}
    for batch in pack(samples, pad_token_id=PAD, **layout):
        part = unpack([m.sampler_logprobs_RW for m in batch.microbatches], batch, samples)
        assert not merged.keys() & part.keys()
        merged |= part
    assert sorted(merged) == list(range(len(samples)))
    for index, sample in enumerate(samples):
        assert merged[index] == pytest.approx(sample.sampler_logprobs, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(12, 30))
def test_rows_are_filled_well(sizes: list[tuple[int, int]], row_length: int) -> None:
    (batch,) = pack(
        random_samples(sizes), world_size=1, max_tokens_per_microbatch=1, row_length=row_length, pad_token_id=PAD
    )
    tokens = sum(map(sum, sizes))
    # Any two rows hold more than one row's tokens together, or they would have been one.
    assert len(batch.microbatches) <= math.floor(2 * tokens / row_length) + 1
    assert padding_fraction([batch]) == 0  # one row per microbatch, cut to its length


def test_packing_is_deterministic() -> None:
    samples = random_samples([(3, 5)] * 9 + [(2, 4)] * 9)
    arguments: dict[str, Any] = {"world_size": 2, "max_tokens_per_microbatch": 40, "row_length": 20}
    first, second = (pack(list(samples), pad_token_id=PAD, **arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for m, n in zip(a.microbatches, b.microbatches, strict=True):
            assert torch.equal(m.input_ids_RW, n.input_ids_RW) and torch.equal(m.sample_ids_RW, n.sample_ids_RW)


# --- the model cannot tell ------------------------------------------------------------------------------------------

SIZES = [(3, 9), (2, 5), (1, 1), (4, 12), (5, 2), (2, 7), (1, 15), (6, 3)]
LAYOUTS = {
    "all in few rows": {"row_length": 40, "max_tokens_per_microbatch": 400},
    "one sample per row": {"row_length": 40, "max_tokens_per_microbatch": 400, "samples_per_row": 1},
    "one row per microbatch": {"row_length": 20, "max_tokens_per_microbatch": 20},
    "two rows per microbatch": {"row_length": 16, "max_tokens_per_microbatch": 40},
    "one sample per microbatch": {"row_length": 16, "max_tokens_per_microbatch": 1, "samples_per_row": 1},
}


def policy_loss(model: Any, batch: TrainBatch, aggregation: str, *, beta: float, temperature: float = 1.0) -> float:
    """A rank's share of the loss, with its gradient added to the model."""
    total = 0.0
    for m in batch.microbatches:
        logits_RWV = model(input_ids=m.input_ids_RW, position_ids=m.position_ids_RW, use_cache=False).logits
        logprobs_RW, _ = losses.token_logprobs(logits_RWV, m.input_ids_RW, temperature)
        sequence_RW = losses.sequence_mean_weights(m.sample_ids_RW, m.loss_mask_RW)
        weights_RW = sequence_RW if aggregation == "sequence" else m.loss_mask_RW.float()
        tokens = PolicyTokens(logprobs_RW, m.old_logprobs_RW, m.advantages_RW, m.loss_mask_RW, m.sample_ids_RW)
        loss_RW, _ = clipped(tokens, epsilon_low=0.2, epsilon_high=0.28)
        kl_RW = losses.kl_estimate(logprobs_RW * m.loss_mask_RW, m.ref_logprobs_RW, "k3")
        denominator = batch.num_loss_tokens if aggregation == "token" else batch.num_samples
        loss = ((loss_RW + beta * kl_RW) * weights_RW).sum() / denominator
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def scored_samples(temperature: float) -> list[Sample]:
    """Samples whose old and reference logprobs lie around the policy's, so that the clip acts on some tokens."""
    generator = torch.Generator().manual_seed(1)
    model, scored = tiny_policy(), []
    for sample in random_samples(SIZES):
        with torch.no_grad():
            logprobs = completion_logprobs(model, sample, temperature)
        old, ref = (
            tuple((logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator)).tolist()) for _ in range(2)
        )
        scored.append(replace(sample, old_logprobs=old, ref_logprobs=ref))
    return scored


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_logprobs_are_those_of_single_samples(layout: str, world_size: int, attention: str) -> None:
    samples, model = random_samples(SIZES), tiny_policy()
    model.set_attn_implementation(attention)
    packed: dict[int, tuple[float, ...]] = {}
    with torch.no_grad():
        for batch in pack(samples, world_size=world_size, pad_token_id=PAD, **LAYOUTS[layout]):
            values = []
            for m in batch.microbatches:
                logits_RWV = model(input_ids=m.input_ids_RW, position_ids=m.position_ids_RW, use_cache=False).logits
                values.append(losses.token_logprobs(logits_RWV, m.input_ids_RW, 0.7)[0])
            packed |= unpack(values, batch, samples)
        for index, sample in enumerate(samples):
            assert packed[index] == pytest.approx(completion_logprobs(model, sample, 0.7).tolist(), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_the_layout(layout: str, world_size: int, aggregation: str) -> None:
    """The sum over ranks and microbatches equals the loss written out sample by sample."""
    samples, expected_model, model = scored_samples(0.7), tiny_policy(), tiny_policy()
    expected = grpo_loss(
        samples,
        [completion_logprobs(expected_model, sample, 0.7) for sample in samples],
        epsilon_low=0.2,
        epsilon_high=0.28,
        beta=0.04,
        aggregation=aggregation,
    )
    expected.backward()
    batches = pack(samples, world_size=world_size, pad_token_id=PAD, **LAYOUTS[layout])
    # One model for all ranks: gradients add up, which is what the ranks' reduction does.
    loss = sum(policy_loss(model, batch, aggregation, beta=0.04, temperature=0.7) for batch in batches)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, gradient in gradients(expected_model).items():
        error = (gradients(model)[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, name
