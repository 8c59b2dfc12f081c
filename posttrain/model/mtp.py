"""Multi-token prediction: one extra depth that predicts the token after the next (DeepSeek-V3, section 2.2).

For token i of a sample, the trunk's hidden state h_i and the embedding of token i + 1 go through

    eh_proj [enorm(embedding of token i + 1); hnorm(h_i)]  ->  a decoder layer like the trunk's  ->  norm  ->  the head

which predicts token i + 2. Embedding and head are the trunk's own. While sampling, the module drafts one token per step
that the trunk then verifies, so training must feed it what the engine feeds it. In vLLM 0.32 (deepseek_mtp.py,
llm_base_proposer.py) that is, row by row:

- hidden state: h_i AFTER the trunk's final norm, the very vector that the head sees;
- token: i + 1, the input ids shifted by one, with the newest sampled token in the last row;
- position of that row, for rotary embedding and cache: i, that of the hidden state (transformers' own module says i + 1;
  rotary attention sees differences only, so the two agree);
- in row 0 the embedding is replaced by zeros, so a sample's row 0 knows nothing of token 1.

A row that was made from a rejected draft is overwritten by the next step, so the cache holds just these rows.
tests/test_mtp.py holds vLLM to it: the drafts it accepts are, request by request, those that this module predicts.

In a checkpoint the module is layer L, one past the trunk's last: `model.layers.{L}.` and then `enorm`, `hnorm`, `eh_proj`,
`shared_head.norm`, a decoder layer's names, and copies of embedding and head (`embed_tokens`, `shared_head.head`). On
loading, vLLM and this file take the trunk's embedding and head instead of the copies.

Shapes: R rows, W tokens of a row, H hidden size, V vocabulary, N positions with a loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import DeepseekV3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm
from transformers.utils import CONFIG_NAME

from posttrain.model.mtp_files import add_layer, checkpoint_directory, read_layer, tensor_files

IGNORED = -100  # the label of a token without loss
_BIAS = "mlp.gate.e_score_correction_bias"  # float32 whatever the model's type: its steps are smaller than bfloat16's

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MtpModule(nn.Module):
    """One depth of multi-token prediction. Embedding, head and rotary embedding are the trunk's and passed in.

    Attributes:
        block: the decoder layer; its attention and experts implementation are those of the trunk's config.
        norm: `shared_head.norm` of the checkpoint.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_RWH: torch.Tensor, next_embeds_RWH: torch.Tensor, position_ids_RW: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        """States that the trunk's head turns into logits of token i + 2.

        Args:
            hidden_RWH: the trunk's hidden states after its final norm.
            next_embeds_RWH: see `next_embeddings`.
            position_ids_RW: int64; they restart where a packed row's next sample starts.
            rotary: the trunk's `model.rotary_emb`.

        Returns:
            [R, W, H], normed.
        """
        mixed_RWH = self.eh_proj(torch.cat([self.enorm(next_embeds_RWH), self.hnorm(hidden_RWH)], dim=-1))
        # As in the trunk: without an attention mask, the restarts of the position ids keep packed samples apart.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=mixed_RWH,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids_RW,
        )
        states_RWH = self.block(
            mixed_RWH,
            attention_mask=mask,
            position_ids=position_ids_RW,
            position_embeddings=rotary(mixed_RWH, position_ids_RW),
        )
        return self.norm(states_RWH)


# --- the loss ---------------------------------------------------------------------------------------------------------


def same_sample(position_ids_RW: torch.Tensor, ahead: int) -> torch.Tensor:
    """bool [R, W]: whether token w + `ahead` exists and belongs to the sample of token w (transformers' own rule)."""
    sample_RW = nn.functional.pad(position_ids_RW.diff(dim=1) != 1, (1, 0)).cumsum(dim=1)
    same_RW = torch.zeros_like(position_ids_RW, dtype=torch.bool)
    if ahead < position_ids_RW.shape[1]:
        same_RW[:, :-ahead] = sample_RW[:, ahead:] == sample_RW[:, :-ahead]
    return same_RW


def next_embeddings(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor], input_ids_RW: torch.Tensor, position_ids_RW: torch.Tensor
) -> torch.Tensor:
    """The embedding of each token's successor, [R, W, H]; zeros at position 0 and where a sample ends."""
    embeds_RWH = embed_tokens(input_ids_RW.roll(-1, dims=1))
    known_RW = same_sample(position_ids_RW, 1) & (position_ids_RW != 0)
    return embeds_RWH.masked_fill(~known_RW[..., None], 0.0)


def mtp_loss(
    mtp: MtpModule,
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    lm_head: nn.Module,
    hidden_RWH: torch.Tensor,
    input_ids_RW: torch.Tensor,
    position_ids_RW: torch.Tensor,
    labels_RW: torch.Tensor,
    rotary: Rotary,
    *,
    detach_trunk: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the token after the next, summed.

    Position i has a loss where label i + 2 is trained and tokens i, i + 1 and i + 2 are of one sample. Logits exist for
    those positions only. The caller divides by the number of tokens (over all microbatches and ranks) and multiplies by
    lambda.

    Args:
        mtp: the module.
        embed_tokens, lm_head: the trunk's.
        hidden_RWH: the trunk's hidden states after its final norm (`last_hidden_state`), computed with use_cache=False:
            with a cache, transformers lets packed samples see each other.
        input_ids_RW, position_ids_RW: int64; position ids restart with each packed sample, padding has 0.
        labels_RW: int64, the token itself where it is trained, else -100; not shifted.
        rotary: the trunk's `model.rotary_emb`.
        detach_trunk: the loss trains the module alone; hidden states, embedding and head are taken as constants.

    Returns:
        loss_sum: float32 scalar, nats; it has a gradient (zero) even where no position has a loss.
        num_tokens: int64 scalar.
    """
    next_embeds_RWH = next_embeddings(embed_tokens, input_ids_RW, position_ids_RW)
    head_parameters: dict[str, torch.Tensor] = dict(lm_head.named_parameters())
    if detach_trunk:
        hidden_RWH, next_embeds_RWH = hidden_RWH.detach(), next_embeds_RWH.detach()
        head_parameters = {name: parameter.detach() for name, parameter in head_parameters.items()}
    states_RWH = mtp(hidden_RWH, next_embeds_RWH, position_ids_RW, rotary)
    targets_RW = labels_RW.roll(-2, dims=1)
    trained_RW = same_sample(position_ids_RW, 2) & (targets_RW != IGNORED)
    logits_NV = torch.func.functional_call(lm_head, head_parameters, (states_RWH[trained_RW],))
    loss_sum = nn.functional.cross_entropy(logits_NV.float(), targets_RW[trained_RW], reduction="sum")
    return loss_sum, trained_RW.sum()


# --- building and loading ---------------------------------------------------------------------------------------------


def build_mtp(model: DeepseekV3ForCausalLM) -> MtpModule:
    """A new module for a trunk that has none, to be trained.

    The decoder layer is a copy of the trunk's last one and the last norm that of the trunk, which fit the head they come
    before: on few tokens, 256 experts are not learnt from nothing. `eh_proj` starts as the mean of its two normed inputs,
    so the layer meets what it knows, a residual stream: the newest token's embedding and the trunk's view of the text. It
    learns faster than from the hidden state alone, which repeats the trunk's answer for token i + 1 with confidence; the
    measurement is in docs/mtp.md. Nothing is random.

    Raises:
        ValueError: not a DeepSeek-V3, or its last layer is dense.
    """
    _require_deepseek_v3(model)
    last = model.model.layers[-1].state_dict()
    if _BIAS not in last:
        raise ValueError(
            f"first_k_dense_replace={model.config.first_k_dense_replace} makes the trunk's last layer dense, and a module "
            f"starts as its copy but is a mixture of experts; lower first_k_dense_replace"
        )
    norm_H = model.model.norm.weight.detach()
    eye_HH = torch.eye(norm_H.numel(), dtype=norm_H.dtype, device=norm_H.device)
    state = {f"block.{name}": tensor.clone() for name, tensor in last.items()}
    state |= {"enorm.weight": torch.ones_like(norm_H), "hnorm.weight": torch.ones_like(norm_H)}
    state |= {"norm.weight": norm_H.clone(), "eh_proj.weight": torch.cat([eye_HH, eye_HH], dim=1) / 2}
    return _module(model, state)


def has_mtp(path: str | Path) -> bool:
    """Whether a checkpoint (a directory or the name of a cached hub model) holds a multi-token prediction module.

    Raises:
        ValueError: there is no such checkpoint on this machine.
    """
    directory = checkpoint_directory(path)
    layer = json.loads((directory / CONFIG_NAME).read_text()).get("num_hidden_layers")
    return f"model.layers.{layer}.eh_proj.weight" in tensor_files(directory)


def require_mtp(path: str | Path) -> None:
    """Check that a checkpoint can draft.

    Raises:
        ValueError: it has no multi-token prediction module, or is not on this machine.
    """
    if not has_mtp(path):
        raise ValueError(
            f"{path} has no multi-token prediction module to draft with; train one in an SFT stage with mtp: {{init: new}}"
        )


def load_mtp(model: DeepseekV3ForCausalLM, path: str | Path) -> MtpModule:
    """The module of a checkpoint, with the type and on the device of the trunk.

    Args:
        model: the trunk, loaded from the same checkpoint or trained from it.
        path: a directory, or the name of a hub model that has been loaded before.

    Raises:
        ValueError: the checkpoint has no module, more than one depth, other sizes than the trunk, or FP8 weights.
    """
    _require_deepseek_v3(model)
    directory, prefix = checkpoint_directory(path), _prefix(model)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read_layer(directory, prefix)}
    for shared in _shared(model):
        tensors.pop(shared, None)  # the trunk's own are the ones in use
    _fuse_experts(tensors, model.config.n_routed_experts, directory)
    like = model.model.norm.weight
    state = {}
    for name, tensor in tensors.items():
        dtype = torch.float32 if name == _BIAS else like.dtype
        state[_live_name(name)] = tensor.to(device=like.device, dtype=dtype)
    try:
        return _module(model, state)
    except RuntimeError as error:
        raise ValueError(f"{directory}: its multi-token prediction module is not one for this trunk: {error}") from None


def _require_deepseek_v3(model: Any) -> None:
    if model.config.model_type != "deepseek_v3":
        raise ValueError(
            f"multi-token prediction is for deepseek_v3 models and this is a {model.config.model_type}; leave out mtp"
        )


def _module(model: DeepseekV3ForCausalLM, state: Mapping[str, torch.Tensor]) -> MtpModule:
    """A module that owns these tensors."""
    with torch.device("meta"):
        mtp = MtpModule(model.config)
    mtp.load_state_dict(state, assign=True)
    return mtp


def _fuse_experts(tensors: dict[str, torch.Tensor], num_experts: int, directory: Path) -> None:
    """Replace the tensors of single experts by the two that transformers multiplies with."""

    def stack(kind: str) -> torch.Tensor:
        names = [f"mlp.experts.{expert}.{kind}.weight" for expert in range(num_experts)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{directory}: its multi-token prediction module has no {missing[0]}")
        return torch.stack([tensors.pop(name) for name in names])

    tensors["mlp.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    tensors["mlp.experts.down_proj"] = stack("down_proj")


# --- saving -----------------------------------------------------------------------------------------------------------


def mtp_tensors(model: DeepseekV3ForCausalLM, mtp: MtpModule) -> Iterator[tuple[str, torch.Tensor]]:
    """The module under the names it has in a checkpoint (one tensor per expert), in a fixed order.

    With the copies of the trunk's embedding and head that such checkpoints hold.
    """
    prefix = _prefix(model)
    live = {prefix + _checkpoint_name(name): tensor for name, tensor in mtp.state_dict().items()}
    named = revert_weight_conversion(model, live)
    named |= {prefix + name: tensor for name, tensor in _shared(model).items()}
    for name in sorted(named):
        yield name, named[name].detach()


def save_mtp(model: DeepseekV3ForCausalLM, mtp: MtpModule, directory: str | Path) -> None:
    """Add the module to a checkpoint directory that holds the saved trunk.

    Raises:
        ValueError: the directory holds no trunk, or a module in another file than the one this function writes.
    """
    add_layer(Path(directory), dict(mtp_tensors(model, mtp)))


def copy_mtp(
    source: str | Path,
    model: DeepseekV3ForCausalLM,
    directory: str | Path,
) -> None:
    """Carry a checkpoint's module into another checkpoint directory, for stages that do not train it.

    Its tensors stay as they are, but for the copies of embedding and head, which are those of the saved trunk.

    Args:
        source: the checkpoint that has the module.
        model: the trunk.
        directory: of the other checkpoint, which holds the saved trunk.

    Raises:
        ValueError: as `load_mtp` for the source and `save_mtp` for the directory.
    """
    prefix = _prefix(model)
    tensors = dict(read_layer(checkpoint_directory(source), prefix))
    trunk = tensor_files(Path(directory))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name, saved in (("embed_tokens.weight", embedding), ("shared_head.head.weight", head)):
        saved = saved if saved in trunk else embedding  # tied
        with safe_open(trunk[saved], framework="pt") as file:
            tensors[prefix + name] = file.get_tensor(saved)
    add_layer(Path(directory), tensors)


# --- names ------------------------------------------------------------------------------------------------------------


def _prefix(model: DeepseekV3ForCausalLM) -> str:
    return f"model.layers.{model.config.num_hidden_layers}."


def _shared(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """What the module shares with the trunk, under its own names for it."""
    return {
        "embed_tokens.weight": model.get_input_embeddings().weight,
        "shared_head.head.weight": model.get_output_embeddings().weight,
    }


def _checkpoint_name(live: str) -> str:
    return "shared_head.norm.weight" if live == "norm.weight" else live.removeprefix("block.")


def _live_name(name: str) -> str:
    if name == "shared_head.norm.weight":
        return "norm.weight"
    return name if name.startswith(("enorm.", "hnorm.", "eh_proj.")) else f"block.{name}"
