"""Which checkpoints have to be converted before they can be trained. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_fp8(directory: Path) -> bool:
    """Whether a checkpoint directory holds FP8 weights, by its config.json."""
    config = directory / "config.json"
    return config.is_file() and _is_fp8(json.loads(config.read_text()).get("quantization_config"))


def require_trainable(name: str, quantization_config: Mapping[str, Any] | None) -> None:
    """Refuse FP8 weights: a small step of the optimizer is less than their spacing.

    Args:
        name: of the checkpoint, for the message.
        quantization_config: of its config.json.

    Raises:
        ValueError: they are FP8.
    """
    if _is_fp8(quantization_config):
        raise ValueError(
            f"{name} holds FP8 weights, which are not trained; convert it once: python -m posttrain.export {name} OUT "
            f"--format bf16, and give OUT"
        )


def _is_fp8(section: Mapping[str, Any] | None) -> bool:
    return bool(section) and dict(section or {}).get("quant_method") == "fp8"
