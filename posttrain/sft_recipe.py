"""The recipe of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.lora_section import LoraSection
from posttrain.sections import (
    CheckpointSection,
    DatasetSection,
    EvalSection,
    ModelSection,
    NonNegative,
    NonNegativeInt,
    Number,
    OptimizerSection,
    Positive,
    PositiveInt,
    Recipe,
    RouterSection,
    SamplerSection,
    Section,
    Tracker,
    TrainerSection,
)

LossOn = Literal["assistant", "last_assistant", "completion", "all"]
TooLong = Literal["drop", "truncate", "error"]


class TrainingSection(TrainerSection):
    """SFT; names and meaning as in TRL's SFTConfig."""

    max_length: PositiveInt = 256  # tokens of a packed row
    packing: bool = True
    loss_on: LossOn = "assistant"


class DecontaminationSection(Section):
    """Leaves out training chats that share a long run of words with an evaluation problem."""

    datasets: tuple[DatasetSection, ...] = Field(min_length=1)  # the evaluation sets
    ngram: PositiveInt = 13  # words in a row (GPT-3, appendix C)

    @model_validator(mode="after")
    def _all_of_it_counts(self) -> DecontaminationSection:
        for index, dataset in enumerate(self.datasets):
            dataset.refuse(f"datasets.{index}", "weight", "worked_fraction", "careless_fraction")
        return self


class PreparationSection(Section):
    """What happens to the records between the files and the packed rows."""

    streaming: bool = False  # read, tokenize and pack while training
    mixture_temperature: Positive | None = None  # sources weigh size ** (1 / temperature); None: size, or `weight`
    too_long: TooLong = "drop"  # a chat longer than training.max_length
    deduplicate: bool = False  # leave out chats whose text, case and spaces aside, was there before
    decontamination: DecontaminationSection | None = None


class ValidationSection(Section):
    """Loss on held-out chats while training, and what follows from it."""

    datasets: tuple[DatasetSection, ...] | None = Field(default=None, min_length=1)
    fraction: Annotated[Number, Field(gt=0, lt=1)] | None = None  # or: so much of the training data is held out
    eval_steps: PositiveInt = 100
    early_stopping_patience: NonNegativeInt = 0  # stop after so many evaluations without a better loss; 0: never
    early_stopping_threshold: NonNegative = 0.0  # how much better counts as better

    @model_validator(mode="after")
    def _exactly_one_source(self) -> ValidationSection:
        if (self.datasets is None) == (self.fraction is None):
            raise ValueError("give exactly one of datasets (held-out chats) and fraction (of the training data)")
        for index, dataset in enumerate(self.datasets or ()):
            dataset.refuse(f"datasets.{index}", "weight")
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ValueError("early_stopping_threshold has no meaning without early_stopping_patience; add it")
        return self


class SftRouterSection(RouterSection):
    """Expert balance during SFT. Everything is off by default: fine-tuning keeps the routing it was given."""

    sequence_balance_alpha: NonNegative = 0.0  # DeepSeek-V3's sequence-wise loss; its pre-training used 1e-4
    router_aux_loss_coef: NonNegative = 0.0  # the classical loss of Qwen3-MoE and Mixtral


class MtpSection(Section):
    """Multi-token prediction (DeepSeek-V3, section 2.2), one extra depth."""

    init: Literal["checkpoint", "new"] = "checkpoint"
    loss_weight: Positive = 0.1  # lambda; DeepSeek-V3's pre-training: 0.3, later 0.1
    detach_trunk: bool = False  # the extra loss trains the extra module only


class SftTeacherSection(Section):
    """Logit distillation: beside the token itself, a teacher's whole distribution is learnt at each trained token."""

    model_name_or_path: str  # with the policy's tokenizer; loaded like the policy, and not trained
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the teacher's weights
    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5  # of the divergence in the loss; the cross-entropy has the rest
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[Number, Field(gt=0, lt=1)] | None = (
        None  # jsd: near 0 like forward_kl, near 1 like reverse_kl; None: 0.5
    )
    temperature: Positive = 1.0  # of both distributions
    top_k: PositiveInt | None = None  # the teacher's likeliest tokens and one event for all others; None: all tokens
    logits_chunk: PositiveInt = 1024  # positions whose logits are in memory together

    @property
    def mixture(self) -> float:
        """The beta of `jsd`."""
        return 0.5 if self.beta is None else self.beta

    @model_validator(mode="after")
    def _beta_counts(self) -> SftTeacherSection:
        if self.divergence != "jsd" and self.beta is not None:
            raise ValueError(
                f"beta={self.beta:g} has no meaning with divergence: {self.divergence}; set divergence: jsd, or remove it"
            )
        return self


class SftRecipe(Recipe):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    stage: Literal["sft"] = "sft"
    model: ModelSection
    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    preparation: PreparationSection = PreparationSection()
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=5e-6, lr_scheduler_type="cosine", min_learning_rate=1e-6
    )
    router: SftRouterSection = SftRouterSection()
    mtp: MtpSection | None = None
    lora: LoraSection | None = None
    teacher: SftTeacherSection | None = None
    sampler: SamplerSection = SamplerSection()
    validation: ValidationSection | None = None
    eval: EvalSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    report_to: tuple[Tracker, ...] = ()

    @model_validator(mode="after")
    def _eval_fits(self) -> SftRecipe:
        if self.eval is not None:
            self.eval.check_fits(self.sampler, during_training=False)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> SftRecipe:
        weighted = [index for index, dataset in enumerate(self.datasets) if "weight" in dataset.model_fields_set]
        if self.preparation.mixture_temperature is not None and weighted:
            raise ValueError(
                f"preparation.mixture_temperature and datasets.{weighted[0]}.weight both say how sources are mixed; "
                f"remove one"
            )
        if self.preparation.streaming:
            self._streams()
        if self.lora is not None and self.mtp is not None:
            raise ValueError(
                "lora and mtp: a prediction module is trained with the whole policy, not beside adapters; remove one (a "
                "module of the checkpoint is carried along in any case)"
            )
        if self.router.freeze and self.lora is not None and "router" in (self.lora.targets or ()):
            raise ValueError("router.freeze: true contradicts lora.targets with router; remove one")
        return self

    def _streams(self) -> None:
        if self.training.max_steps is None:
            raise ValueError(
                "preparation.streaming: the length of a stream is not known, so num_train_epochs has no meaning; give "
                "training.max_steps"
            )
        if self.preparation.mixture_temperature is not None:
            raise ValueError(
                "preparation.mixture_temperature needs the sizes of the sources, which a stream does not know; give each "
                "source a weight"
            )
        if len(self.datasets) > 1 and not any("weight" in dataset.model_fields_set for dataset in self.datasets):
            raise ValueError(
                "preparation.streaming: several datasets are blended by weight, since their sizes are not known; give "
                "each one a weight"
            )
        if self.validation is not None and self.validation.fraction is not None:
            raise ValueError("validation.fraction cannot cut a stream; give validation.datasets")
