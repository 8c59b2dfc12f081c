"""The recipe of sparse upcycling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.sections import NonNegative, PositiveInt, Recipe


class UpcycleRecipe(Recipe):
    """A dense policy made into a mixture of experts (Komatsuzaki et al., 2023, arXiv 2212.05055)."""

    stage: Literal["upcycle"] = "upcycle"
    source: str  # package:<name>, a .gguf file, a checkpoint directory or a hub name
    num_experts: Annotated[PositiveInt, Field(ge=2)] = 4
    top_k: PositiveInt = 2
    noise: NonNegative = 0.0  # of each expert's weights, relative to their standard deviation
    router_std: NonNegative = 0.02  # of the router's random weights

    @model_validator(mode="after")
    def _choice_is_possible(self) -> UpcycleRecipe:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}; lower top_k")
        return self
