"""Where workers go, and whether there is room for them."""

from __future__ import annotations

import socket

import pytest
from pydantic import ValidationError

from posttrain.errors import RunStopped
from posttrain.placement import bundle, interface_of, require_room
from posttrain.recipe import LearnerSection, SamplerSection

# Two nodes for learners, one for samplers.
NODES = [
    {"CPU": 8, "GPU": 4, "learners": 4},
    {"CPU": 8, "GPU": 4, "learners": 4},
    {"CPU": 8, "GPU": 2, "node:127.0.0.1": 1},
]


@pytest.mark.parametrize(
    ("placement", "resources", "count"),
    [
        ("any", {}, 10),  # 4 + 4 + 2 GPUs
        ("pack", {}, 10),
        ("strict_pack", {}, 4),  # the largest node
        ("strict_spread", {}, 3),
        ("any", {"learners": 1}, 8),
        ("any", {"learners": 2}, 4),
        ("strict_spread", {"learners": 1}, 2),
        ("any", {"learners": 0.5}, 8),  # the GPUs are what is short then
    ],
)
def test_room_is_what_the_nodes_have(placement: str, resources: dict[str, float], count: int) -> None:
    needed = bundle(1, 1, resources)
    require_room("learner", count, needed, placement, NODES)
    with pytest.raises(RunStopped, match=f"learner.num_workers={count + 1} .* the cluster holds {count} "):
        require_room("learner", count + 1, needed, placement, NODES)


def test_what_no_node_has_is_said() -> None:
    with pytest.raises(RunStopped, match=r"\{CPU: 1, fast: 1\} each: the cluster holds 0 .*fast: 0.*sampler.resources"):
        require_room("sampler", 1, bundle(1, 0, {"fast": 1}), "any", NODES)


def test_workers_that_reserve_nothing_always_fit() -> None:
    assert bundle(0, 0, {}) == {}
    require_room("sampler", 100, {}, "any", NODES)


def test_the_interface_of_an_address() -> None:
    name = interface_of("127.0.0.1")
    assert name in [name for _, name in socket.if_nameindex()]
    assert interface_of("192.0.2.1") is None  # an address for documents, which no machine has


@pytest.mark.parametrize("section", [LearnerSection, SamplerSection])
def test_processors_are_no_custom_resources(section: type) -> None:
    with pytest.raises(ValidationError, match="set num_gpus"):
        section(resources={"GPU": 1})
    with pytest.raises(ValidationError, match="'any', 'pack', 'spread', 'strict_pack' or 'strict_spread'"):
        section(placement="near")
