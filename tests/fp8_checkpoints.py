"""Tiny checkpoints in the layout that DeepSeek-V3 is published in, and its arithmetic written another way than ours.

Nothing here uses posttrain's own FP8 code: values are decoded bit by bit and rounded with integers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from data.chat import build_tokenizer
from posttrain.model.load import build_policy, checkpoint_tensors
from posttrain.model.mtp import build_mtp, mtp_tensors
from posttrain.model.router import find_routers
from posttrain.recipe import BuildSection

# Two layers, queries through a latent, and shapes with cut-off blocks: 576 rows of kv_a_proj, 160 columns, 192 rows.
BUILD = {
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "q_lora_rank": 48,
}
PROJECTION = re.compile(r"\.(q_a|q_b|kv_a|kv_b|o|gate|up|down)_proj(_with_mqa)?\.weight$")
FP8_SECTION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def write_fp8_checkpoint(directory: Path, *, shards: int = 4, seed: int = 0) -> Path:
    """A DeepSeek-V3 with random weights and a prediction module, as layer 2, in several files.

    The scales of every fifth weight lie in the file after the weight's.
    """
    tokenizer = build_tokenizer()
    policy = build_policy(BuildSection(**BUILD).model_dump(), tokenizer, seed)
    for router in find_routers(policy):
        router.e_score_correction_bias.copy_(torch.linspace(-0.05, 0.05, 8))
    module = build_mtp(policy)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    tensors = dict(checkpoint_tensors(policy)) | dict(mtp_tensors(policy, module))
    for number, (name, tensor) in enumerate(tensors.items()):
        place = number * shards // len(tensors)
        if PROJECTION.search(name):
            weight, scales = blockwise(tensor)
            files[place][name] = weight
            files[(place + (number % 5 == 0)) % shards][f"{name}_scale_inv"] = scales
        else:
            keep = tensor.dtype if name.endswith("e_score_correction_bias") else torch.bfloat16
            files[place][name] = tensor.to(keep).clone()
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, found in enumerate(files):
        file = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        save_file(found, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(found, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config(policy)))
    tokenizer.save_pretrained(directory)
    policy.generation_config.save_pretrained(directory)
    return directory


def config(policy: Any) -> dict[str, Any]:
    """config.json with the keys that the published one has."""
    found = policy.config.to_dict()
    rope = found.pop("rope_parameters")
    found.pop("dtype", None)
    return found | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1,
        "quantization_config": FP8_SECTION,
    }


def blockwise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8, block by block."""
    values = weight.detach().float()
    rows, columns = -(-values.shape[0] // 128), -(-values.shape[1] // 128)
    found, scales = torch.empty(values.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            scales[row, column] = values[place].abs().max() / 448
            found[place] = (values[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return found, scales


# --- the arithmetic, with integers --------------------------------------------------------------------------------------


def decode_e4m3(number: int) -> float:
    """What a byte stands for: 1 bit of sign, 4 of exponent with bias 7, 3 of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if number & 0x80 else 1.0, (number >> 3) & 15, number & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


TABLE = np.array([decode_e4m3(number) for number in range(256)])


def expected(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of an FP8 weight: products that float64 holds exactly, rounded once, and once more to bfloat16."""
    values = TABLE[weight.view(torch.uint8).numpy()]
    rows, columns = np.indices(values.shape)
    products = values * scales.numpy().astype(np.float64)[rows // 128, columns // 128]
    bits = products.astype(np.float32).view(np.uint32).astype(np.uint64)
    if dtype == torch.float32:
        return torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    half = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)  # to nearest, ties to even
    return torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
