"""What a machine can do at most, and what share of it is expected: datasheets, or a file of measured figures."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from posttrain.sections import Fraction, NonNegative, Positive, PositiveInt, RecipeError, Section

_SHIPPED = Path(__file__).parent / "hardware.yaml"


class Calibration(Section):
    """What the kernels of one machine reach, measured by benchmarks/plan.py. With it times are sums over kernels.

    Attributes:
        matmul_gflops: float32 operations per second of [rows, width] x [width, width] products: rows -> width -> 1e9/s.
        matmul_backward_gflops: the same of the two products of its backward pass together.
        pass_gbps: bytes per second of an elementwise operation into fresh memory, read and written bytes together.
        update_gbps: the same in place, as an optimizer works.
        scores_forward_ns, scores_backward_ns: of one attention score beside its products: mask, softmax and their checks.
        operation_us: what one call of a kernel costs however little it does, forward pass.
    """

    matmul_gflops: Mapping[int, Mapping[int, Positive]]
    matmul_backward_gflops: Mapping[int, Mapping[int, Positive]]
    pass_gbps: Positive
    update_gbps: Positive
    scores_forward_ns: Positive
    scores_backward_ns: Positive
    operation_us: Positive

    def matmul_seconds(self, flops: float, rows: float, inner: float, outer: float, *, backward: bool = False) -> float:
        """Of products of so many rows; the rate is interpolated between the measured sizes.

        Args:
            flops: of all of them together.
            rows: of one product, or of the forward product that a backward one belongs to.
            inner, outer: sizes of its matrix, which counts as a square one of as many numbers.
            backward: at the rate of backward passes.
        """
        rates = self.matmul_backward_gflops if backward else self.matmul_gflops
        width = math.sqrt(inner * outer)
        return flops / (1e9 * _between({at: _between(dict(row), width) for at, row in rates.items()}, rows))


class Hardware(Section):
    """One accelerator (or CPU process) and its node. Units are in hardware.yaml."""

    name: str
    memory_gb: Positive
    tflops: Mapping[str, Positive]
    memory_gbps: Positive
    node_link_gbps: Positive
    network_gbps: Positive
    gpus_per_node: PositiveInt = 8
    host_memory_gb: Positive
    host_link_gbps: Positive
    sha256_gbps: Positive
    runtime_gb: NonNegative = 0.0
    training_efficiency: Fraction = 0.25
    prefill_efficiency: Fraction = 0.4
    decode_efficiency: Fraction = 0.5
    link_efficiency: Fraction = 0.8
    layer_overhead_us: NonNegative = 20.0
    allocator_gaps: NonNegative = 0.0  # of what a pass allocates and frees, so much stays unusable between other blocks
    sources: Mapping[str, str] = Field(default_factory=dict)
    calibration: Calibration | None = None

    def flops(self, dtype: str) -> float:
        """Peak operations per second."""
        return self.tflops[dtype] * 1e12

    def link(self, ranks: int) -> float:
        """Bytes per second that one of so many ranks sends to the others: within a node, or over the network."""
        rate = self.node_link_gbps if ranks <= self.gpus_per_node else self.network_gbps
        return rate * 1e9 * self.link_efficiency

    def link_source(self, ranks: int) -> str:
        """Where `link` has its figure from."""
        return self.source("node_link_gbps" if ranks <= self.gpus_per_node else "network_gbps")

    def source(self, *names: str) -> str:
        """Where these figures come from."""
        return "; ".join(f"{name}: {self.sources.get(name, 'given')}" for name in names)


def load_hardware(name: str) -> Hardware:
    """A shipped accelerator by name, or a file of measured figures.

    Raises:
        RecipeError: there is no such thing, or the file is not right.
    """
    shipped: dict[str, Any] = yaml.safe_load(_SHIPPED.read_text(encoding="utf-8"))
    path = Path(name)
    if name in shipped:
        tree = shipped[name]
    elif path.is_file():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    else:
        raise RecipeError(
            f"--hardware {name}: neither a file nor one of {', '.join(shipped)}; write a file as "
            f"posttrain/planning/hardware.yaml has them"
        )
    try:
        return Hardware.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"--hardware {name}: {where}: {first['msg']}; mend the file") from None


def _between(values: Mapping[int, float], at: float) -> float:
    """Linear between neighbours in the logarithm of the size; the nearest value outside."""
    sizes = sorted(values)
    place = bisect.bisect_left(sizes, at)
    if place == 0 or place == len(sizes):
        return values[sizes[min(place, len(sizes) - 1)]]
    low, high = sizes[place - 1], sizes[place]
    share = math.log(at / low) / math.log(high / low)
    return values[low] * (1 - share) + values[high] * share
