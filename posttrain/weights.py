"""Weight publication, learner to samplers: versioned, in place, and proved.

A publication sends every tensor under its checkpoint name and ends with a receipt per sampler: the version, the SHA-256
of what was sent and of what arrived, and the logprobs of a fixed canary batch as the sampler computes them after loading,
compared with the learner's own. Only the last proves that the sampler *uses* the new weights; engines are known to accept
a load and go on with old or mangled ones. A sampler without a valid receipt for the current version gets no prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from posttrain.errors import ParityError
from posttrain.flight_recorder import record
from posttrain.metrics import Metric
from posttrain.parity import ParityReport
from posttrain.recipe import ParitySection
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

    def publish(self, version: int) -> list[Receipt]:
        """Bring every sampler to the learner's present weights.

        Returns:
            A valid receipt per sampler.

        Raises:
            ParityError: a sampler did not receive, or does not use, what was sent.
        """
        record("publication", version=version)
        snapshot = self.learner.export_weights(version)
        reports = self.samplers.load_weights(snapshot, self.canary)
        self.receipts = [self._receipt(index, snapshot, report) for index, report in enumerate(reports)]
        self.samplers.admit(version, [receipt.sampler for receipt in self.receipts if receipt.valid])
        faults = [f"sampler {receipt.sampler}: {receipt.fault}" for receipt in self.receipts if not receipt.valid]
        if faults:
            raise ParityError(f"publication of version {version} failed: {'; '.join(faults)}")
        return self.receipts

    def _receipt(self, index: int, snapshot: WeightSnapshot, report: LoadReport) -> Receipt:
        margin = self.parity.near_tie_margin
        scores = self.learner.score(report.canary, near_tie_margin=margin, temperature=1.0)
        fault = ""
        if report.digest != snapshot.digest:
            fault = f"received {report.digest[:12]} where {snapshot.digest[:12]} was sent: the transfer is damaged"
        elif scores.parity.tokens == 0:
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


def publication_metrics(receipts: Sequence[Receipt]) -> dict[str, Metric]:
    """The worst canary gap and the size of one publication."""
    return {
        "publish/canary_gap_max": Metric(max(receipt.canary.gap_max for receipt in receipts), "max"),
        "publish/megabytes": Metric(receipts[0].num_bytes / 1e6, "last"),
    }
