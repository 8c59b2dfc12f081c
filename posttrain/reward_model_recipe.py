"""The recipe of the learned reward model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.sections import (
    CheckpointSection,
    DatasetSection,
    ModelSection,
    NonNegative,
    NonNegativeInt,
    Number,
    OptimizerSection,
    Positive,
    PositiveInt,
    Recipe,
    Section,
    Tracker,
    TrainerSection,
    require_checkpoint,
)

CorruptionName = Literal["answer", "step", "carried", "skipped", "swapped", "format"]


class PairDatasetSection(DatasetSection):
    """A source of preference pairs: a file, or a generated task whose right solutions are corrupted."""

    kinds: Annotated[tuple[CorruptionName, ...], Field(min_length=1)] | None = None  # None: all

    @model_validator(mode="after")
    def _kinds_are_of_tasks(self) -> PairDatasetSection:
        useless = ["kinds"] if self.task is None else []
        useless += ["careless_fraction"] + ([] if self.task is not None else ["worked_fraction"])
        self.refuse(f"path {self.path!r}" if self.path else f"task {self.task!r}", *useless)
        if self.kinds is not None and len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds={list(self.kinds)} names a kind twice; name each once")
        return self


class RewardTrainingSection(TrainerSection):
    """Names and meaning as in TRL's RewardConfig."""

    max_length: PositiveInt = 512  # tokens of a chat; pairs with a longer one are left out, and said so
    pad_token: str | None = None  # None: the tokenizer's
    center_rewards_coefficient: NonNegative = 0.01  # of the mean square of the sum of both scores
    head_init_std: Positive = 0.01  # of the new head's random weights


class HeldOutSection(Section):
    """Pairs to measure the reward model on, and to normalise its scores by."""

    datasets: tuple[PairDatasetSection, ...] | None = Field(default=None, min_length=1)
    fraction: Annotated[Number, Field(gt=0, lt=1)] | None = None  # or: so many of the prompts are held out
    eval_steps: NonNegativeInt = 0  # also every so many steps; 0: at the end only
    batch_size: PositiveInt = 64  # chats scored together

    @model_validator(mode="after")
    def _exactly_one_source(self) -> HeldOutSection:
        if (self.datasets is None) == (self.fraction is None):
            raise ValueError("give exactly one of datasets (held-out pairs) and fraction (of the training prompts)")
        for index, dataset in enumerate(self.datasets or ()):
            dataset.refuse(f"datasets.{index}", "weight")
        return self


class RewardModelRecipe(Recipe):
    """A reward model trained on preference pairs with TRL's RewardTrainer (Bradley-Terry with margin)."""

    stage: Literal["reward_model"] = "reward_model"
    model: ModelSection
    datasets: tuple[PairDatasetSection, ...] = Field(min_length=1)
    training: RewardTrainingSection
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=6e-6, lr_scheduler_type="cosine", min_learning_rate=6e-7
    )
    validation: HeldOutSection
    checkpoint: CheckpointSection = CheckpointSection()
    report_to: tuple[Tracker, ...] = ()

    @model_validator(mode="after")
    def _starts_from_a_checkpoint(self) -> RewardModelRecipe:
        require_checkpoint(self.model, "a reward model")
        if self.model.dtype != "float32":
            raise ValueError(
                f"model.dtype={self.model.dtype}: a reward model is trained and saved in float32; remove it, and set "
                f"training.bf16 to compute in bfloat16"
            )
        return self
