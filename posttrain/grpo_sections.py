"""Sections of a GRPO recipe for what stands beside the policy."""

from __future__ import annotations

from posttrain.sections import CheckpointSection, NonNegative, NonNegativeInt, OptimizerSection, Positive, Section


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
