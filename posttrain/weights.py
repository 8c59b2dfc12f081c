"""Weight publication, learner to samplers: versioned, in place, and proved.

A publication sends every tensor under its checkpoint name and ends with a receipt per sampler: the version, the SHA-256
of what was sent and of what arrived, and the logprobs of a fixed canary batch as the sampler computes them after loading,
compared with the learner's own. Only the last proves that the sampler *uses* the new weights; engines are known to accept
a load and go on with old or mangled ones. A sampler without a valid receipt for the current version gets no prompts.

One that comes later, in the place of one that was lost, is sent the same bytes. The learner may have moved on by then, so it
is compared with what a sampler that had been proved said of the canary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from posttrain.errors import ParityError
from posttrain.flight_recorder import record
from posttrain.metrics import Metric
from posttrain.parity import Flip, ParityReport, compare
from posttrain.recipe import ParitySection
from posttrain.types import Sample
from posttrain.wire import LoadReport, WeightSnapshot

if TYPE_CHECKING:
    from posttrain.cluster import LearnerGroup, SamplerPool


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that one sampler holds one version."""

    sampler: int
    version: int
    digest: str
    num_bytes: int
    seconds: float  # fetch and load, in the sampler
    canary: ParityReport
    fault: str = ""  # what is wrong, in words; empty for a valid receipt

    @property
    def valid(self) -> bool:
        return not self.fault


def canary_sequences(vocab_size: int, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Random token sequences: they reach every expert sooner than text does."""
    generator = np.random.default_rng(seed)
    return [tuple(int(token) for token in generator.integers(0, vocab_size, length)) for _ in range(count)]


@dataclass
class Publisher:
    """Publishes versions and keeps what it needs to say how a publication failed."""

    learner: LearnerGroup
    samplers: SamplerPool
    parity: ParitySection
    canary: Sequence[tuple[int, ...]]
    receipts: list[Receipt] = field(default_factory=list)  # of the newest version
    _earlier: dict[int, dict[int, tuple[float, ...]]] = field(default_factory=dict)  # version -> canary logprobs
    _proved: dict[int, tuple[Sample, ...]] = field(default_factory=dict)  # newest version -> a proved sampler's canary

    def __post_init__(self) -> None:
        self.samplers.fleet.prove = self.prove_newcomer

    def publish(self, version: int) -> list[Receipt]:
        """Bring every sampler to the learner's present weights.

        Returns:
            A valid receipt per sampler that was not lost meanwhile.

        Raises:
            ParityError: a sampler did not receive, or does not use, what was sent.
            RunInterrupted: no sampler is left, or the learner is gone.
        """
        record("publication", version=version)
        fleet = self.samplers.fleet
        snapshot = self.learner.export_weights(version)
        reports = self.samplers.load_weights(snapshot, self.canary)
        try:
            self.receipts = [self._receipt(index, snapshot, report) for index, report in reports.items()]
        except BaseException:
            fleet.give_up()
            raise
        proved = [receipt.sampler for receipt in self.receipts if receipt.valid]
        if proved:
            self._proved = {version: reports[proved[0]].canary}
        fleet.admit(version, proved)
        faults = [f"sampler {receipt.sampler}: {receipt.fault}" for receipt in self.receipts if not receipt.valid]
        if faults:
            raise ParityError(f"publication of version {version} failed: {'; '.join(faults)}")
        return self.receipts

    def prove_newcomer(self, index: int, snapshot: WeightSnapshot, report: LoadReport) -> Receipt:
        """The receipt of a sampler that loaded the newest publication after the others.

        The engines are of one kind, so their logprobs differ by rounding alone. Where two experts score almost the same they
        may choose differently; tokens from there on are left out, and at least half of all must remain.
        """
        proved = self._proved.get(snapshot.version, ())
        parity = reduce(add, map(self._against, report.canary, proved), ParityReport())
        fault = ""
        if not proved:
            fault = f"no sampler has proved version {snapshot.version}, so there is nothing to compare it with"
        elif report.digest != snapshot.digest:
            fault = _damage(snapshot, report)
        elif parity.tokens <= parity.excluded_tokens:
            fault = f"it chose other experts than a proved sampler in front of {parity.excluded_tokens} canary tokens"
        elif not parity.relative_gap_max <= self.parity.max_logprob_gap:
            fault = f"its canary logprobs differ from a proved sampler's by {parity.gap_max:.2e} ({parity.worst})"
        return Receipt(index, snapshot.version, report.digest, snapshot.num_bytes, report.seconds, parity, fault)

    def _against(self, sample: Sample, proved: Sample) -> ParityReport:
        flips = []
        if sample.experts_TLK is not None and proved.experts_TLK is not None:
            differ_TL = (np.sort(sample.experts_TLK, -1) != np.sort(proved.experts_TLK, -1)).any(-1)
            flips = [Flip(int(position), int(layer), 0.0) for position, layer in np.argwhere(differ_TL)]
        name = f"sample of {len(sample.completion_ids) + 1} tokens"
        return compare(sample, proved.sampler_logprobs, flips, near_tie_margin=0.0, name=name)

    def _receipt(self, index: int, snapshot: WeightSnapshot, report: LoadReport) -> Receipt:
        if report.digest != snapshot.digest:
            fault, seconds = _damage(snapshot, report), report.seconds
            return Receipt(index, snapshot.version, report.digest, snapshot.num_bytes, seconds, ParityReport(), fault)
        margin = self.parity.near_tie_margin
        scores = self.learner.score(report.canary, near_tie_margin=margin, temperature=1.0)
        fault = ""
        if scores.parity.tokens == 0:
            fault = "every canary token follows a router near-tie, so nothing is proved; raise parity.canary_sequences"
        elif not scores.parity.relative_gap_max <= self.parity.max_logprob_gap:
            fault = self._explain(snapshot.version, report, scores.parity)
        self._earlier[snapshot.version] = dict(scores.logprobs)
        for old in sorted(self._earlier)[:-3]:
            del self._earlier[old]
        return Receipt(index, snapshot.version, report.digest, snapshot.num_bytes, report.seconds, scores.parity, fault)

    def _explain(self, version: int, report: LoadReport, parity: ParityReport) -> str:
        text = (
            f"its canary logprobs differ from the learner's by {parity.gap_max:.2e} (limit parity.max_logprob_gap="
            f"{self.parity.max_logprob_gap:.0e}; {parity.worst})"
        )
        if parity.hard_flip:
            text += f"; experts first differ at {parity.hard_flip}"
        for old, logprobs in sorted(self._earlier.items(), reverse=True):
            if old != version and self._same(report, logprobs):
                return f"{text}; it answers exactly as version {old} did: version {version} was never loaded"
        return f"{text}; it answers as no recent version did: the load mangled weights (experts are the usual victims)"

    def _same(self, report: LoadReport, logprobs: dict[int, tuple[float, ...]]) -> bool:
        gaps = [
            abs(theirs - ours)
            for index, sample in enumerate(report.canary)
            for theirs, ours in zip(sample.sampler_logprobs, logprobs[index], strict=True)
        ]
        return float(np.median(gaps)) <= self.parity.max_logprob_gap


def _damage(snapshot: WeightSnapshot, report: LoadReport) -> str:
    return (
        f"received {report.digest[:12]} where {snapshot.digest[:12]} was sent: the transfer is damaged, or a worker "
        f"process of the engine missed it"
    )


def publication_metrics(receipts: Sequence[Receipt]) -> dict[str, Metric]:
    """The worst canary gap and the size of one publication."""
    return {
        "publish/canary_gap_max": Metric(max(receipt.canary.gap_max for receipt in receipts), "max"),
        "publish/megabytes": Metric(receipts[0].num_bytes / 1e6, "last"),
    }
