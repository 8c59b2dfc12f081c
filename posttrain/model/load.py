"""Build, load and save the policy so that transformers and vLLM read the same checkpoint, unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from posttrain.quantized import require_trainable


def build_policy(architecture: dict[str, Any], tokenizer: Any, seed: int) -> DeepseekV3ForCausalLM:
    """A DeepSeek-V3 policy with random weights.

    Args:
        architecture: keys of `DeepseekV3Config`; see `posttrain.recipe.BuildSection`.
        tokenizer: gives the vocabulary size and the special tokens' ids.
        seed: of the random weights.

    Raises:
        ValueError: the latent sizes are not those that vLLM's CPU kernel for MLA can decode.
    """
    sizes = (architecture["kv_lora_rank"], architecture["qk_rope_head_dim"])
    if sizes != (512, 64):
        raise ValueError(
            f"kv_lora_rank={sizes[0]} with qk_rope_head_dim={sizes[1]}: vLLM's CPU kernel for MLA decodes 512 with 64 "
            f"only; keep those two (DeepSeek-V3's own) and make the other sizes small"
        )
    config = DeepseekV3Config(
        **architecture,
        vocab_size=len(tokenizer),
        num_key_value_heads=architecture["num_attention_heads"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DeepseekV3ForCausalLM(config)


def load_policy(
    path: str,
    *,
    dtype: str,
    attn_implementation: str,
    experts_implementation: str,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> Any:
    """A causal language model from a checkpoint directory or hub name.

    Args:
        path: of the checkpoint.
        dtype: of its weights, e.g. "float32".
        attn_implementation, experts_implementation: see docs/recipes.md.
        trust_remote_code: whether its own code may run.
        quantization: "nf4" loads the frozen weights of QLoRA; see `posttrain.model.lora.quantization_config`.

    Raises:
        ValueError: see `require_loadable`.
    """
    require_loadable(path, trust_remote_code=trust_remote_code)
    quantized: dict[str, Any] = {}
    if quantization is not None:
        from posttrain.model.lora import quantization_config  # lora.py stands on this file

        quantized = {"quantization_config": quantization_config(quantization)}
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **quantized,
    )
    set_experts_implementation(model, experts_implementation)
    return model


def require_loadable(path: str, *, trust_remote_code: bool) -> None:
    """Refuse FP8 weights: they are not trained, and transformers does not always dequantize them rightly.

    transformers 5.19 takes the size of a block from the shape of the scales, so a weight whose shape is no multiple of them is
    refused or, worse, read wrongly.

    Raises:
        ValueError: the checkpoint is FP8; the message has the command that converts it.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    section: Any = getattr(config, "quantization_config", None)
    require_trainable(path, section.to_dict() if hasattr(section, "to_dict") else section)


def set_experts_implementation(model: Any, name: str) -> None:
    """Choose how the routed experts are multiplied; a dense model has none and is left alone."""
    if hasattr(model, "set_experts_implementation") and getattr(model.config, "num_experts_per_tok", None):
        model.set_experts_implementation(name)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def save_policy(model: Any, tokenizer: Any, path: str | Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write weights, config and tokenizer as Hugging Face files that vLLM loads too.

    Args:
        model: the policy. A prediction module that hangs on it as `mtp` is left out, see `posttrain.model.mtp`.
        tokenizer: saved beside it.
        path: an existing directory.
        state_dict: all weights, where the model's own are spread over ranks.
    """
    _complete_config(model)
    weights = model.state_dict() if state_dict is None else state_dict
    trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("mtp.")}
    model.save_pretrained(path, state_dict=trunk)
    tokenizer.save_pretrained(path)


def save_config(model: Any, tokenizer: Any, path: str | Path) -> None:
    """What `save_policy` writes, but for the weights."""
    _complete_config(model)
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:  # its code is the checkpoint's own
        custom_object_save(model, path, config=model.config)
    model.config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _complete_config(model: Any) -> None:
    if model.config.model_type == "deepseek_v3":
        # vLLM chooses the router's correction bias and sigmoid by these two keys, which transformers does not write.
        model.config.topk_method = "noaux_tc"
        model.config.scoring_func = "sigmoid"
        # transformers drops the multi-token-prediction layer on loading, so the checkpoint must not promise it.
        model.config.num_nextn_predict_layers = 0


def tied_names(model: Any) -> set[str]:
    """Of live tensors that are others by another name, and in no checkpoint."""
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    return set(getattr(model, "_tied_weights_keys", None) or ()) if is_tied else set()


def require_tied(model: Any, path: str) -> None:
    """Refuse a checkpoint that says its head is the embedding, and has another one: it would be lost on the way to others.

    Raises:
        ValueError: that is so.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if tied_names(model) and head is not None and head.weight is not embedding.weight:
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings: true, and the files hold a head that is not the embedding; set it "
            f"to false there, or remove the head"
        )


def checkpoint_tensors(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names they have in a checkpoint (one tensor per expert), in a fixed order.

    The live model fuses all experts of a layer in one tensor; vLLM and Hugging Face files name them one by one.

    Args:
        model: the policy.
        state_dict: all its weights, where they are not those of the model: adapters merged, or gathered from ranks.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    live = {name: tensor for name, tensor in weights.items() if not name.startswith("mtp.")}
    for name in tied_names(model):
        live.pop(name, None)
    named = revert_weight_conversion(model, live)
    for name in sorted(named):
        yield name, named[name].detach()
