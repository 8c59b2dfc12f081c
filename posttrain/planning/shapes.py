"""The shape of a recipe's model: built by it, published, or read from a checkpoint's config.json."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from posttrain.architectures import ARCHITECTURES, Architecture
from posttrain.recipe import BuildSection, ModelSection, RecipeError

TINY_VOCABULARY = 107  # tokens of data.chat.build_tokenizer, which a built policy uses, without extra characters
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as the format says

# config.json of these kinds is read as `Architecture` has it; what is called otherwise there stands beside it.
_KINDS = {
    "deepseek_v3": {"num_experts": "n_routed_experts", "head_dim": "v_head_dim"},
    "qwen3_moe": {},
    "qwen3": {},
    "qwen2": {},
    "mixtral": {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    "mistral": {},
    "llama": {},
}


def architecture_of(model: ModelSection) -> Architecture | None:
    """The shape of the policy; None where nothing here says it: a hub model that is not shipped, or files to come.

    Raises:
        RecipeError: a checkpoint of a kind whose shape is not known here.
    """
    if model.build is not None:
        return of_build(model.build, TINY_VOCABULARY + len(model.extra_characters))
    name = str(model.model_name_or_path)
    if name in ARCHITECTURES and not Path(name).exists():
        return ARCHITECTURES[name]
    config = read_config(Path(name))
    return of_config(config, name) if config else None


def of_build(build: BuildSection, vocabulary: int) -> Architecture:
    """The shape of a policy that a recipe builds."""
    return Architecture(
        model_type="deepseek_v3",
        vocab_size=vocabulary,
        hidden_size=build.hidden_size,
        intermediate_size=build.intermediate_size,
        num_hidden_layers=build.num_hidden_layers,
        num_attention_heads=build.num_attention_heads,
        num_key_value_heads=build.num_attention_heads,
        head_dim=build.v_head_dim,
        num_experts=build.n_routed_experts,
        num_experts_per_tok=build.num_experts_per_tok,
        n_shared_experts=build.n_shared_experts,
        moe_intermediate_size=build.moe_intermediate_size,
        first_k_dense_replace=build.first_k_dense_replace,
        q_lora_rank=build.q_lora_rank,
        kv_lora_rank=build.kv_lora_rank,
        qk_nope_head_dim=build.qk_nope_head_dim,
        qk_rope_head_dim=build.qk_rope_head_dim,
    )


def of_config(config: dict[str, Any], name: str) -> Architecture:
    """The shape that a config.json describes.

    Raises:
        RecipeError: of another kind than those known here, or incomplete.
    """
    kind = str(config.get("model_type"))
    if kind not in _KINDS:
        raise RecipeError(
            f"model.model_name_or_path: {name} is of the kind {kind!r}, whose shape the plan does not know; it knows "
            f"{', '.join(_KINDS)}"
        )
    values = {}
    for field in Architecture.__dataclass_fields__:
        key = _KINDS[kind].get(field, field)
        if config.get(key) is not None:
            values[field] = config[key]
    try:
        values.setdefault("num_key_value_heads", config["num_attention_heads"])
        values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        return Architecture(**values)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise RecipeError(
            f"model.model_name_or_path: the config.json of {name} lacks a value or has a wrong one ({error}); copy the "
            f"checkpoint again"
        ) from None


def parameter_count(build: BuildSection, vocabulary: int) -> int:
    """Parameters of a DeepSeek-V3 of that shape: embeddings and head, MLA, dense and expert MLPs, norms, router.

    The router's correction bias is a buffer and not counted.
    """
    return of_build(build, vocabulary).parameters


def model_parameters(model: ModelSection) -> int | None:
    """Parameters of a recipe's model; None until its files are there.

    Raises:
        RecipeError: a local checkpoint cannot be read.
    """
    if model.build is not None:
        return parameter_count(model.build, TINY_VOCABULARY + len(model.extra_characters))
    name = str(model.model_name_or_path)
    if name in ARCHITECTURES and not Path(name).exists():
        return ARCHITECTURES[name].parameters
    return checkpoint_parameters(Path(name))


def checkpoint_parameters(path: Path) -> int | None:
    """Parameters of a local checkpoint, from its safetensors headers; None where there are none.

    Not counted: the router's correction bias, which is a buffer, and layers beyond config.json's num_hidden_layers
    (DeepSeek-V3's multi-token prediction), which are not loaded.

    Raises:
        RecipeError: a file cannot be read.
    """
    path = path.expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    num_layers = read_config(path).get("num_hidden_layers", math.inf) if files else math.inf
    if not isinstance(num_layers, int | float):
        raise RecipeError(
            f"model.model_name_or_path: {path / 'config.json'}: num_hidden_layers is {num_layers!r:.60} and no number; mend it"
        )
    total = 0
    for file in files:
        for name, shape in _shapes(file).items():
            layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
            if layer and int(layer[1]) >= num_layers:
                continue
            if not name.endswith("e_score_correction_bias"):
                total += math.prod(shape)
    return total if files else None


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json; empty where there is none.

    Raises:
        RecipeError: it is not JSON.
    """
    file = path.expanduser() / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"model.model_name_or_path: {file} is not readable as JSON ({error}); mend it") from None
    if not isinstance(config, dict):
        raise RecipeError(f"model.model_name_or_path: {file} must be a JSON object; copy the checkpoint again")
    return config


def _shapes(file: Path) -> dict[str, list[int]]:
    """What a safetensors file holds: name -> shape."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MOST_HEADER:
                raise ValueError
            header = json.loads(stream.read(length))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        sizes = [size for shape in shapes.values() for size in shape]
        if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            raise ValueError
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RecipeError(
            f"model.model_name_or_path: {file} is not a whole safetensors file; copy the checkpoint again"
        ) from None
    return shapes
