"""The learners that benchmarks/plan.py measures."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.planning.learner import Training
from posttrain.planning.shapes import TINY_VOCABULARY, of_build
from posttrain.recipe import BuildSection


@dataclass(frozen=True, slots=True)
class Case:
    """A policy and the batch that it is trained on: full rows, one sample a row, a quarter of each a prompt."""

    build: BuildSection
    rows: int
    width: int
    microbatches: int = 2
    checkpointing: bool = False
    reference: bool = False

    def training(self) -> Training:
        return Training(
            shape=of_build(self.build, TINY_VOCABULARY),
            dtype="float32",
            ranks=1,
            sharded=False,
            rows=self.rows,
            width=self.width,
            trained_share=0.75,
            checkpointing=self.checkpointing,
            logits_chunk=1024,
            frozen=int(self.reference),
            scores=True,  # MLA on CPU: keys are longer than values, so no kernel avoids them
            accumulates=self.microbatches > 1,
        )


_SMALL = BuildSection(
    hidden_size=192, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4, max_position_embeddings=1024
)
_MEDIUM = BuildSection(
    hidden_size=384,
    intermediate_size=1024,
    moe_intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=6,
    n_routed_experts=16,
    max_position_embeddings=1024,
)
_LARGE = BuildSection(
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=320,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=16,
    max_position_embeddings=1024,
)

CASES = {
    "small": Case(_SMALL, rows=16, width=256),
    "medium": Case(_MEDIUM, rows=4, width=256),
    "medium, long rows": Case(_MEDIUM, rows=2, width=768),
    "medium, checkpointing, reference": Case(_MEDIUM, rows=8, width=256, checkpointing=True, reference=True),
    "large": Case(_LARGE, rows=4, width=256),
}
