"""Shapes of published models, so that a plan knows their size without the network. Nothing else reads them.

Values are those of each model's config.json under transformers' names; sources beside them. What is counted from them is
compared with transformers on the meta device in tests/test_architectures.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of one of the known kinds and what follows from its shape."""

    model_type: str  # deepseek_v3, qwen3_moe, qwen3, qwen2, mixtral, mistral, llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense layers
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128  # of values; of keys too, but for deepseek_v3
    tie_word_embeddings: bool = False
    num_experts: int = 0  # routed
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention, its own norms and biases included."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.model_type == "deepseek_v3":
            query = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            rank = self.q_lora_rank
            down = hidden * query if rank is None else hidden * rank + rank + rank * query
            latent = hidden * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
            up = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.head_dim)
            return down + latent + up + heads * self.head_dim * hidden
        queries, keys = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norms = 2 * self.head_dim if self.model_type in ("qwen3", "qwen3_moe") else 0
        extra = norms + (queries + 2 * keys if self.model_type == "qwen2" else 0)  # biases
        return 2 * hidden * queries + 2 * hidden * keys + extra

    def _count(self, experts: int) -> int:
        """Parameters with so many routed experts in a layer."""
        hidden = self.hidden_size
        dense = self.first_k_dense_replace if self.num_experts else self.num_hidden_layers
        sparse = 3 * hidden * self.moe_intermediate_size * (experts + self.n_shared_experts) + self.num_experts * hidden
        layers = self.num_hidden_layers * (self.attention + 2 * hidden) + dense * 3 * hidden * self.intermediate_size
        layers += (self.num_hidden_layers - dense) * sparse
        return layers + self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2) + hidden

    @property
    def parameters(self) -> int:
        """All parameters; without the prediction module and the router's correction bias."""
        return self._count(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets, embedding and head included."""
        return self._count(self.num_experts_per_tok)

    @property
    def cache_bytes(self) -> int:
        """KV cache of one token in bfloat16: MLA keeps the latent and the rotary key, the others keys and values."""
        if self.model_type == "deepseek_v3":
            return 2 * self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


# arXiv 2412.19437, section 4.2
_DEEPSEEK_V3 = Architecture(
    *("deepseek_v3", 129280, 7168, 18432, 61, 128, 128),
    num_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
)
# slime, scripts/models/moonlight.sh
_MOONLIGHT = Architecture(
    *("deepseek_v3", 163840, 2048, 11264, 27, 16, 16),
    num_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    kv_lora_rank=512,
)
# slime, scripts/models/qwen3-30B-A3B.sh
_QWEN3_30B = Architecture(
    *("qwen3_moe", 151936, 2048, 6144, 48, 32, 4),
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
# arXiv 2412.15115, table 1, and each model's config.json
_QWEN25_1_5B = Architecture("qwen2", 151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True)
_QWEN25_7B = Architecture("qwen2", 152064, 3584, 18944, 28, 28, 4)
_QWEN25_32B = Architecture("qwen2", 152064, 5120, 27648, 64, 40, 8)

ARCHITECTURES = {
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-V3-Base": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK_V3,
    "moonshotai/Moonlight-16B-A3B": _MOONLIGHT,
    "moonshotai/Moonlight-16B-A3B-Instruct": _MOONLIGHT,
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3_30B,
    "Qwen/Qwen2.5-1.5B": _QWEN25_1_5B,
    "Qwen/Qwen2.5-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-32B": _QWEN25_32B,
}
