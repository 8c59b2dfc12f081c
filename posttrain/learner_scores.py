"""What the learner says of samples before it trains on them, and how far the sampler is from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.model import router
from posttrain.parity import Mismatch, ParityReport, compare, mismatch
from posttrain.types import Microbatch, Sample


@dataclass(frozen=True, slots=True)
class Scores:
    """What the learner says of samples before it trains on them; keyed by sample index."""

    logprobs: Mapping[int, tuple[float, ...]]
    ref_logprobs: Mapping[int, tuple[float, ...]]  # empty without a reference
    parity: ParityReport
    mismatch: Mismatch
    teacher_logprobs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # empty without a teacher

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            {**self.logprobs, **other.logprobs},
            {**self.ref_logprobs, **other.ref_logprobs},
            self.parity + other.parity,
            self.mismatch + other.mismatch,
            {**self.teacher_logprobs, **other.teacher_logprobs},
        )


def compare_microbatch(
    microbatch: Microbatch,
    logprobs_RW: torch.Tensor,
    trace: router.RouterTrace,
    samples: Sequence[Sample],
    routers: list[Any],
    *,
    near_tie_margin: float,
) -> tuple[ParityReport, Mismatch]:
    """How far the sampler's logprobs and experts are from the learner's, for the samples of a microbatch.

    Args:
        microbatch: packed samples.
        logprobs_RW: the learner's, float32.
        trace: of the learner's routers, replayed or not, over the same tokens.
        samples: indexed by `sample_ids_RW`.
        routers: see `posttrain.model.router.find_routers`.
        near_tie_margin: see `posttrain.parity`.
    """
    report, apart = ParityReport(), Mismatch()
    ids_N, logprobs_N = microbatch.sample_ids_RW.flatten(), logprobs_RW.flatten()
    chosen_NLK, used_NLK = (trace.chosen_NLK(), trace.used_NLK()) if routers else (None, None)
    for index in ids_N.unique().tolist():
        if index < 0:
            continue
        sample, rows = samples[index], (ids_N == index).nonzero().flatten()
        own: list[router.Flip] = []
        flips: list[router.Flip] = []
        if sample.experts_TLK is not None and chosen_NLK is not None and used_NLK is not None:
            own = router.find_flips(sample.experts_TLK, chosen_NLK, trace, rows[:-1], routers)
            # What replay left to the router is compared as well: the experts that were used, whoever chose them.
            flips = router.find_flips(sample.experts_TLK, used_NLK, trace, rows[:-1], routers) if trace.used else own
        values = logprobs_N[rows[len(sample.prompt_ids) :]].tolist()
        report += compare(sample, values, flips, near_tie_margin=near_tie_margin, name=f"sample {index}")
        apart += mismatch(sample, values, own, len(routers))
    return report, apart
