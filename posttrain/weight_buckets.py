"""Weights on their way to an engine of several worker processes: in buckets of memory that all of them read.

The sampler fills a bucket and tells the workers where it is; each of them maps it, loads its own part, and lets go. So a node
holds the buckets that are being loaded beside the engine's weights, and never a second copy of the model. A bucket is a file
in memory without a name (memfd): it is gone with the last process that has it, however that ends, and does not count
against the size of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.wire import Digest, WireTensor, flat_bytes

BUCKET_BYTES = 256 * 2**20
_ALIGNMENT = 64  # bytes; a tensor of any type may begin there


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place in a bucket."""

    name: str
    dtype: str  # as in torch, e.g. "bfloat16"
    shape: tuple[int, ...]
    start: int  # bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where other processes of this user on this machine find some tensors."""

    process: int
    descriptor: int  # of that process
    num_bytes: int
    entries: tuple[Entry, ...]

    def tensors(self, digest: Digest) -> Iterator[tuple[str, torch.Tensor]]:
        """Its tensors, which stay valid as long as they are referred to.

        Args:
            digest: is told what they hold.
        """
        memory = self._map()
        wires = [
            WireTensor(
                entry.name, entry.dtype, entry.shape, np.frombuffer(memory, np.uint8, entry.num_bytes, entry.start)
            )
            for entry in self.entries
        ]
        digest.add(wires)
        for wire in wires:
            yield wire.name, torch.from_numpy(wire.data).view(getattr(torch, wire.dtype)).reshape(wire.shape)

    def _map(self) -> mmap.mmap:
        descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDONLY)
        try:
            # vLLM may write into what it is given: such pages become this process's own.
            return mmap.mmap(descriptor, self.num_bytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)


@contextmanager
def filled(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[Bucket]:
    """A bucket of these tensors, to be mapped by others within the block; what they have mapped they keep."""
    entries, end = [], 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end, num_bytes))
        end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    size = max(end, 1)  # an empty file cannot be mapped
    descriptor = os.memfd_create("posttrain-weights")
    try:
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as memory:
            for entry, (_, tensor) in zip(entries, tensors, strict=True):
                target = np.frombuffer(memory, np.uint8, entry.num_bytes, entry.start)
                target[:] = flat_bytes(tensor)
                del target  # else the mapping could not be closed
        yield Bucket(os.getpid(), descriptor, size, tuple(entries))
    finally:
        os.close(descriptor)


def in_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Lists of tensors of at most `bucket_bytes` together; a larger single one is a list of its own."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket
