"""What a forward pass keeps for the backward pass, counted tensor by tensor from transformers' layers.

A norm keeps its input and what it divided down (in the type of the residual stream) and its output, which the products read. A
product keeps its input. `silu(gate) * up` keeps all three and the product that goes on. Attention keeps queries, keys, values,
its output and, where the scores exist at all, their softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.architectures import Architecture
from posttrain.planning.work import key_dim


@dataclass(frozen=True, slots=True)
class Kept:
    """Numbers that one layer keeps for each token.

    Attributes:
        stream: in float32 whatever the products are computed in.
        inner: in the type of the products.
        scores: for each key of the row, where attention scores are materialised.
    """

    stream: float
    inner: float
    scores: float

    def bytes_per_token(self, width: int, inner_bytes: int, *, with_scores: bool) -> float:
        """Of one layer in rows of `width` tokens."""
        scores = self.scores * width * 4 if with_scores else 0.0
        return self.stream * 4 + self.inner * inner_bytes + scores


def kept_by(shape: Architecture, *, sparse: bool) -> Kept:
    """What a layer keeps; `sparse` is one with experts."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    stream = 4.0 * hidden  # two norms: input and what it was divided down to
    inner = 2.0 * hidden + _attention(shape)  # the norms' outputs
    if sparse:
        chosen, width = shape.num_experts_per_tok, shape.moe_intermediate_size
        inner += chosen * (2 * hidden + 4 * width)  # input, gate and up, silu, product, output
        inner += 4 * shape.n_shared_experts * width
        stream += shape.num_experts  # affinities
    else:
        inner += 4 * shape.intermediate_size
    return Kept(stream, inner, heads)


def _attention(shape: Architecture) -> float:
    heads, keys = shape.num_attention_heads, key_dim(shape)
    if shape.model_type == "deepseek_v3":
        latent = 3 * shape.kv_lora_rank + shape.qk_rope_head_dim
        query = 3 * (shape.q_lora_rank or 0)
        return latent + query + heads * (2 * keys + 2 * shape.head_dim)
    norms = 2 if shape.model_type in ("qwen3", "qwen3_moe") else 0
    return heads * (2 + norms / 2) * keys + (2 + norms / 2) * shape.num_key_value_heads * keys + heads * shape.head_dim


def layers_of(shape: Architecture) -> tuple[int, int]:
    """Number of dense and of sparse layers."""
    dense = shape.first_k_dense_replace if shape.num_experts else shape.num_hidden_layers
    return dense, shape.num_hidden_layers - dense
