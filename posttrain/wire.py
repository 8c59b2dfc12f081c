"""What crosses from learner to samplers in a publication, and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.types import Sample

CHUNK_BYTES = 512 * 2**20
HASH_THREADS = 8  # at most
_WORTH_THREADS = 64 * 2**20  # bytes


def flat_bytes(tensor: torch.Tensor) -> np.ndarray:
    """uint8 [num_bytes] of a tensor, whose memory it shares where that is contiguous and not a device's."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as bytes, whatever its type: NumPy has no bfloat16 and no float8."""

    name: str
    dtype: str  # as in torch, e.g. "bfloat16"
    shape: tuple[int, ...]
    data: np.ndarray  # uint8 [num_bytes]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> WireTensor:
        # Copied: the learner goes on changing its weights while the samplers read these.
        data = flat_bytes(tensor).copy()
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    def tensor(self) -> torch.Tensor:
        # Copied because shared memory is read-only and vLLM may write in place.
        return torch.from_numpy(self.data.copy()).view(getattr(torch, self.dtype)).reshape(self.shape)


def to_chunks(
    tensors: Iterable[tuple[str, torch.Tensor]], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[list[WireTensor]]:
    """Tensors as lists of at most `chunk_bytes` each (a larger single tensor makes a chunk of its own)."""
    chunk: list[WireTensor] = []
    size = 0
    for name, tensor in tensors:
        wire = WireTensor.of(name, tensor)
        if chunk and size + wire.data.nbytes > chunk_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(wire)
        size += wire.data.nbytes
    if chunk:
        yield chunk


class Digest:
    """SHA-256 over that of each tensor's name, type, shape and bytes, in the order they come.

    Of each tensor first, so that threads share the work here, and the learner's ranks the work there.
    """

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.num_bytes = 0

    def add(self, chunk: Sequence[WireTensor]) -> None:
        num_bytes = sum(wire.data.nbytes for wire in chunk)
        if num_bytes > _WORTH_THREADS and len(chunk) > 1:
            with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
                self.parts += pool.map(_hash, chunk)
        else:
            self.parts += map(_hash, chunk)
        self.num_bytes += num_bytes

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(self.parts)).hexdigest()


def _hash(wire: WireTensor) -> bytes:
    found = hashlib.sha256(f"{wire.name}|{wire.dtype}|{wire.shape}|".encode())
    found.update(wire.data.data)
    return found.digest()


def digest_of_all(arrived: str, given: str, loaded: Sequence[str]) -> str:
    """What a sampler of several worker processes reports: a publication that one of them missed is not what was sent.

    Args:
        arrived: in the sampler.
        given: by it to its workers.
        loaded: by each of them; none where the engine has no processes of its own.
    """
    return next((other for other in loaded if other != given), arrived)


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """The weights of one version, ready to be fetched: chunks are handles that the samplers can read."""

    version: int
    digest: str
    num_bytes: int
    chunks: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """What one rank of the learner sends of a version."""

    digests: tuple[bytes, ...]  # of its tensors, in the order they are sent
    num_bytes: int
    chunks: tuple[Any, ...]


def join_parts(version: int, parts: Sequence[SnapshotPart]) -> WeightSnapshot:
    """The parts of all ranks as one snapshot, which is sent in their order."""
    whole = Digest()
    whole.parts = [digest for part in parts for digest in part.digests]
    chunks = tuple(chunk for part in parts for chunk in part.chunks)
    return WeightSnapshot(version, whole.hexdigest(), sum(part.num_bytes for part in parts), chunks)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a sampler says after loading a snapshot."""

    version: int
    digest: str  # of what arrived
    seconds: float
    canary: tuple[Sample, ...]  # the canary with this sampler's logprobs and experts; empty where the digest is wrong


def canary_sample(sequence: tuple[int, ...], logprobs: Sequence[float], experts_TLK: np.ndarray | None) -> Sample:
    """A canary sequence as a sample: its first token is the prompt, the others are scored."""
    return Sample(sequence[:1], sequence[1:], tuple(logprobs), 0.0, experts_TLK)
