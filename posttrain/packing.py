"""Packing: samples -> one `TrainBatch` of microbatches per learner rank, and per-token values back to samples.

Samples lie whole in rows, several per row; each microbatch is as wide as its longest row. Everything is deterministic:
the same samples give the same batches.

Shapes: R rows of a microbatch, W tokens of a row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain.prompt_sharing import Family, SharedRows, families_of, shared_rows
from posttrain.types import Microbatch, Sample, TrainBatch


@dataclass
class _Row:
    """Samples that share a row."""

    families: list[Family] = field(default_factory=list)
    length: int = 0  # tokens that are computed

    @property
    def indices(self) -> list[int]:
        return [index for family in self.families for index in family.indices]


def pack(
    samples: Sequence[Sample],
    *,
    world_size: int,
    max_tokens_per_microbatch: int,
    row_length: int,
    pad_token_id: int,
    samples_per_row: int | None = None,
    with_experts: bool = False,
    share_prompts: bool = False,
) -> list[TrainBatch]:
    """Spread a minibatch over the ranks.

    Args:
        samples: the minibatch of all ranks; `sample_ids_RW` are indices into it.
        world_size: number of ranks.
        max_tokens_per_microbatch: that are computed, padding included; at least one row is taken, however long.
        row_length: most tokens of a row.
        pad_token_id: fills rows up; any token of the vocabulary will do, since no sample sees it.
        samples_per_row: most samples of a row; 1 is the classic padded layout, None sets no limit. Those that share a
            prompt count as one.
        with_experts: write the experts that the sampler chose, for routing replay.
        share_prompts: compute a prompt once for the samples of a microbatch that have it, see `posttrain.prompt_sharing`.

    Returns:
        One batch per rank. All ranks have the same number of microbatches, so that their collectives line up: a rank
        short of work gets rows of padding without loss.

    Raises:
        ValueError: there is no sample; one does not fit a row, has no prompt or completion, or has a number of
            logprobs other than that of its completion tokens; or a size is below 1.
    """
    sizes = {
        "world_size": world_size,
        "max_tokens_per_microbatch": max_tokens_per_microbatch,
        "row_length": row_length,
        "samples_per_row": samples_per_row,
    }
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1; give a positive number")
    if not samples:
        raise ValueError("there are no samples to pack; skip the step")
    for index, sample in enumerate(samples):
        _check(index, sample, row_length)

    families = families_of(samples, row_length, share=share_prompts)
    rows = _fill_rows(families, row_length, samples_per_row or len(samples))
    rows_per_microbatch = max(1, max_tokens_per_microbatch // row_length)
    microbatches = _group_rows(rows, rows_per_microbatch, world_size)
    num_loss_tokens = sum(sample.num_trained for sample in samples)
    return [
        TrainBatch(
            microbatches=tuple(
                _build(samples, rows, pad_token_id, with_experts=with_experts, share_prompts=share_prompts)
                for rows in share
            ),
            num_loss_tokens=num_loss_tokens,
            num_samples=len(samples),
        )
        for share in _share_out(microbatches, world_size)
    ]


def unpack(
    values: Sequence[torch.Tensor], batch: TrainBatch, samples: Sequence[Sample]
) -> dict[int, tuple[float, ...]]:
    """Turn per-token outputs of a rank's microbatches back into values per sample.

    Args:
        values: a tensor [R, W] per microbatch, such as logprobs.
        batch: the rank's batch.
        samples: what `pack` was given.

    Returns:
        Sample index -> its completion tokens' values, [T_completion], 0 for those that are not trained, for the samples of
        this rank. The ranks' results have no key in common.

    Raises:
        ValueError: the values are not of these microbatches, or the batch is not of these samples.
    """
    result: dict[int, tuple[float, ...]] = {}
    for values_RW, microbatch in zip(values, batch.microbatches, strict=True):
        if values_RW.shape != microbatch.loss_mask_RW.shape:
            raise ValueError(
                f"values of shape {tuple(values_RW.shape)} are not of a microbatch {tuple(microbatch.loss_mask_RW.shape)}"
            )
        trained_RW = values_RW.detach().masked_fill(~microbatch.loss_mask_RW.to(values_RW.device), 0.0)
        # A sample lies in one row in order, so its tokens are neighbours.
        indices, counts = microbatch.sample_ids_RW.flatten().unique_consecutive(return_counts=True)
        parts = zip(
            indices.tolist(),
            trained_RW.flatten().split(counts.tolist()),
            microbatch.loss_mask_RW.flatten().split(counts.tolist()),
            strict=True,
        )
        for index, part, mask in parts:
            if index < 0:
                continue
            if index >= len(samples) or mask.tolist() != _mask(samples[index]):
                raise ValueError(
                    f"sample {index} is not the one that was packed; pass the samples in the order of pack()"
                )
            result[index] = tuple(part[len(samples[index].prompt_ids) :].tolist())
    return result


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch with its tensors there."""

    def moved(name: str) -> Any:
        value: torch.Tensor | SharedRows | None = getattr(microbatch, name)
        return value if value is None else value.to(device)

    return Microbatch(**{name: moved(name) for name in Microbatch.__slots__})


def padding_fraction(batches: Sequence[TrainBatch]) -> float:
    """Share of the tokens that all ranks compute which is padding, 0 to 1."""
    microbatches = [microbatch for batch in batches for microbatch in batch.microbatches]
    ids = [part.sample_ids_RW if part.shared is None else part.shared.families_QX for part in microbatches]
    return sum(int((ids_RW < 0).sum()) for ids_RW in ids) / sum(ids_RW.numel() for ids_RW in ids)


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def _mask(sample: Sample) -> list[bool]:
    """Of all its tokens, which are trained."""
    return [False] * len(sample.prompt_ids) + list(sample.trained or [True] * len(sample.completion_ids))


def _check(index: int, sample: Sample, row_length: int) -> None:
    """Raise ValueError if the sample cannot be trained on."""
    if not sample.prompt_ids or not sample.completion_ids:
        part = "completion" if sample.prompt_ids else "prompt"
        raise ValueError(f"sample {index} has an empty {part}, so it has no token to train on; leave it out")
    if _length(sample) > row_length:
        raise ValueError(
            f"sample {index} has {_length(sample)} tokens and a row holds row_length={row_length}; raise row_length to "
            f"{_length(sample)} or lower max_completion_length"
        )
    for name in (
        "sampler_logprobs",
        "old_logprobs",
        "ref_logprobs",
        "teacher_logprobs",
        "advantage",
        "values",
        "returns",
        "trained",
    ):
        values = getattr(sample, name)
        if isinstance(values, tuple) and len(values) != len(sample.completion_ids):
            raise ValueError(
                f"sample {index} has {len(values)} {name} for {len(sample.completion_ids)} completion tokens; "
                f"give one each"
            )
    if not sample.num_trained:
        raise ValueError(f"sample {index} has no token that was sampled, so none to train on; leave it out")


def _fill_rows(families: Sequence[Family], row_length: int, families_per_row: int) -> list[_Row]:
    """Best-fit decreasing: longest first, each into the fullest row that still takes it. Fullest row first."""
    rows: list[_Row] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted, of the rows that take another family
    for family in sorted(families, key=lambda family: -family.length):
        place = bisect.bisect_left(open_rows, (family.length, 0))
        if place < len(open_rows):
            _, number = open_rows.pop(place)
        else:
            number = len(rows)
            rows.append(_Row())
        row = rows[number]
        row.families.append(family)
        row.length += family.length
        if len(row.families) < families_per_row:
            bisect.insort(open_rows, (row_length - row.length, number))
    return sorted(rows, key=lambda row: -row.length)


def _group_rows(rows: list[_Row], rows_per_microbatch: int, world_size: int) -> list[list[_Row]]:
    """Cut rows, sorted by length, into microbatches of neighbours: as few as fit, but the same number for each rank."""
    needed = -(-len(rows) // rows_per_microbatch)
    count = -(-needed // world_size) * world_size
    bounds = [len(rows) * i // count for i in range(count + 1)]
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


def _share_out(microbatches: list[list[_Row]], world_size: int) -> list[list[list[_Row]]]:
    """Give each rank the same number of microbatches and about the same number of tokens, padding included."""
    tokens = [len(rows) * max((row.length for row in rows), default=0) for rows in microbatches]
    shares: list[list[list[_Row]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(range(len(microbatches)), key=lambda i: -tokens[i]):
        open_ranks = [rank for rank in range(world_size) if len(shares[rank]) < len(microbatches) // world_size]
        rank = min(open_ranks, key=lambda r: loads[r])
        shares[rank].append(microbatches[index])
        loads[rank] += tokens[index]
    return shares


def _build(
    samples: Sequence[Sample], rows: list[_Row], pad_token_id: int, *, with_experts: bool, share_prompts: bool
) -> Microbatch:
    """Tensors of some rows; of one row of one padding token if there are none."""
    has_values = any(samples[index].values is not None for row in rows for index in row.indices)
    lengths = [sum(_length(samples[index]) for index in row.indices) for row in rows]
    shape = (max(1, len(rows)), max(lengths, default=1))
    # What is computed: these rows themselves, or those in which prompts stand once.
    computed = (shape[0], max((row.length for row in rows), default=1))
    experts_NLK = _blank_experts(samples, rows, computed) if with_experts else None
    shared = None
    if share_prompts:
        families = [row.families for row in rows]
        shared = shared_rows(samples, families, computed, shape[1], pad_token_id, experts_NLK)
    microbatch = Microbatch(
        input_ids_RW=torch.full(shape, pad_token_id),
        position_ids_RW=torch.zeros(shape, dtype=torch.int64),
        sample_ids_RW=torch.full(shape, -1),
        loss_mask_RW=torch.zeros(shape, dtype=torch.bool),
        advantages_RW=torch.zeros(shape),
        sampler_logprobs_RW=torch.zeros(shape),
        old_logprobs_RW=torch.zeros(shape),
        ref_logprobs_RW=torch.zeros(shape),
        values_RW=torch.zeros(shape) if has_values else None,
        returns_RW=torch.zeros(shape) if has_values else None,
        experts_NLK=experts_NLK if shared is None else None,
        candidates_RWC=_blank_candidates(samples, rows, shape),
        shared=shared,
    )
    for number, row in enumerate(rows):
        start = 0
        for index in row.indices:
            _write(microbatch, number, start, index, samples[index])
            start += _length(samples[index])
    return microbatch


def _write(microbatch: Microbatch, row: int, start: int, index: int, sample: Sample) -> None:
    """Put a sample into `row` from token `start` on."""
    whole = slice(start, start + _length(sample))
    completion = slice(start + len(sample.prompt_ids), whole.stop)
    microbatch.input_ids_RW[row, whole] = torch.tensor(sample.prompt_ids + sample.completion_ids)
    microbatch.position_ids_RW[row, whole] = torch.arange(_length(sample))
    microbatch.sample_ids_RW[row, whole] = index
    mask_T = torch.tensor(_mask(sample)[len(sample.prompt_ids) :]).float()
    microbatch.loss_mask_RW[row, completion] = mask_T.bool()
    microbatch.advantages_RW[row, completion] = torch.tensor(sample.advantage) * mask_T
    microbatch.sampler_logprobs_RW[row, completion] = torch.tensor(sample.sampler_logprobs) * mask_T
    if sample.old_logprobs is not None:
        microbatch.old_logprobs_RW[row, completion] = torch.tensor(sample.old_logprobs) * mask_T
    if sample.ref_logprobs is not None:
        microbatch.ref_logprobs_RW[row, completion] = torch.tensor(sample.ref_logprobs) * mask_T
    if microbatch.values_RW is not None and microbatch.returns_RW is not None and sample.values is not None:
        microbatch.values_RW[row, completion] = torch.tensor(sample.values) * mask_T
        microbatch.returns_RW[row, completion] = torch.tensor(sample.returns) * mask_T
    if microbatch.experts_NLK is not None and sample.experts_TLK is not None:
        first = row * microbatch.input_ids_RW.shape[1] + start
        known = sample.experts_TLK[: _length(sample) - 1]  # the last token was never fed to the sampler
        microbatch.experts_NLK[first : first + len(known)] = torch.from_numpy(np.ascontiguousarray(known))
    if microbatch.candidates_RWC is not None and sample.candidates_TC is not None:
        candidates_TC = torch.from_numpy(np.ascontiguousarray(sample.candidates_TC))
        microbatch.candidates_RWC[row, completion, : candidates_TC.shape[1]] = candidates_TC


def _blank_experts(samples: Sequence[Sample], rows: list[_Row], shape: tuple[int, int]) -> torch.Tensor | None:
    """Room for the experts that the sampler chose; None if it named none."""
    known = [samples[index].experts_TLK for row in rows for index in row.indices]
    layers_and_experts = next((experts_TLK.shape[1:] for experts_TLK in known if experts_TLK is not None), None)
    if layers_and_experts is None:
        return None
    return torch.full((shape[0] * shape[1], *layers_and_experts), -1, dtype=torch.int16)


def _blank_candidates(samples: Sequence[Sample], rows: list[_Row], shape: tuple[int, int]) -> torch.Tensor | None:
    """Room for the tokens that sampling left to choose from; None if it left out none."""
    sizes = [
        candidates_TC.shape[1]
        for row in rows
        for index in row.indices
        if (candidates_TC := samples[index].candidates_TC) is not None
    ]
    return torch.full((*shape, max(sizes)), -1, dtype=torch.int32) if sizes else None
