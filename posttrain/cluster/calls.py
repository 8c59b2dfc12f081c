"""What actors answer, and how it is said that one is gone."""

from __future__ import annotations

from typing import Any

import ray

from posttrain.errors import RunInterrupted

LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # of the machine: Ray ended a process before the kernel would
)


def get(calls: Any, who: str, timeout: float | None = None) -> Any:
    """What actors answer that the run cannot do without.

    Raises:
        RunInterrupted: one of them is gone.
        ray.exceptions.GetTimeoutError: no answer for so many seconds.
    """
    try:
        return ray.get(calls, timeout=timeout)
    except LOSSES as error:
        raise RunInterrupted(
            f"{who} was lost: {first_line(error)} (its log: Ray's session directory); go on from the last checkpoint with "
            f"--resume"
        ) from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
