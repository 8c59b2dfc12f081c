"""How long it takes to bring new weights from the learner to the samplers, as posttrain/weights.py and cluster/ do it."""

from __future__ import annotations

from posttrain.planning.hardware import Hardware
from posttrain.planning.learner import Training
from posttrain.planning.quantities import Quantity, size
from posttrain.planning.sampler import BYTES

_HASH_THREADS = 8  # of posttrain/wire.py, which imports torch


def publication(training: Training, wire_dtype: str, hardware: Hardware) -> list[Quantity]:
    """Seconds of each part; they come one after the other, and every sampler fetches at the same time."""
    parameters = training.shape.parameters
    sent = parameters * BYTES[wire_dtype]
    link, proof, to_host = hardware.link(training.ranks), hardware.sha256_gbps * 1e9, hardware.host_link_gbps * 1e9
    network = hardware.network_gbps * 1e9 * hardware.link_efficiency
    found = []
    # Spread weights are sent by all ranks, a layer by each in turn. A sampler hashes in threads where it has cores for them.
    senders = min(training.ranks, training.shape.num_hidden_layers) if training.sharded else 1
    threads = _HASH_THREADS if hardware.calibration is None else 1
    if training.sharded:
        found.append(
            Quantity(
                "gather layer by layer", sent / link + sent / senders / to_host, "seconds",
                f"{size(sent)} / {link / 1e9:g} GB/s + 1/{senders} of it to main memory / {hardware.host_link_gbps:g} GB/s",
                f"posttrain/learner_model.py; {training.ranks} ranks, {hardware.link_source(training.ranks)}",
            )
        )  # fmt: skip
    found += [
        Quantity(
            "digest, both ends", sent / proof / threads * (1 / senders + 1), "seconds",
            f"{size(sent)} x (1 + 1/{senders} on each rank) / ({hardware.sha256_gbps:g} GB/s x {threads} thread(s))",
            f"SHA-256, posttrain/wire.py; {hardware.source('sha256_gbps')}",
        ),
        Quantity(
            "over the network", sent / network, "seconds",
            f"{size(sent)} in {wire_dtype} / ({hardware.network_gbps:g} GB/s x {hardware.link_efficiency:g})",
            f"at least: nodes fetch from each other; {hardware.source('network_gbps')}",
        ),
        Quantity(
            "load into the engines", sent / to_host, "seconds",
            f"{size(sent)} / {hardware.host_link_gbps:g} GB/s", hardware.source("host_link_gbps"),
        ),
    ]  # fmt: skip
    return found
