"""Where workers go on a cluster of several nodes: what each reserves, whether there is room, and their network."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping, Sequence

from posttrain.errors import RunStopped

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


def bundle(num_cpus: float, num_gpus: float, resources: Mapping[str, float]) -> dict[str, float]:
    """What one worker reserves, as Ray names it."""
    return {name: amount for name, amount in {"CPU": num_cpus, "GPU": num_gpus, **resources}.items() if amount}


def require_room(
    role: str, count: int, needed: Mapping[str, float], placement: str, nodes: Sequence[Mapping[str, float]]
) -> None:
    """Refuse workers that no state of the cluster could hold: Ray would wait for a node to join, without end.

    Args:
        role: whose workers they are, for the message: "learner" or "sampler".
        count: of workers.
        needed: what each reserves.
        placement: of the recipe.
        nodes: what each node has in all, whoever uses it at present.

    Raises:
        RunStopped: they do not fit; the message says what to add or to change.
    """
    fits = [
        min([int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items()], default=count)
        for node in nodes
    ]
    held = {
        "strict_spread": sum(fit > 0 for fit in fits),  # one on each node
        "strict_pack": max(fits, default=0),  # all on one node
    }.get(placement, sum(fits))
    if held >= count:
        return
    also = f", {role}.tensor_parallel_size" if role == "sampler" else ""
    each = ", ".join(f"{name}: {amount:g}" for name, amount in needed.items())
    found = "; ".join(", ".join(f"{name}: {node.get(name, 0):g}" for name in needed) for node in nodes)
    where = {"strict_spread": " on nodes of their own", "strict_pack": " on one node"}.get(placement, "")
    raise RunStopped(
        f"{role}.num_workers={count} workers with {{{each}}} each{where}: the cluster holds {held} (its nodes have {found}); "
        f"add nodes, or change {role}.num_workers{also}, {role}.resources or {role}.placement"
    )


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
