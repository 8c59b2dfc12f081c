"""Sections of a GRPO recipe for the learner, and for what stands beside the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.sections import (
    CheckpointSection,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Number,
    OptimizerSection,
    Placement,
    Positive,
    PositiveInt,
    Resources,
    Section,
)


class LearnerSection(Section):
    num_workers: PositiveInt = 1  # accelerate ranks
    num_cpus: NonNegative = 1  # what Ray reserves for one rank
    num_gpus: NonNegativeInt | None = None  # None: 1 where there is a GPU, else 0
    num_threads: PositiveInt = 2  # OpenMP threads of one rank on CPU
    row_length: PositiveInt = 256  # tokens of a packed row
    max_tokens_per_microbatch: PositiveInt = 4096
    gradient_checkpointing: bool = False
    logits_chunk: PositiveInt | None = 1024  # positions whose logits are in memory together; None: all
    share_prompts: bool = False  # compute a prompt once for the completions of a microbatch that have it in common
    parallel: Literal["ddp", "fsdp"] = "ddp"  # every rank holds the policy, or its share of it (FSDP2)
    expert_parallel_size: PositiveInt = 1  # with fsdp: ranks that the experts of a layer are divided over
    context_parallel_size: PositiveInt = 1  # ranks that share each row of tokens, for samples too long for one
    offload_optimizer: bool = False  # optimizer state in main memory but for the step itself; needs a GPU
    offload_reference: bool = False  # reference and teacher in main memory but for scoring; needs a GPU
    start_timeout_seconds: Positive = 300  # how long to wait for room on the cluster
    resources: Resources = Field(default_factory=dict)  # that nodes were started with and one rank reserves
    placement: Placement = "any"  # of the ranks on the nodes: see docs/scale.md

    @model_validator(mode="after")
    def _row_fits(self) -> LearnerSection:
        if self.row_length > self.max_tokens_per_microbatch:
            raise ValueError(
                f"row_length={self.row_length} exceeds max_tokens_per_microbatch={self.max_tokens_per_microbatch}; "
                f"raise max_tokens_per_microbatch"
            )
        return self

    @model_validator(mode="after")
    def _shared_prompts_fit(self) -> LearnerSection:
        if self.share_prompts and self.logits_chunk is None:
            raise ValueError(
                "share_prompts with logits_chunk: null, which keeps the logits of all tokens; set logits_chunk: 1024"
            )
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> LearnerSection:
        if self.parallel == "fsdp" and self.num_workers < 2:
            raise ValueError(
                "parallel: fsdp spreads the policy over ranks; set num_workers: 2 or more, or parallel: ddp"
            )
        if self.parallel == "fsdp" and self.offload_reference:
            raise ValueError(
                "offload_reference with parallel: fsdp: each rank holds its share of the reference only; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _groups_of_context_fit(self) -> LearnerSection:
        size = self.context_parallel_size
        if self.num_workers % size:
            raise ValueError(
                f"context_parallel_size={size} with num_workers={self.num_workers}: the ranks make groups of it; use a number "
                f"that divides {self.num_workers}"
            )
        if size > 1 and self.share_prompts:
            raise ValueError(
                "context_parallel_size with share_prompts: rows of shared prompts are not divided; remove one of the two"
            )
        if size > 1 and self.logits_chunk is None:
            raise ValueError(
                "context_parallel_size with logits_chunk: null, which keeps the logits of all tokens; set logits_chunk: 1024"
            )
        return self

    @model_validator(mode="after")
    def _groups_of_experts_fit(self) -> LearnerSection:
        size, ranks = self.expert_parallel_size, self.num_workers
        if size > 1 and self.parallel != "fsdp":
            raise ValueError(
                f"expert_parallel_size={size} with parallel: {self.parallel}: all else is spread too; set parallel: fsdp"
            )
        if ranks % size:
            raise ValueError(
                f"expert_parallel_size={size} with num_workers={ranks}: the ranks make groups of it; use a number that "
                f"divides {ranks}"
            )
        return self

    def require_accelerator(self, has_accelerator: bool) -> None:
        """Refuse what only an accelerator gives a meaning.

        Raises:
            ValueError: something is to be offloaded to the memory it is in already.
        """
        for name in ("offload_optimizer", "offload_reference"):
            if getattr(self, name) and not has_accelerator:
                raise ValueError(
                    f"learner.{name}: there is no GPU here, so it is in main memory already; remove the key"
                )


class CriticSection(Section):
    """The value model of PPO: the policy's architecture with a head that gives one number for each token."""

    model_name_or_path: str | None = None  # a policy's or a reward model's checkpoint; None takes the policy's
    head_init_std: NonNegative = 0.0  # of a new head; 0 expects nothing at first
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5)
    value_clip: Positive = 0.2  # how far a value may move over a batch before its error counts no less
    warmup_steps: NonNegativeInt = 0  # steps at the start in which only the critic learns


class TeacherSection(Section):
    """A model whose logprobs the policy is drawn to on its own samples (`algorithm.distill_coef`)."""

    model_name_or_path: str  # with the policy's tokenizer; loaded like the policy, and not trained


class GrpoCheckpointSection(CheckpointSection):
    """Which checkpoints are kept."""

    keep_best: bool = False  # also the one with the best eval/pass_at_1, under checkpoints/best; needs eval.eval_steps


class CurriculumSection(Section):
    """Which prompts are sampled from, by how often the run itself has solved them (see posttrain/curriculum.py)."""

    reward: str | None = None  # whose score says whether a completion passes; None: the combined reward
    pass_score: Number = 1.0  # from which score on it passes
    min_pass_rate: Fraction = 0.0  # measured prompts below it are left out
    max_pass_rate: Fraction = 1.0  # measured prompts above it are left out
    min_completions: PositiveInt = 1  # of a prompt, before it may be left out
    retry_steps: NonNegativeInt = 0  # so many steps after its last measurement a prompt comes again; 0: never
    order: Literal["shuffled", "level"] = (
        "shuffled"  # level: each epoch from the lowest `level` of the data to the highest
    )

    @model_validator(mode="after")
    def _does_something(self) -> CurriculumSection:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate={self.min_pass_rate:g} exceeds max_pass_rate={self.max_pass_rate:g}; lower it"
            )
        if self.order == "shuffled" and self.min_pass_rate == 0 and self.max_pass_rate == 1:
            raise ValueError(
                "a curriculum that leaves nothing out and keeps the order does nothing; set min_pass_rate, max_pass_rate or "
                "order, or remove it"
            )
        return self
