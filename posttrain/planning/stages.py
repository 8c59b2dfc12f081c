"""From a recipe to what the formulas take: how it trains on a rank, and what its engines are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.architectures import Architecture
from posttrain.layout import check_layout, require_node
from posttrain.planning.hardware import Hardware
from posttrain.planning.learner import Training
from posttrain.planning.lengths import Lengths
from posttrain.planning.sampler import Engine, smallest_engine
from posttrain.planning.shapes import architecture_of
from posttrain.planning.work import adapter_parameters
from posttrain.recipe import GrpoRecipe, ModelSection, Recipe, RecipeError, RewardModelRecipe, SftRecipe

DEFAULT_MEAN_SHARE = 0.25  # of max_completion_length
DEFAULT_SIGMA = 0.6
_OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adafactor": 0, "sgd": 0}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a recipe does not say.

    Attributes:
        hardware: the machine.
        mean_length: of a completion, tokens; None takes a quarter of the longest.
        length_sigma: deviation of its logarithm.
        prompt_tokens: of a prompt.
        gpus_per_sampler: None takes the recipe's tensor_parallel_size, or as many as the weights need.
        ranks: of a stage on a TRL trainer, which is told by `accelerate launch` and not by the recipe; None: as many as it
            takes for weights, gradients and optimizer to leave half of the memory.
        steps: of a stage whose recipe counts epochs.
        price: of a GPU hour.
    """

    hardware: Hardware
    mean_length: float | None = None
    length_sigma: float = DEFAULT_SIGMA
    prompt_tokens: int = 256
    gpus_per_sampler: int | None = None
    ranks: int | None = None
    steps: int | None = None
    price: float | None = None


def require_shape(model: ModelSection) -> Architecture:
    """The model's shape.

    Raises:
        RecipeError: it is not known without the network.
    """
    shape = architecture_of(model)
    if shape is None:
        raise RecipeError(
            f"model.model_name_or_path: the shape of {model.model_name_or_path} is not known here: its files are not there "
            f"and posttrain/architectures.py has no such model; fetch it, or make it first"
        )
    return shape


def lengths_of(recipe: GrpoRecipe, assumed: Assumptions) -> Lengths:
    """Of the completions."""
    longest = recipe.rollout.max_completion_length
    return Lengths(assumed.mean_length or max(1.0, DEFAULT_MEAN_SHARE * longest), assumed.length_sigma, longest)


def training_of(recipe: Recipe, assumed: Assumptions) -> Training:
    """How the stage trains.

    Raises:
        RecipeError: it does not train, or the model's shape is not known.
    """
    if isinstance(recipe, GrpoRecipe):
        return _grpo(recipe, assumed)
    if isinstance(recipe, SftRecipe | RewardModelRecipe):
        return _trainer(recipe, assumed)
    raise RecipeError(
        f"stage: a plan is made of sft, reward_model, grpo and pipelines of them, and this is {recipe.stage!r}; --dry-run "
        f"says what it would do"
    )


def materialises_scores(model: ModelSection, shape: Architecture, hardware: Hardware) -> bool:
    """Whether attention keeps its scores: `eager` does, and sdpa on CPU for heads whose values are smaller than their keys."""
    on_cpu = hardware.calibration is not None
    return model.attn_implementation == "eager" or (on_cpu and shape.model_type == "deepseek_v3")


def _grpo(recipe: GrpoRecipe, assumed: Assumptions) -> Training:
    shape, learner = require_shape(recipe.model), recipe.learner
    check_layout(recipe.model, None, learner)
    lengths = lengths_of(recipe, assumed)
    lora = recipe.lora
    frozen = int(bool(recipe.algorithm.beta) and lora is None) + int(recipe.teacher is not None)
    return Training(
        shape=shape,
        dtype=recipe.model.dtype,
        ranks=learner.num_workers,
        sharded=learner.parallel == "fsdp",
        expert_parallel=learner.expert_parallel_size,
        context_parallel=learner.context_parallel_size,
        rows=max(1, learner.max_tokens_per_microbatch // learner.row_length),
        width=learner.row_length,
        trained_share=lengths.mean / (lengths.mean + assumed.prompt_tokens),
        checkpointing=learner.gradient_checkpointing,
        logits_chunk=learner.logits_chunk,
        frozen=frozen,
        offload_optimizer=learner.offload_optimizer,
        offload_frozen=learner.offload_reference,
        trained=None if lora is None else adapter_parameters(shape, lora.r, lora.targets),
        scores=materialises_scores(recipe.model, shape, assumed.hardware),
    )


def _trainer(recipe: SftRecipe | RewardModelRecipe, assumed: Assumptions) -> Training:
    shape, training = require_shape(recipe.model), recipe.training
    lora = recipe.lora if isinstance(recipe, SftRecipe) else None
    trained = None if lora is None else adapter_parameters(shape, lora.r, lora.targets)
    each = _OPTIMIZER_BYTES[training.optim]
    states = shape.parameters * 4 + (shape.parameters if trained is None else trained) * (4 + each)
    ranks = assumed.ranks or ranks_for(states, assumed.hardware)
    chats = 2 if isinstance(recipe, RewardModelRecipe) else 1
    return Training(
        shape=shape,
        dtype="bfloat16" if training.bf16 else "float32",
        ranks=ranks,
        sharded=ranks > 1 and lora is None,
        rows=training.per_device_train_batch_size * chats,
        width=training.max_length,
        checkpointing=training.gradient_checkpointing,
        logits_chunk=1024 if chats == 1 else 1,  # a reward model's head gives one number
        optimizer_bytes=each,
        trained=trained,
        scores=materialises_scores(recipe.model, shape, assumed.hardware),
        accumulates=training.gradient_accumulation_steps > 1,
    )


def ranks_for(states: float, hardware: Hardware) -> int:
    """Ranks, a power of two, over which so many bytes take at most half of each one's memory."""
    return 2 ** max(0, math.ceil(math.log2(states / (0.5 * hardware.memory_gb * 1e9))))


def engine_of(recipe: GrpoRecipe, assumed: Assumptions) -> Engine:
    """Of the samplers.

    Raises:
        RecipeError: the policy does not divide by a sampler's devices, or they are more than a node has.
    """
    sampler, shape, hardware = recipe.sampler, require_shape(recipe.model), assumed.hardware
    check_layout(recipe.model, sampler)
    require_node(sampler.tensor_parallel_size, hardware.gpus_per_node)
    dtype = sampler.dtype or recipe.model.dtype
    engine = Engine(
        shape=shape,
        dtype=dtype,
        gpus=assumed.gpus_per_sampler or sampler.tensor_parallel_size,
        utilization=sampler.gpu_memory_utilization,
        max_num_seqs=sampler.max_num_seqs,
        max_model_len=sampler.max_model_len,
        hardware=hardware,
    )
    return engine if assumed.gpus_per_sampler else smallest_engine(engine)
