"""How long it takes to bring new weights from the learner to the samplers, as posttrain/weights.py and cluster/ do it."""

from __future__ import annotations

from posttrain.planning.hardware import Hardware
from posttrain.planning.learner import Training
from posttrain.planning.quantities import Quantity, count, size
from posttrain.planning.sampler import BYTES


def publication(training: Training, wire_dtype: str, hardware: Hardware) -> list[Quantity]:
    """Seconds of each part; they come one after the other, and every sampler fetches at the same time."""
    parameters = training.shape.parameters
    sent = parameters * BYTES[wire_dtype]
    link, proof, to_host = hardware.link(training.ranks), hardware.sha256_gbps * 1e9, hardware.host_link_gbps * 1e9
    network = hardware.network_gbps * 1e9 * hardware.link_efficiency
    found = []
    if training.sharded:
        found.append(
            Quantity(
                "gather on rank 0", parameters * 4 / link + parameters * 4 / to_host, "seconds",
                f"{count(parameters)} x 4 / {link / 1e9:g} GB/s + as much to main memory / {hardware.host_link_gbps:g} GB/s",
                f"posttrain/learner_parallel.py; {training.ranks} ranks, {hardware.link_source(training.ranks)}",
            )
        )  # fmt: skip
    found += [
        Quantity(
            "digest, both ends", 2 * sent / proof, "seconds",
            f"2 x {size(sent)} / {hardware.sha256_gbps:g} GB/s",
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
