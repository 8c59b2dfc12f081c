"""Collective calls: with a gradient, rows to other ranks and back, and parts of a whole to everyone; errors to everyone."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from posttrain.disk import is_full


class AllToAll(torch.autograd.Function):
    """Rows to other ranks and from them; gradients go the way back.

    Args:
        rows: [N, ...], ordered by the rank that they are for.
        away: how many of them are for each rank.
        here: how many come from each rank.
        group: of the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, away: Sequence[int], here: Sequence[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.away, ctx.here, ctx.group = away, here, group
        return _exchange(rows, away, here, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.here, ctx.away, ctx.group), None, None, None


def _exchange(rows: torch.Tensor, away: Sequence[int], here: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    found = rows.new_empty(sum(here), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), list(here), list(away), group=group)
    return found


class Gather(torch.autograd.Function):
    """Equal parts of all ranks along the second dimension, [A, B, ...] each, as [A, ranks x B, ...] on every rank.

    Every rank goes on to compute the same from the whole, so its own part's gradient is whole as well, and nothing is summed.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.rank, ctx.width = dist.get_rank(group), part.shape[1]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].narrow(1, ctx.rank * ctx.width, ctx.width), None


@contextmanager
def all_or_none() -> Iterator[None]:
    """Leave the block on all ranks or on none: an error of one is raised on the others too. Collective.

    What the block itself asks of all ranks must be done before it raises.

    Raises:
        OSError: another rank failed; with the number of a full disk if that was it.
    """
    trouble: Exception | None = None
    try:
        yield
    except Exception as error:
        trouble = error
    found: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(
        found, None if trouble is None else (is_full(trouble), f"{type(trouble).__name__}: {trouble}")
    )
    if trouble is not None:
        raise trouble
    for rank, failure in enumerate(found):
        if failure is not None:
            raise OSError(errno.ENOSPC if failure[0] else errno.EIO, f"rank {rank} failed: {failure[1]}")
