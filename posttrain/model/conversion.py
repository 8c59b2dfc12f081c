"""What each tensor of a checkpoint becomes in another number format: a pure plan first, then one tensor at a time.

    fp8       DeepSeek-V3's own layout: projections in e4m3 with block scales, the rest bfloat16
    bf16      everything bfloat16
    float32   everything float32

The router's `e_score_correction_bias` keeps its type, because it is compared and not multiplied. An FP8 checkpoint that stays
FP8 is copied as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch

from posttrain.model import fp8
from posttrain.model.checkpoint_files import CheckpointFiles, TensorInfo

Format = Literal["fp8", "bf16", "float32"]
FLOATS = {"bf16": torch.bfloat16, "float32": torch.float32}
_BIAS = "e_score_correction_bias"


class Deltas(Protocol):
    """What is added to weights, by the names that they have in a checkpoint; see `posttrain.model.adapter_deltas`."""

    def names(self) -> set[str]: ...

    def delta(self, name: str) -> torch.Tensor: ...


class Conversion:
    """From one checkpoint to another.

    Args:
        files: the source.
        target: the format to write.
        drop_mtp: leave the prediction module out.
        deltas: added to the weights before they are rounded.

    Raises:
        ValueError: the source is quantized in an unknown way, a weight lacks its scales, the architecture has no FP8 layout,
            or there is no prediction module to drop.
    """

    def __init__(
        self, files: CheckpointFiles, target: Format, *, drop_mtp: bool = False, deltas: Deltas | None = None
    ) -> None:
        self.files, self.target, self._deltas = files, target, deltas
        self._block = fp8.quantized_block(files.config)
        self._layers = int(files.config.get("num_hidden_layers") or 0)
        self._drop_mtp = drop_mtp
        self._require_scales()
        model_type = files.config.get("model_type")
        if target == "fp8" and self._block is None and model_type != "deepseek_v3":
            raise ValueError(
                f"a {model_type} in FP8: the layout written is DeepSeek-V3's, for deepseek_v3 alone; write bf16, and let the "
                f"engine quantize it"
            )
        if drop_mtp and not self.has_mtp:
            raise ValueError(f"{files.directory} has no prediction module to drop; leave --drop-mtp out")
        self._changed = deltas.names() if deltas else set()
        unknown = sorted(self._changed - set(files.tensors))
        if unknown:
            raise ValueError(f"the adapters change {unknown[0]}, which {files.directory} does not have")

    @property
    def has_mtp(self) -> bool:
        """Whether the source holds a prediction module."""
        return any(self._is_mtp(name) for name in self.files.tensors)

    @property
    def is_fp8(self) -> bool:
        """Whether the source's weights are FP8."""
        return self._block is not None

    @property
    def copies(self) -> bool:
        """Whether FP8 weights are taken over as they are, but for those that the deltas change."""
        return self.is_fp8 and self.target == "fp8" and (self._deltas is None or self._block == fp8.BLOCK)

    def plan(self) -> Iterator[list[TensorInfo]]:
        """What is written for each tensor of the source, under its name: one tensor, or a weight and its scales."""
        for info in self.files.tensors.values():
            dropped = self._drop_mtp and self._is_mtp(info.name)
            if not dropped and not info.name.endswith(fp8.SCALE_SUFFIX):
                yield self._written(info)

    def _written(self, info: TensorInfo) -> list[TensorInfo]:
        if self._is_written_as_fp8(info):
            scales = TensorInfo(info.name + fp8.SCALE_SUFFIX, torch.float32, fp8.num_blocks(info.shape, fp8.BLOCK))
            if self._is_copied(info):
                scales = self.files.tensors[scales.name]
            return [TensorInfo(info.name, fp8.E4M3, info.shape), scales]
        return [TensorInfo(info.name, self._float(info), info.shape)]

    def convert(self, info: TensorInfo) -> dict[str, torch.Tensor]:
        """What is written for a tensor of the source, by name."""
        scale_name = info.name + fp8.SCALE_SUFFIX
        tensor = self.files.read(info.name)
        if self._is_copied(info):
            scaled = scale_name in self.files.tensors
            return {info.name: tensor} | ({scale_name: self.files.read(scale_name)} if scaled else {})
        requantized, changed = self._is_written_as_fp8(info), self._changes(info)
        if info.dtype == fp8.E4M3:
            assert self._block is not None
            dtype = torch.float32 if requantized or changed else self._float(info)
            tensor = fp8.dequantize(tensor, self.files.read(scale_name), self._block, dtype)
        if changed:
            assert self._deltas is not None
            tensor = tensor.float() + self._deltas.delta(info.name)
        if requantized:
            weight, scales = fp8.quantize(tensor)
            return {info.name: weight, scale_name: scales}
        return {info.name: tensor.to(self._float(info))}

    def config(self) -> dict[str, Any]:
        """config.json of what is written."""
        config = dict(self.files.config)
        section = config.pop("quantization_config", None) or {}
        if self.target == "fp8":
            if not self.copies or self._deltas is not None:
                # Scales are no powers of two any more; what the section says of unquantized modules still holds.
                section = {**section, **fp8.QUANTIZATION_CONFIG}
                section.pop("scale_fmt", None)
            config["quantization_config"] = section
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, str(FLOATS.get(self.target, torch.bfloat16)).removeprefix("torch."))
        if "num_nextn_predict_layers" in config:
            # transformers drops the module and leaves the number, which would be a promise.
            config["num_nextn_predict_layers"] = self._depths() if not self._drop_mtp else 0
        return config

    # --- what a tensor is -----------------------------------------------------------------------------------------

    def _is_mtp(self, name: str) -> bool:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return found is not None and self._layers > 0 and int(found[1]) >= self._layers

    def _depths(self) -> int:
        return len({name.split(".")[2] for name in self.files.tensors if self._is_mtp(name)})

    def _changes(self, info: TensorInfo) -> bool:
        return info.name in self._changed

    def _is_copied(self, info: TensorInfo) -> bool:
        return self.copies and not self._changes(info)

    def _is_written_as_fp8(self, info: TensorInfo) -> bool:
        if self.target != "fp8":
            return False
        return info.dtype == fp8.E4M3 if self.is_fp8 else fp8.is_quantized_in_v3(info.name)

    def _float(self, info: TensorInfo) -> torch.dtype:
        if not info.dtype.is_floating_point or info.name.endswith(_BIAS) or self._is_copied(info):
            return info.dtype
        return FLOATS.get(self.target, torch.bfloat16)

    def _require_scales(self) -> None:
        """FP8 weights and their scales belong together, whatever the config says."""
        tensors: Mapping[str, TensorInfo] = self.files.tensors
        for info in tensors.values():
            weight = info.name.removesuffix(fp8.SCALE_SUFFIX)
            if weight != info.name and weight not in tensors:
                raise ValueError(
                    f"{self.files.directory}: {info.name} has no weight beside it; the checkpoint is broken"
                )
            if info.dtype != fp8.E4M3:
                if info.name + fp8.SCALE_SUFFIX in tensors:
                    raise ValueError(
                        f"{self.files.directory}: {info.name} is {info.dtype} with scales; only e4m3 is read"
                    )
                continue
            if self._block is None:
                raise ValueError(
                    f"{self.files.directory}: {info.name} is FP8 and config.json has no quantization_config; copy it from the "
                    f"published config.json"
                )
            scales = tensors.get(info.name + fp8.SCALE_SUFFIX)
            if scales is None:
                raise ValueError(f"{self.files.directory}: {info.name} is FP8 and has no {fp8.SCALE_SUFFIX} beside it")
            if scales.shape != fp8.num_blocks(info.shape, self._block):
                raise ValueError(
                    f"{self.files.directory}: {scales.name} is of shape {scales.shape}; blocks of {self._block} in weights of "
                    f"shape {info.shape} need {fp8.num_blocks(info.shape, self._block)}"
                )
