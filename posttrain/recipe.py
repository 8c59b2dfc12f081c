"""Recipes: strict, typed, immutable descriptions of a stage, read from YAML with `key.path=value` overrides.

    recipe = load_recipe("recipes/tiny/grpo.yaml", ["optimizer.learning_rate=1e-4"], stage="grpo")

A recipe is one YAML mapping. `extends: other.yaml` starts from another recipe (its path is relative to this file) and
replaces what this one says. Keys carry the names that TRL and transformers use where one exists. Whatever is wrong
(unknown key, wrong type, out of range, missing file) raises `RecipeError`, whose one line names the file, the key, the
value and the cure. Nothing heavy is imported here: a wrong recipe is refused before torch is loaded.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line that names file, key, value and cure."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true/false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = "grouped_mm"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> ModelSection:
        if (self.model_name_or_path is None) == (self.build is None):
            raise ValueError("give exactly one of model_name_or_path (a checkpoint) and build (a new tiny model)")
        return self


class DatasetSection(Section):
    """A source of records: a generated task family (`task`) or a file or hub name read with `datasets` (`path`)."""

    task: str | None = None  # chain_sum, products, letter_counting
    levels: tuple[PositiveInt, ...] = (1,)
    size: PositiveInt | None = None  # records; for `path`, None takes all
    worked_fraction: Fraction = 1.0  # SFT on a task: share of records with the written-out reasoning
    path: str | None = None  # .jsonl, .parquet or a hub name
    name: str | None = None  # configuration of a hub dataset
    split: str | None = None  # default: "train" for training, "eval" (tasks) or "test" (files) for evaluation
    columns: Mapping[str, str] = Field(default_factory=dict)  # our column name -> theirs
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _exactly_one_source(self) -> DatasetSection:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task (a generated family) and path (a file or hub name)")
        if self.task is not None and self.size is None:
            raise ValueError(f"task {self.task!r} needs size, the number of records to generate; add e.g. size: 1000")
        ignored = {"name", "columns"} if self.task is not None else {"levels", "worked_fraction"}
        useless = sorted(ignored & self.model_fields_set)
        if useless:
            kind = "task" if self.task is not None else "path"
            raise ValueError(f"{', '.join(useless)} has no meaning beside {kind}; remove it")
        return self


class RewardSection(Section):
    """One reward function: `module:function` or `path/to/file.py:function`."""

    func: str
    name: str | None = None  # metric name; default: the last part of the module
    weight: Number = 1.0
    kwargs: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name under which the reward is logged: `reward/<label>/mean`."""
        return self.name or Path(self.func.partition(":")[0].replace(".", "/")).stem.removesuffix("/py")


class SamplerSection(Section):
    """The vLLM rollout workers."""

    num_workers: PositiveInt = 1
    max_model_len: PositiveInt = 256  # prompt + completion, tokens
    max_num_seqs: PositiveInt = 256  # sequences decoded together by one worker
    kv_cache_gib: Positive = 1.0  # on CPU; on GPU see gpu_memory_utilization
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] = 0.5
    num_cpus: NonNegative = 1  # what Ray reserves for one worker
    num_threads: PositiveInt = 2  # OpenMP threads of one worker on CPU
    start_timeout_seconds: Positive = 300


class SamplingSection(Section):
    """How completions are drawn."""

    max_completion_length: PositiveInt = 128
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0


class OptimizerSection(Section):
    """AdamW; names and meaning as in transformers' TrainingArguments."""

    learning_rate: Positive = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: NonNegative = 0.0  # where linear and cosine end (DeepSeek-V3's SFT: 5e-6 to 1e-6, cosine)
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0

    @model_validator(mode="after")
    def _decays_downwards(self) -> OptimizerSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}; lower it"
            )
        if self.lr_scheduler_type == "constant" and self.min_learning_rate:
            raise ValueError("min_learning_rate has no meaning with lr_scheduler_type: constant; remove it")
        return self


class RouterSection(Section):
    """Auxiliary-loss-free balance of DeepSeekMoE (DeepSeek-V3, section 2.1.2)."""

    bias_update_speed: NonNegative = 0.0  # gamma; 0 freezes the correction bias


class EvalSection(Section):
    """pass@1 (sampled) and greedy accuracy on held-out problems, with the grader that is also the reward."""

    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    reward: RewardSection = RewardSection(func="rewards.task_answer:score", name="accuracy")
    num_samples: PositiveInt = 1  # sampled completions per problem
    greedy: bool = True
    max_completion_length: PositiveInt = 128
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    seed: NonNegativeInt = 1234
    eval_steps: NonNegativeInt = 0  # GRPO: also every so many steps; 0 is before and after only


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


class TrainingSection(Section):
    """SFT; names and meaning as in TRL's SFTConfig."""

    max_length: PositiveInt = 256  # tokens of a packed row
    packing: bool = True
    assistant_only_loss: bool = True
    max_steps: PositiveInt | None = None
    num_train_epochs: Positive | None = None
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    logging_steps: PositiveInt = 10

    @model_validator(mode="after")
    def _exactly_one_length(self) -> TrainingSection:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give exactly one of max_steps and num_train_epochs")
        return self


class SftRecipe(Recipe):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    stage: Literal["sft"] = "sft"
    model: ModelSection
    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=5e-6, lr_scheduler_type="cosine", min_learning_rate=1e-6
    )
    router: RouterSection = RouterSection()
    sampler: SamplerSection = SamplerSection()
    eval: EvalSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()


class RolloutSection(Section):
    """Prompts x generations of one step. Sampling keys as in TRL's GRPOConfig."""

    num_prompts: PositiveInt = 32  # per step
    num_generations: Annotated[int, BeforeValidator(_no_bool), Field(ge=2)] = 16
    max_completion_length: PositiveInt = 128
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0


class AlgorithmSection(Section):
    """GRPO (DeepSeekMath, section 4.1; DeepSeek-R1)."""

    epsilon: Positive = 0.2  # lower clip range
    epsilon_high: Positive | None = None  # upper clip range; None takes epsilon
    beta: NonNegative = 0.001  # weight of the KL to the reference policy
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    scale_rewards: Literal["group", "none"] = "group"  # divide the advantage by the group's standard deviation
    loss_aggregation: Literal["token", "sequence"] = "token"  # mean over tokens (DAPO) or mean of means (GRPO paper)
    drop_zero_signal_groups: bool = False  # leave out groups whose rewards are all equal
    num_minibatches: PositiveInt = 4  # optimizer steps per pass over a rollout batch
    num_iterations: PositiveInt = 1  # passes over a rollout batch

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class LearnerSection(Section):
    num_workers: PositiveInt = 1  # accelerate ranks
    num_cpus: NonNegative = 1  # what Ray reserves for one rank
    num_gpus: NonNegativeInt | None = None  # None: 1 where there is a GPU, else 0
    num_threads: PositiveInt = 2  # OpenMP threads of one rank on CPU
    row_length: PositiveInt = 256  # tokens of a packed row
    max_tokens_per_microbatch: PositiveInt = 4096
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _row_fits(self) -> LearnerSection:
        if self.row_length > self.max_tokens_per_microbatch:
            raise ValueError(
                f"row_length={self.row_length} exceeds max_tokens_per_microbatch={self.max_tokens_per_microbatch}; "
                f"raise max_tokens_per_microbatch"
            )
        return self


class ParitySection(Section):
    """When the run must stop because sampler and learner are not the same policy."""

    max_logprob_gap: Positive = 1e-4  # nats, on the canary and on every trained token
    near_tie_margin: NonNegative = 1e-5  # a flipped expert is a tie when the two scores differ by no more than this
    min_routing_agreement: Fraction = 0.999
    canary_sequences: PositiveInt = 8
    canary_length: Annotated[int, BeforeValidator(_no_bool), Field(ge=2)] = 64  # tokens


class FaultsSection(Section):
    """Deliberate faults, to see that the safety net holds. Leave out in real runs."""

    skip_publication: PositiveInt | None = None  # the samplers pretend to load this version and keep the old weights


class GrpoRecipe(Recipe):
    """Group relative policy optimisation."""

    stage: Literal["grpo"] = "grpo"
    max_steps: PositiveInt
    model: ModelSection
    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    rewards: tuple[RewardSection, ...] = Field(min_length=1)
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    router: RouterSection = RouterSection()
    learner: LearnerSection = LearnerSection()
    sampler: SamplerSection = SamplerSection()
    parity: ParitySection = ParitySection()
    eval: EvalSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    faults: FaultsSection = FaultsSection()
    ray_address: str | None = None  # None: the cluster of the surrounding job, else a local Ray is started
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @property
    def samples_per_step(self) -> int:
        return self.rollout.num_prompts * self.rollout.num_generations

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> GrpoRecipe:
        rows, parts = self.samples_per_step, self.algorithm.num_minibatches
        if rows % parts:
            raise ValueError(
                f"rollout.num_prompts x rollout.num_generations = {rows} samples do not divide into "
                f"algorithm.num_minibatches={parts}; choose a divisor of {rows}"
            )
        if self.rollout.max_completion_length >= self.sampler.max_model_len:
            raise ValueError(
                f"rollout.max_completion_length={self.rollout.max_completion_length} leaves no room for a prompt in "
                f"sampler.max_model_len={self.sampler.max_model_len}; raise sampler.max_model_len"
            )
        if self.learner.row_length < self.sampler.max_model_len:
            raise ValueError(
                f"learner.row_length={self.learner.row_length} cannot hold a sample of sampler.max_model_len="
                f"{self.sampler.max_model_len} tokens; raise learner.row_length or lower sampler.max_model_len"
            )
        labels = [reward.label for reward in self.rewards]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"rewards named {twice[0]!r} appear more than once; give each its own name")
        return self


class EvalRecipe(Recipe):
    """Evaluation of one checkpoint."""

    stage: Literal["eval"] = "eval"
    model: ModelSection
    eval: EvalSection
    sampler: SamplerSection = SamplerSection()


class StageSection(Section):
    """A stage of a pipeline: a recipe file and what to change in it."""

    name: str
    recipe: str  # path, relative to the pipeline's file
    overrides: tuple[str, ...] = ()


class PipelineRecipe(Recipe):
    """Stages in order. `{run_dir}` in an override is the pipeline's run directory."""

    stage: Literal["pipeline"] = "pipeline"
    stages: tuple[StageSection, ...] = Field(min_length=1)


RECIPES: Mapping[str, type[Recipe]] = types.MappingProxyType(
    {"sft": SftRecipe, "grpo": GrpoRecipe, "eval": EvalRecipe, "pipeline": PipelineRecipe}
)

# Names that users of other trainers type, and ours. Unknown keys are also matched by spelling.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "clip_range": "epsilon",
    "reward_funcs": "rewards",
    "model_name": "model_name_or_path",
    "dataset_name": "path",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, stage: str | None = None) -> Any:
    """Read, merge and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; the value is read as YAML. A list item is addressed by its index,
            as in `datasets.0.size=500`.
        stage: which recipe is expected; refused when the file says another.

    Returns:
        The recipe of that stage: `SftRecipe`, `GrpoRecipe`, `EvalRecipe` or `PipelineRecipe`.

    Raises:
        RecipeError: whatever is wrong, in one line.
    """
    path = Path(path)
    tree = _read_tree(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    named = tree.get("stage", stage)
    if named is None or named not in RECIPES:
        hint = _nearest(str(named), RECIPES) if named is not None else ""
        raise RecipeError(f"{path}: stage: {named!r} is not a stage; allowed: {', '.join(RECIPES)}{hint}")
    if stage is not None and named != stage:
        raise RecipeError(
            f"{path}: stage: this is a recipe for {named!r}; run it with python -m {_module(named)} {path}"
        )
    tree.setdefault("run_name", path.stem)
    try:
        return RECIPES[named].model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error, RECIPES[named])}") from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe, every default spelled out; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False)


def is_local_path(name: str) -> bool:
    """Whether a model or dataset name means a place on disk rather than a hub name (`owner/name`)."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1 or bool(Path(name).suffix)


def check_files(recipe: Recipe, source: str | Path) -> None:
    """Refuse a recipe whose local files are not there (hub names are not looked up)."""
    for key, value in _walk(recipe):
        wanted = key.endswith(("model.model_name_or_path", ".path")) and isinstance(value, str)
        if wanted and is_local_path(value) and not Path(value).expanduser().exists():
            raise RecipeError(
                f"{source}: {key}: {value!r} does not exist; give a path that does, or a hub name (owner/name)"
            )


def _plain(value: Any) -> Any:
    """YAML's own types. Datasets keep only what was said of them: some keys are refused beside `task` or `path`."""
    if isinstance(value, DatasetSection):
        return {name: _plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _module(stage: str) -> str:
    return "eval" if stage == "eval" else f"posttrain.{stage}"


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends: the files extend each other in a circle; remove one extends")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe file{_nearest(path.name, _siblings(path))}; give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give a UTF-8 YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(
            f"{path}: not readable as YAML{where}: {getattr(error, 'problem', error)}; mend that line"
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys to values, not {type(tree).__name__}; see recipes/README.md"
        )
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: {base!r} is not a path; give the path of another recipe")
    return _merge(_read_tree(path.parent / base, (*seen, path.resolve())), tree)


def _siblings(path: Path) -> list[str]:
    return [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key.path=value, e.g. optimizer.learning_rate=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value {text!r} is not readable as YAML; quote it") from None
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} holds a value, not keys; override it whole")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, override)]
    if not isinstance(node, dict):
        raise RecipeError(
            f"override {override!r}: {name!r} is below a value, not below keys; override that value whole"
        )
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise RecipeError(
            f"override {override!r}: {name!r} is no item of a list of {len(node)}; use 0 to {len(node) - 1}"
        )
    return int(name)


def _nearest(name: str, candidates: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _explain(error: ValidationError, recipe_type: type[Section]) -> str:
    """The first problem of a validation error as one line: key, value, what is allowed."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(where, recipe_type)}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is required; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{message}{more}"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{key}: {shown} is not accepted: {message[0].lower()}{message[1:]}; change the value{more}"


def _nearest_key(where: Sequence[str], recipe_type: type[Section]) -> str:
    """A hint for an unknown key: another trainer's name, the same name in another section, or the nearest spelling."""
    *parents, last = where
    allowed = {path: path.split(".")[-1] for path in _key_paths(recipe_type)}
    prefix = ".".join(part for part in parents if not part.isdigit())
    here = {path: name for path, name in allowed.items() if ".".join(path.split(".")[:-1]) == prefix}
    wanted = _OTHER_NAMES.get(last, last)
    for candidates in (here, allowed):
        exact = [path for path, name in candidates.items() if name == wanted]
        if exact:
            return f"; did you mean {exact[0]!r}?"
    for candidates in (here, allowed):
        found = difflib.get_close_matches(last, list(candidates.values()), n=1, cutoff=0.6)
        if found:
            return f"; did you mean {next(path for path, name in candidates.items() if name == found[0])!r}?"
    return f"; allowed here: {', '.join(sorted(here.values()))}"


def _key_paths(section: type[Section], prefix: str = "") -> list[str]:
    paths = []
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        paths.append(path)
        for inner in _sections_in(info.annotation):
            paths.extend(_key_paths(inner, f"{path}."))
    return paths


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections_in(part)]


def _walk(value: Any, key: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _walk(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{key}.{index}")
    else:
        yield key, value
