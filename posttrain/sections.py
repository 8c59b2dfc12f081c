"""Sections that several stages' recipes share: model, data, sampler, optimizer, router, evaluation.

Keys carry the names that TRL and transformers use where one exists; docs/recipes.md explains each. Nothing heavy is
imported here: a wrong recipe is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line that names file, key, value and cure."""


def no_bool(value: Any) -> Any:
    """For `BeforeValidator`: YAML's true and false are no numbers."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true/false")
    return value


Number = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Placement = Literal["any", "pack", "spread", "strict_pack", "strict_spread"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


def no_processors(value: Any) -> Any:
    """For `BeforeValidator`: what a worker reserves has keys of its own for these two."""
    for name in ("CPU", "GPU"):
        if isinstance(value, Mapping) and name in value:
            raise ValueError(f"{name}: set num_{name.lower()}s (where a section has it) and not resources; remove it")
    return value


# Of Ray: what a node was started with (`ray start --resources`), and how much of it.
Resources = Annotated[Mapping[str, Positive], BeforeValidator(no_processors)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused and values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)


class BuildSection(Section):
    """Architecture of a DeepSeek-V3 policy built with random weights; the names are those of `DeepseekV3Config`."""

    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 256
    moe_intermediate_size: PositiveInt = 64
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    n_routed_experts: PositiveInt = 8
    n_shared_experts: PositiveInt = 1
    num_experts_per_tok: PositiveInt = 2
    n_group: PositiveInt = 2
    topk_group: PositiveInt = 1
    first_k_dense_replace: NonNegativeInt = 1
    routed_scaling_factor: Positive = 1.0
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 32
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 32
    max_position_embeddings: PositiveInt = 512
    initializer_range: Positive = 0.06  # a policy this narrow learns to copy far sooner than with the usual 0.02

    @model_validator(mode="after")
    def _latent_can_be_decoded(self) -> BuildSection:
        if (self.kv_lora_rank, self.qk_rope_head_dim) != (512, 64):
            raise ValueError(
                f"kv_lora_rank={self.kv_lora_rank} with qk_rope_head_dim={self.qk_rope_head_dim}: vLLM's CPU kernel for "
                f"MLA decodes 512 with 64 only; leave both out and make the other sizes small"
            )
        return self

    @model_validator(mode="after")
    def _router_is_possible(self) -> BuildSection:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}; "
                f"set n_group to a divisor"
            )
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"groups of {self.n_routed_experts // self.n_group} expert(s): a group is scored by its two best "
                f"experts, so n_routed_experts / n_group must be at least 2; lower n_group"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}; lower topk_group")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts of topk_group="
                f"{self.topk_group} groups; lower num_experts_per_tok or raise topk_group"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} exceeds num_hidden_layers="
                f"{self.num_hidden_layers}; lower it"
            )
        return self


class ModelSection(Section):
    """The policy: a checkpoint in Hugging Face format, or a new DeepSeek-V3 to build. Exactly one of the two."""

    model_name_or_path: str | None = None
    build: BuildSection | None = None
    extra_characters: str = ""  # build: characters beyond printable ASCII that its tokenizer knows, each a token
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = "grouped_mm"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> ModelSection:
        if (self.model_name_or_path is None) == (self.build is None):
            raise ValueError("give exactly one of model_name_or_path (a checkpoint) and build (a new tiny model)")
        return self

    @model_validator(mode="after")
    def _characters_are_new(self) -> ModelSection:
        characters = self.extra_characters
        if characters and self.build is None:
            raise ValueError("extra_characters has no meaning without build: a checkpoint has its tokenizer; remove it")
        known = next((c for c in characters if c.isascii() or characters.count(c) > 1), None)
        if known is not None:
            raise ValueError(
                f"extra_characters={characters!r}: {known!r} is ASCII, which every built policy knows, or there twice; "
                f"remove it"
            )
        return self


def require_checkpoint(model: ModelSection, stage: str) -> None:
    """Refuse `model.build` where a stage needs weights that have learnt something.

    Raises:
        ValueError: no checkpoint is named.
    """
    if model.model_name_or_path is None:
        raise ValueError(
            f"model.build: {stage} needs a checkpoint; build the model in an SFT stage and give its checkpoints/latest as "
            f"model.model_name_or_path"
        )


class DatasetSection(Section):
    """A source of records: a generated task family (`task`) or a file or hub name read with `datasets` (`path`)."""

    task: str | None = None  # chain_sum, products, letter_counting, bilingual_counting, mixed_counting
    levels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    size: PositiveInt | None = None  # records; for `path`, None takes all
    worked_fraction: Fraction = 1.0  # SFT: share of the records with a worked solution that are trained with it
    careless_fraction: Fraction = 0.0  # SFT: share of the direct answers that are a number nearby instead
    path: str | None = None  # .jsonl, .parquet or a hub name
    name: str | None = None  # configuration of a hub dataset
    split: str | None = None  # default: "train" for training, "eval" (tasks) or "test" (files) for evaluation
    columns: Mapping[str, str] = Field(default_factory=dict)  # our column name -> theirs
    adapter: str | None = None  # what turns their rows into ours; None: that of the hub name, where one is shipped
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _exactly_one_source(self) -> DatasetSection:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task (a generated family) and path (a file or hub name)")
        if self.task is not None and self.size is None:
            raise ValueError(f"task {self.task!r} needs size, the number of records to generate; add e.g. size: 1000")
        ignored = {"name", "columns", "adapter"} if self.task is not None else {"levels"}
        useless = sorted(ignored & self.model_fields_set)
        if useless:
            kind = "task" if self.task is not None else "path"
            raise ValueError(f"{', '.join(useless)} has no meaning beside {kind}; remove it")
        if self.adapter is not None and self.columns:
            raise ValueError(
                f"adapter={self.adapter!r} and columns both say what becomes of the columns; remove one (an "
                f"adapter gives them our names)"
            )
        if len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels={list(self.levels)} names a level twice; name each once")
        if self.task is not None and self.split not in (None, "train", "eval"):
            raise ValueError(
                f"split={self.split!r}: generated tasks have 'train' and 'eval'; name one, or leave it out"
            )
        return self

    def refuse(self, place: str, *keys: str) -> None:
        """Refuse keys that this list of datasets would ignore.

        Args:
            place: the list, e.g. "eval.datasets".
            keys: that have no meaning there.

        Raises:
            ValueError: one of them was given.
        """
        given = [key for key in keys if key in self.model_fields_set]
        if given:
            raise ValueError(f"{place}: {given[0]}={getattr(self, given[0])!r} has no meaning here; remove it")


class RewardSection(Section):
    """One reward function, and what it may do. It runs in processes of its own."""

    func: str  # module:function, path/to/file.py:function, or a name that a package publishes
    name: str | None = None  # metric name; default: the module's or the file's
    weight: Number = 1.0
    kwargs: Mapping[str, Any] = Field(default_factory=dict)
    clip: tuple[Number, Number] | None = None  # of the score, before the weight
    requires: Mapping[str, Number] = Field(
        default_factory=dict
    )  # other reward -> score it must reach for this to count
    timeout_seconds: Positive | None = None  # of one call; None: 10, async 120, batched and grouped 300
    on_timeout: Number = 0.0  # score of a completion for which judging took too long
    on_crash: Number = 0.0  # score of a completion that brought the judge down
    retries: NonNegativeInt = 2  # after a failure that says nothing of the completion
    max_failed_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.5  # of a step's completions; beyond it the run stops
    max_memory_gib: Positive | None = 4.0  # of one process, beyond its imports; None is no limit
    max_processes: PositiveInt = 32
    max_workers: PositiveInt = 4  # processes that judge at the same time, while calls hang in the others
    max_concurrency: PositiveInt = 32  # async: calls at a time in one process
    batch_size: PositiveInt = 64  # batched: completions in a call
    num_workers: PositiveInt = 1  # Ray actors
    num_cpus: NonNegative = 0  # what Ray reserves for one
    num_gpus: NonNegative = 0

    @property
    def label(self) -> str:
        """Name under which the reward is logged: `reward/<label>/mean`."""
        place = self.func.rpartition(":")[0] or self.func
        return self.name or (Path(place).stem if place.endswith(".py") else place.rpartition(".")[2])


class SamplerSection(Section):
    """The vLLM rollout workers."""

    dtype: Literal["float32", "bfloat16"] | None = None  # None: model.dtype
    num_workers: PositiveInt = 1
    tensor_parallel_size: PositiveInt = 1  # devices of a node that one worker's policy is spread over
    enable_expert_parallel: bool = False  # each of them holds whole experts instead of a part of each
    max_model_len: PositiveInt = 256  # prompt + completion, tokens
    max_num_seqs: PositiveInt = 256  # sequences decoded together by one worker
    kv_cache_gib: Positive = 1.0  # on CPU, of each device; on GPU see gpu_memory_utilization
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] = 0.5
    num_cpus: NonNegative = 1  # what Ray reserves for each device of a worker
    num_threads: PositiveInt = 2  # OpenMP threads of each device of a worker on CPU
    start_timeout_seconds: Positive = 300
    timeout_seconds: Positive = 60  # without an answer, or without a step while there is work: the worker is given up
    max_restarts: NonNegativeInt = 3  # of each worker in a run
    slow_factor: NonNegative = 10  # a worker so many times slower than the others is given up; 0 leaves it alone
    resources: Resources = Field(default_factory=dict)  # that nodes were started with and one worker reserves
    placement: Placement = "any"  # of the workers on the nodes: see docs/scale.md

    @model_validator(mode="after")
    def _whole_gibibytes(self) -> SamplerSection:
        if self.kv_cache_gib != int(self.kv_cache_gib):
            raise ValueError(f"kv_cache_gib={self.kv_cache_gib:g}: vLLM takes whole GiB; give 1, 2, ...")
        return self

    @model_validator(mode="after")
    def _experts_have_somewhere_to_go(self) -> SamplerSection:
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "enable_expert_parallel=true with tensor_parallel_size=1: experts are spread over the devices of one sampler; "
                "set tensor_parallel_size to 2 or more, or enable_expert_parallel to false"
            )
        return self

    @property
    def devices(self) -> int:
        """Of all workers."""
        return self.num_workers * self.tensor_parallel_size

    @property
    def cpus_of_one(self) -> float:
        """That Ray reserves for a worker with all its devices."""
        return self.num_cpus * self.tensor_parallel_size

    @property
    def cpus(self) -> float:
        """That Ray reserves for all workers."""
        return self.num_workers * self.cpus_of_one


class TrainerSection(Section):
    """What every stage on a TRL trainer has; names and meaning as in transformers' TrainingArguments."""

    chat_template: str | None = None  # None: the tokenizer's; else a shipped name (deepseek_v3, tiny) or a .jinja file
    max_steps: PositiveInt | None = None
    num_train_epochs: Positive | None = None
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch"
    logging_steps: PositiveInt = 10

    @model_validator(mode="after")
    def _exactly_one_length(self) -> TrainerSection:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give exactly one of max_steps and num_train_epochs")
        return self


class OptimizerSection(Section):
    """AdamW; names and meaning as in transformers' TrainingArguments."""

    learning_rate: Positive = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: NonNegative = 0.0  # where a cosine ends (DeepSeek-V3's SFT: 5e-6 to 1e-6)
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    skip_grad_norm: Positive | None = (
        None  # a step with a larger gradient norm is not taken; None: one that is no number
    )
    max_skipped_steps: PositiveInt = 3  # in a row, then the run goes back to its newest checkpoint (GRPO) or stops

    @model_validator(mode="after")
    def _decays_downwards(self) -> OptimizerSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}; lower it"
            )
        if self.lr_scheduler_type != "cosine" and self.min_learning_rate:
            raise ValueError(
                f"min_learning_rate has no meaning with lr_scheduler_type: {self.lr_scheduler_type}; remove it"
            )
        return self


class RouterSection(Section):
    """Auxiliary-loss-free balance of DeepSeekMoE (DeepSeek-V3, section 2.1.2)."""

    bias_update_speed: NonNegative = 0.0  # gamma; 0 freezes the correction bias
    freeze: bool = False  # keep the router's weights as they are


class EnvironmentSection(Section):
    """What answers the policy over several turns (see docs/environments.md). Each episode has a process of its own."""

    func: str  # module:Class or path/to/file.py:Class
    kwargs: Mapping[str, Any] = Field(default_factory=dict)  # of the class
    max_turns: PositiveInt = 4  # messages of the policy in an episode
    max_turn_length: PositiveInt | None = None  # tokens of one of them; None: what the episode has left
    weight: Number = 1.0  # of the episode's reward beside `rewards`
    success_reward: Number = 1.0  # evaluation: the reward from which on an episode counts as a success
    timeout_seconds: Positive = 10.0  # of the start, and of each step
    max_memory_gib: Positive | None = 4.0  # of one episode's process, beyond its imports; None is no limit
    max_concurrency: PositiveInt = 16  # environments that work at the same time
    max_failed_fraction: Fraction = 0.5  # of a step's episodes; beyond it the run stops


class EvalSection(Section):
    """pass@1 (sampled) and greedy accuracy on held-out problems, with the grader that is also the reward."""

    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    reward: RewardSection = RewardSection(func="rewards.task_answer:score", name="accuracy")
    environment: EnvironmentSection | None = None  # success in episodes instead of a grader; in GRPO the recipe's own
    num_samples: PositiveInt = 1  # sampled completions per problem
    greedy: bool = True
    max_completion_length: PositiveInt = 128
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    seed: NonNegativeInt = 1234
    eval_steps: NonNegativeInt = 0  # GRPO: also every so many steps; 0 is before and after only

    @model_validator(mode="after")
    def _all_of_it_counts(self) -> EvalSection:
        for index, dataset in enumerate(self.datasets):
            dataset.refuse(f"datasets.{index}", "weight", "worked_fraction", "careless_fraction")
        if self.environment is not None and self.names_a_grader:
            raise ValueError("reward and environment both say what counts as right; remove one")
        return self

    @property
    def names_a_grader(self) -> bool:
        """Whether `reward` is another than the default."""
        return bool(self.reward != type(self).model_fields["reward"].default)

    def check_fits(self, sampler: SamplerSection, *, during_training: bool) -> None:
        """Refuse an evaluation that the stage cannot do as asked.

        Raises:
            ValueError: completions longer than the sampler's window, or eval_steps where there are no steps to count.
        """
        if self.max_completion_length >= sampler.max_model_len:
            raise ValueError(
                f"eval.max_completion_length={self.max_completion_length} leaves no room for a prompt in "
                f"sampler.max_model_len={sampler.max_model_len}; raise sampler.max_model_len"
            )
        if self.eval_steps and not during_training:
            raise ValueError(f"eval.eval_steps={self.eval_steps}: only GRPO evaluates between its steps; remove it")


class CheckpointSection(Section):
    save_steps: NonNegativeInt = 0  # 0 saves at the end (and on an interrupt) only
    save_total_limit: PositiveInt = 2


class Recipe(Section):
    """What every stage has."""

    stage: str
    run_name: str | None = None
    output_dir: str | None = None
    seed: NonNegativeInt = 0

    @property
    def run_dir(self) -> Path:
        """Where the stage writes; `runs/<run_name>` unless output_dir says otherwise."""
        return Path(self.output_dir or f"runs/{self.run_name}")
