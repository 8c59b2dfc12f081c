"""FP8 weights with a scale for each block, as DeepSeek-V3 publishes them.

A weight is e4m3 (`torch.float8_e4m3fn`, largest value 448) and beside it lies `weight_scale_inv`, one float32 for each block
of 128 x 128: weight = e4m3 value * scale. Blocks at the right and lower edge may be smaller (DeepSeek-V3's README_WEIGHTS).

Shapes: M rows, N columns, R = ceil(M / rows of a block), C = ceil(N / columns of a block).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"
# What DeepSeek-V3's config.json says of its own weights; vLLM and transformers go by it.
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}


def dequantize(
    weight_MN: torch.Tensor,
    scale_RC: torch.Tensor,
    block: tuple[int, int] = BLOCK,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values that an FP8 weight stands for: float32 products, rounded to `dtype`, as DeepSeek's conversion computes them.

    Args:
        weight_MN: e4m3.
        scale_RC: of its blocks, any floating type.
        block: rows and columns of a block.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: not e4m3, or scales of another shape.
    """
    if weight_MN.dtype != E4M3 or weight_MN.dim() != 2:
        raise ValueError(
            f"a weight of type {weight_MN.dtype} and shape {tuple(weight_MN.shape)}; e4m3 matrices are read"
        )
    blocks = num_blocks(weight_MN.shape, block)
    if tuple(scale_RC.shape) != blocks or not scale_RC.dtype.is_floating_point:
        raise ValueError(
            f"a weight of shape {tuple(weight_MN.shape)} has {blocks[0]} x {blocks[1]} blocks of {block[0]} x {block[1]}, "
            f"but its scales are {scale_RC.dtype} of shape {tuple(scale_RC.shape)}"
        )
    rows, columns = block
    found_MN = torch.empty(weight_MN.shape, dtype=dtype)
    for row in range(blocks[0]):  # a row of blocks at a time, so that float32 needs little memory
        place = slice(row * rows, (row + 1) * rows)
        scale_N = scale_RC[row].float().repeat_interleave(columns)[: weight_MN.shape[1]]
        found_MN[place] = weight_MN[place].float() * scale_N
    return found_MN


def quantize(weight_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as e4m3 with the scales of its 128 x 128 blocks; the largest value of a block becomes 448.

    A block of zeros has scale 1. Values are rounded to the nearest, ties to even.

    Args:
        weight_MN: of any floating type, finite.

    Returns:
        e4m3 [M, N], and float32 [R, C] to multiply it with.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    if weight_MN.dim() != 2:
        raise ValueError(f"a weight of shape {tuple(weight_MN.shape)}; matrices are quantized")
    rows, columns = BLOCK
    r, c = num_blocks(weight_MN.shape, BLOCK)
    n = weight_MN.shape[1]
    found_MN, scale_RC = torch.empty(weight_MN.shape, dtype=E4M3), torch.empty(r, c)
    for row in range(r):  # a row of blocks at a time, so that float32 needs little memory
        place = slice(row * rows, (row + 1) * rows)
        padded_IN = nn.functional.pad(weight_MN[place].float(), (0, c * columns - n))
        strip_ICJ = padded_IN.view(-1, c, columns)
        largest_C = strip_ICJ.abs().amax(dim=(0, 2))
        if not torch.isfinite(largest_C).all():
            raise ValueError("a weight that is not finite cannot be quantized; look for where the run diverged")
        scale_C = torch.where(largest_C > 0, largest_C / LARGEST, 1.0)
        # Of a block of tiny values the quotient may be 0, or so small that dividing by it overflows.
        scale_C = scale_C.clamp(min=torch.finfo(torch.float32).tiny)
        scaled_ICJ = (strip_ICJ / scale_C[:, None]).clamp(-LARGEST, LARGEST)
        found_MN[place] = scaled_ICJ.reshape(padded_IN.shape)[:, :n].to(E4M3)
        scale_RC[row] = scale_C
    return found_MN, scale_RC


def num_blocks(shape: torch.Size | tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks in a column and in a row of a matrix."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quantized_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of an FP8 checkpoint by its config.json; None where its weights are not quantized.

    Raises:
        ValueError: quantized in another way.
    """
    section = config.get("quantization_config")
    if not section:
        return None
    method, block = section.get("quant_method"), section.get("weight_block_size")
    if method != "fp8" or section.get("fmt", "e4m3") != "e4m3" or not block:
        raise ValueError(
            f"quantization_config says {method!r}, format {section.get('fmt')!r}, blocks {block!r}: only FP8 (e4m3) with "
            f"block scales is read; dequantize the checkpoint with the tool that made it"
        )
    return int(block[0]), int(block[1])


def is_quantized_in_v3(name: str) -> bool:
    """Whether DeepSeek-V3's checkpoints hold this weight in FP8: the projections of attention and MLPs, prediction module
    included; not its `eh_proj`, and neither embeddings, head, norms nor the router.
    """
    return (name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")) or "_proj_with_mqa.weight" in name
