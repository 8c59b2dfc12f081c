"""The `lora` section of recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.sections import Number, Positive, PositiveInt, Section

LoraTarget = Literal["attention", "routed_experts", "shared_experts", "dense_mlp", "router"]


class LoraSection(Section):
    """Low-rank adapters; checkpoints that others are to load have them merged."""

    r: PositiveInt = 16
    alpha: Positive = 32
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[LoraTarget, ...] | None, Field(min_length=1)] = (
        None  # all that the model has but the router
    )
    quantization: Literal["nf4"] | None = None  # QLoRA; needs bitsandbytes and a GPU

    @model_validator(mode="after")
    def _experts_have_no_dropout(self) -> LoraSection:
        if self.dropout and "routed_experts" in (self.targets or ()):
            raise ValueError(
                f"dropout={self.dropout:g}: adapters of routed experts (3-D tensors) cannot have dropout; set dropout: 0 "
                f"or leave routed_experts out of targets"
            )
        return self
