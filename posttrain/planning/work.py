"""The matrix products of a forward pass, one by one, from the shape of the model.

R rows of W tokens. Attention computes all W keys for each query: packed rows are kept apart by a mask, so no half of the
scores is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.architectures import Architecture


@dataclass(frozen=True, slots=True)
class Product:
    """So many products [rows, inner] x [inner, outer] in one forward pass."""

    group: str  # attention, scores, dense_mlp, shared_experts, routed_experts, router, head
    rows: float
    inner: int
    outer: float
    times: float

    @property
    def flops(self) -> float:
        """Multiplications and additions of all of them."""
        return 2.0 * self.rows * self.inner * self.outer * self.times

    @property
    def has_weights(self) -> bool:
        return self.group != "scores"


def forward_products(shape: Architecture, rows: float, width: int, trained_tokens: int) -> list[Product]:
    """All products of one pass over R rows of W tokens.

    Args:
        shape: of the model.
        rows, width: R and W; a rank that shares rows has a part of one.
        trained_tokens: tokens that the head is asked for.
    """
    tokens = rows * width
    layers = shape.num_hidden_layers
    dense = shape.first_k_dense_replace if shape.num_experts else layers
    found = _attention(shape, tokens, layers)
    found += [
        Product("scores", width, key_dim(shape), width, rows * shape.num_attention_heads * layers),
        Product("scores", width, shape.head_dim, width, rows * shape.num_attention_heads * layers),
    ]
    found += _mlp("dense_mlp", tokens, shape.hidden_size, shape.intermediate_size, dense)
    sparse = layers - dense
    if shape.num_experts and sparse:
        found.append(Product("router", tokens, shape.hidden_size, shape.num_experts, sparse))
        share = tokens * shape.num_experts_per_tok / shape.num_experts
        experts = shape.num_experts * sparse
        found += [
            Product("routed_experts", share, shape.hidden_size, 2 * shape.moe_intermediate_size, experts),
            Product("routed_experts", share, shape.moe_intermediate_size, shape.hidden_size, experts),
        ]
        shared = shape.n_shared_experts * shape.moe_intermediate_size
        found += _mlp("shared_experts", tokens, shape.hidden_size, shared, sparse if shared else 0)
    found.append(Product("head", trained_tokens, shape.hidden_size, shape.vocab_size, 1))
    return [product for product in found if product.times]


def _attention(shape: Architecture, tokens: float, layers: int) -> list[Product]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    sizes: list[tuple[int, int]]
    if shape.model_type == "deepseek_v3":
        queries = heads * key_dim(shape)
        down = shape.q_lora_rank
        sizes = [(hidden, queries)] if down is None else [(hidden, down), (down, queries)]
        sizes += [
            (hidden, shape.kv_lora_rank + shape.qk_rope_head_dim),
            (shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.head_dim)),
        ]
    else:
        keys = shape.num_key_value_heads * shape.head_dim
        sizes = [(hidden, heads * shape.head_dim), (hidden, keys), (hidden, keys)]
    sizes.append((heads * shape.head_dim, hidden))
    return [Product("attention", tokens, inner, outer, layers) for inner, outer in sizes]


def _mlp(group: str, tokens: float, hidden: int, width: int, layers: int) -> list[Product]:
    if not layers:
        return []
    return [Product(group, tokens, hidden, width, 2 * layers), Product(group, tokens, width, hidden, layers)]


def key_dim(shape: Architecture) -> int:
    """Size of one head's key."""
    if shape.model_type == "deepseek_v3":
        return shape.qk_nope_head_dim + shape.qk_rope_head_dim
    return shape.head_dim


def flops(products: Iterable[Product]) -> float:
    return sum(product.flops for product in products)


def flops_per_token(shape: Architecture, width: int, trained_share: float) -> float:
    """Operations of a forward pass for one token, in rows of so many tokens."""
    row = forward_products(shape, 1, width, 0)
    return flops(row) / width + trained_share * 2 * shape.hidden_size * shape.vocab_size


def layer_parameters(shape: Architecture) -> int:
    """Parameters of the largest layer."""
    own = shape.attention + 2 * shape.hidden_size
    if not shape.num_experts:
        return own + 3 * shape.hidden_size * shape.intermediate_size
    experts = shape.num_experts + shape.n_shared_experts
    return own + 3 * shape.hidden_size * shape.moe_intermediate_size * experts + shape.num_experts * shape.hidden_size


def expert_parameters(shape: Architecture) -> int:
    """Parameters of all routed experts of all layers."""
    sparse = shape.num_hidden_layers - shape.first_k_dense_replace
    return 3 * shape.hidden_size * shape.moe_intermediate_size * shape.num_experts * sparse if shape.num_experts else 0


def adapter_parameters(shape: Architecture, rank: int, targets: Iterable[str] | None) -> int:
    """Parameters of LoRA adapters: rank x (in + out) for each matrix; targets as in the recipe, None is all but the router."""
    wanted = set(targets) if targets else {"attention", "dense_mlp", "shared_experts", "routed_experts"}
    matrices = [product for product in forward_products(shape, 1, 1, 0) if product.group in wanted]
    return sum(int(rank * (product.inner + product.outer) * product.times) for product in matrices)
