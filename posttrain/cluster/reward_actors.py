"""Rewards in actors, each with its warden."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from rewards.scoring import Item, RewardFunction
    from rewards.warden import Limits, Report

_START_SECONDS = 300.0


class _RewardActor:
    """A `rewards.warden.Warden` on some node of the cluster."""

    def __init__(self, function: RewardFunction, limits: Limits, directory: str) -> None:
        from rewards.warden import Warden

        if os.path.isdir(directory):  # options of a reward may be paths, relative to where the run was started
            os.chdir(directory)
        self._warden = Warden(function, limits)

    def score(self, groups: Sequence[Sequence[Item]]) -> Report:
        return self._warden.score(groups)

    def is_there(self) -> bool:
        return True

    def close(self) -> None:
        self._warden.close()


class RewardActors:
    """The actors of one reward.

    Args:
        function: what they run.
        limits: what it may do.
        num_workers: how many there are.
        num_cpus, num_gpus: what Ray reserves for one.
    """

    def __init__(
        self, function: RewardFunction, limits: Limits, num_workers: int, num_cpus: float, num_gpus: float
    ) -> None:
        # Ray starts an actor that died again; what it was doing then is sent again by those who wait for it.
        actor = ray.remote(_RewardActor).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1)
        self._actors = [actor.remote(function, limits, os.getcwd()) for _ in range(num_workers)]
        self._next = 0

    def submit(self, groups: Sequence[Sequence[Item]]) -> list[tuple[list[int], Any]]:
        """Spread whole groups over the actors. Returns for each part the places of its groups, and what to `wait` for."""
        count = len(self._actors)
        parts = [list(range(turn, len(groups), count)) for turn in range(count)]
        return [(part, self.submit_to_any([groups[place] for place in part])) for part in parts if part]

    def submit_to_any(self, groups: Sequence[Sequence[Item]]) -> Any:
        """Give groups to the actor whose turn it is."""
        self._next += 1
        return self._actors[self._next % len(self._actors)].score.remote(groups)

    def wait_for_next(self) -> None:
        """Until the actor whose turn is next is there: Ray starts one that died again, which takes seconds, and whatever is
        sent meanwhile is refused. After five minutes it is tried all the same.
        """
        actor = self._actors[(self._next + 1) % len(self._actors)]
        # This one call Ray keeps and repeats until there is somebody to answer.
        ray.wait([actor.is_there.options(max_task_retries=-1).remote()], timeout=_START_SECONDS)

    def wait(self, call: Any) -> tuple[Report | None, str]:
        """The report of a submitted part, or None and why there is none: the actor is gone."""
        try:
            return ray.get(call), ""
        except (
            ray.exceptions.ActorDiedError,
            ray.exceptions.ActorUnavailableError,
            ray.exceptions.NodeDiedError,
        ) as error:
            return None, f"its actor was lost: {str(error).splitlines()[0]}"

    def stop(self) -> None:
        """End the actors, and before that the processes that they started."""
        closing = [actor.close.remote() for actor in self._actors]
        ray.wait(closing, num_returns=len(closing), timeout=30)
        for actor in self._actors:
            ray.kill(actor)
