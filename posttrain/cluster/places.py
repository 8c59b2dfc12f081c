"""Where the workers of a recipe are put on the nodes."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.errors import RunStopped
from posttrain.placement import bundle, require_room
from posttrain.recipe import (
    LearnerSection,
    SamplerSection,
)


class Places:
    """Room for the workers of one role, as the recipe places them.

    Attributes:
        options: of each worker's actor.
    """

    def __init__(self, role: str, section: LearnerSection | SamplerSection, num_cpus: float, num_gpus: float) -> None:
        count = section.num_workers
        # One bundle is always on one node, and so are the devices of a worker.
        needed = bundle(num_cpus, num_gpus, section.resources)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        require_room(role, count, needed, section.placement, nodes)
        reserved = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(section.resources)}
        self.options: list[dict[str, Any]] = [dict(reserved) for _ in range(count)]
        self._group = None
        if section.placement == "any" or not needed:
            return
        self._group = ray.util.placement_group([needed] * count, strategy=section.placement.upper())
        try:
            ray.get(self._group.ready(), timeout=section.start_timeout_seconds)
        except ray.exceptions.GetTimeoutError:
            self.release()
            raise RunStopped(
                f"{role}.placement: {section.placement}: after {section.start_timeout_seconds:g} s the nodes have no free "
                f"room for {count} workers of {needed}; end what runs there, or raise {role}.start_timeout_seconds"
            ) from None
        for index, options in enumerate(self.options):
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            )

    def release(self) -> None:
        """Give the room back."""
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
