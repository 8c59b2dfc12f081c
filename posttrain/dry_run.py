"""`--dry-run`: what a recipe would do, in words and numbers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from posttrain.architectures import ARCHITECTURES, Architecture
from posttrain.distill_plan import distill_lines
from posttrain.planning.quantities import size
from posttrain.planning.shapes import model_parameters, read_config
from posttrain.recipe import (
    CheckpointSection,
    CriticSection,
    DatasetSection,
    DistillRecipe,
    EnvironmentSection,
    EvalRecipe,
    EvalSection,
    GrpoRecipe,
    LearnerSection,
    ModelSection,
    PipelineRecipe,
    Recipe,
    RewardModelRecipe,
    RouterSection,
    SamplerSection,
    SftRecipe,
    SftTeacherSection,
    TeacherSection,
    UpcycleRecipe,
)
from posttrain.recipe_file import stage_recipe
from posttrain.sections import OptimizerSection, TrainerSection

_BYTES = {"float32": 4, "bfloat16": 2}


def describe(recipe: Recipe) -> str:
    """The plan as text, one fact a line.

    Raises:
        RecipeError: a local checkpoint, or a pipeline's stage, cannot be read.
    """
    lines = [f"stage       {recipe.stage}", f"writes to   {recipe.run_dir}", f"seed        {recipe.seed}"]
    if isinstance(recipe, GrpoRecipe):
        lines += _model(recipe.model) + _grpo_trained(recipe) + _data(recipe.datasets) + _grpo(recipe)
        lines += _eval(recipe.eval, recipe.environment)
        lines += _checkpoints(recipe.checkpoint, first="after the first step, ")
        lines += _memory(recipe.model, recipe.sampler, trains=True, beta=recipe.algorithm.beta, grpo=recipe)
        lines += _beside(recipe)
    elif isinstance(recipe, SftRecipe):
        lines += _model(recipe.model) + _sft_trained(recipe) + _data(recipe.datasets) + _sft(recipe)
        lines += _eval(recipe.eval) + _checkpoints(recipe.checkpoint)
        lines += _memory(recipe.model, recipe.sampler if recipe.eval else None, trains=True, beta=0.0)
        lines += _teacher_memory(
            recipe.model, recipe.teacher, "process", recipe.teacher.dtype if recipe.teacher else ""
        )
    elif isinstance(recipe, RewardModelRecipe):
        lines += [
            *_model(recipe.model),
            "trains      all parameters and a new head; the router's correction bias stays as it is",
        ]
        lines += _data(recipe.datasets) + _reward_model(recipe) + _checkpoints(recipe.checkpoint)
        lines += _memory(recipe.model, None, trains=True, beta=0.0)
    elif isinstance(recipe, DistillRecipe):
        teacher = recipe.teacher.model
        lines += [line.replace("policy ", "teacher", 1) for line in _model(teacher)] if teacher else []
        lines += _data(recipe.datasets) + distill_lines(recipe)
        if teacher:
            lines += [_sampler(recipe.sampler), *_memory(teacher, recipe.sampler, trains=False, beta=0.0)]
    elif isinstance(recipe, EvalRecipe):
        lines += _evaluation(recipe)
    elif isinstance(recipe, UpcycleRecipe):
        lines += [
            f"source      {recipe.source}",
            f"mixture     {recipe.num_experts} experts, {recipe.top_k} of them for a token",
        ]
    elif isinstance(recipe, PipelineRecipe):
        lines += _pipeline(recipe)
    return "\n".join(lines)


# --- lines that stages share ------------------------------------------------------------------------------------------


def _model(model: ModelSection) -> list[str]:
    count = model_parameters(model)
    if model.build is not None:
        origin = "new DeepSeek-V3 with random weights"
    else:
        kind = read_config(Path(str(model.model_name_or_path))).get("model_type")
        origin = f"{model.model_name_or_path}" + (f" ({kind})" if kind else "")
    size = f"{count:,} parameters" if count is not None else "size unknown until its files are here"
    lines = [f"policy      {origin}, {size}, {model.dtype}"]
    known = ARCHITECTURES.get(str(model.model_name_or_path))
    return lines if known is None else lines + _known(known)


def _known(known: Architecture) -> list[str]:
    """What the shipped shape of a hub model says; a plan does not look on the hub."""
    need = known.parameters * 16
    shares = ", ".join(f"{ranks}: {size(need / ranks)}" for ranks in (8, 64, 512))
    return [
        f"            by its shipped shape; {known.active_parameters:,} parameters active for a token, embeddings included",
        f"            KV cache {size(known.cache_bytes)} a token in bfloat16",
        f"            16 bytes a parameter for training = {size(need)}; by FSDP2 over ranks, each of {shares}",
    ]


def _sft_trained(recipe: SftRecipe) -> list[str]:
    lora, mtp = recipe.lora, recipe.mtp
    if lora is None:
        lines = _trained(recipe.router)
    else:
        targets = ", ".join(lora.targets) if lora.targets else "all weights but the router"
        lines = [f"trains      LoRA adapters of rank {lora.r} on {targets}; merged at the end"]
    if recipe.router.freeze:
        lines.append("            but not the router's weights")
    if mtp is not None:
        trunk = ", which does not reach the trunk" if mtp.detach_trunk else ""
        lines.append(f"            and a prediction module ({mtp.init}), loss weight {mtp.loss_weight:g}{trunk}")
    return lines


def _sft_loss(recipe: SftRecipe) -> list[str]:
    lines = [f"loss        on {_LOSS_ON[recipe.training.loss_on]}"]
    if recipe.teacher is not None:
        teacher = recipe.teacher
        kind = f"jsd (beta {teacher.mixture:g})" if teacher.divergence == "jsd" else teacher.divergence
        events = "all tokens" if teacher.top_k is None else f"its {teacher.top_k} likeliest tokens and the rest"
        lines += [
            f"            {1 - teacher.weight:g} x cross-entropy + {teacher.weight:g} x {kind} to the teacher "
            f"{teacher.model_name_or_path}",
            f"            over {events}, at temperature {teacher.temperature:g}",
        ]
    return lines


def _grpo_trained(recipe: GrpoRecipe) -> list[str]:
    if recipe.lora is None:
        return _trained(recipe.router)
    targets = ", ".join(recipe.lora.targets) if recipe.lora.targets else "all weights but the router"
    return [f"trains      LoRA adapters of rank {recipe.lora.r} on {targets}; merged for samplers and checkpoints"]


def _trained(router: RouterSection) -> list[str]:
    bias = (
        f"the router's correction bias moves by {router.bias_update_speed:g} a step"
        if router.bias_update_speed
        else "the router's correction bias stays as it is"
    )
    return [f"trains      all parameters; {bias}"]


def _data(datasets: Sequence[DatasetSection]) -> list[str]:
    return [f"data        {_source(section)}" for section in datasets]


def _source(section: DatasetSection) -> str:
    amount = f"{section.size:,} records" if section.size is not None else "all records"
    if section.task is None:
        return f"{section.path}, {amount}"
    return f"task {section.task}, level {', '.join(map(str, section.levels))}, {amount}"


def _sampler(section: SamplerSection) -> str:
    workers = "1 vLLM worker" if section.num_workers == 1 else f"{section.num_workers} vLLM workers"
    if section.tensor_parallel_size > 1:
        experts = ", whole experts on each" if section.enable_expert_parallel else ""
        workers += f" of {section.tensor_parallel_size} devices{experts}"
    return f"sampler     {workers}, up to {section.max_num_seqs} sequences each of up to {section.max_model_len} tokens"


def _eval(section: EvalSection | None, environment: EnvironmentSection | None = None) -> list[str]:
    if section is None:
        return ["evaluation  none; add an eval section to see what the training did"]
    lines = [f"evaluation  {_source(dataset)}" for dataset in section.datasets]
    greedy = " and one greedy" if section.greedy else ""
    each = f"{section.num_samples} sampled{greedy} per problem, up to {section.max_completion_length} tokens each"
    if all(dataset.size is not None for dataset in section.datasets):
        total = sum(dataset.size or 0 for dataset in section.datasets) * (section.num_samples + section.greedy)
        each += f": {total:,} completions each time"
    every = f", also every {section.eval_steps} steps" if section.eval_steps else ""
    played = environment or section.environment
    judge = f"success in {played.func}" if played else f"graded by {section.reward.func}"
    return [*lines, f"            {each}{every}", f"            {judge}"]


def _evaluation(recipe: EvalRecipe) -> list[str]:
    """What answers, on what, and the memory that a checkpoint takes."""
    lines = []
    if recipe.endpoint is not None:
        where = recipe.endpoint.base_url or "the default address"
        lines += [
            f"model       {recipe.endpoint.model} at {where}, {recipe.endpoint.max_concurrency} requests at a time"
        ]
    if recipe.model is not None:
        lines += [*_model(recipe.model), _sampler(recipe.sampler)]
    if recipe.eval.datasets:
        lines += _eval(recipe.eval)
    for section in recipe.eval.benchmarks:
        changes = ", ".join(f"{name} {value}" for name, value in recipe.eval.options(section).items())
        how = " by lm-eval" if section.method == "lm_eval" else ""
        lines.append(
            f"benchmark   {section.name}{how}, data {section.path or 'of its own'}{f': {changes}' * bool(changes)}"
        )
    if recipe.eval.judge is not None:
        lines.append(f"judge       {recipe.eval.judge.model} at {recipe.eval.judge.base_url or 'the default address'}")
    if recipe.model is not None:
        lines += _memory(recipe.model, recipe.sampler, trains=False, beta=0.0)
    return lines


def _checkpoints(section: CheckpointSection, first: str = "") -> list[str]:
    when = f"every {section.save_steps} steps and at the end" if section.save_steps else "at the end"
    return [f"saves       {first}{when}, or when interrupted; the newest {section.save_total_limit} are kept"]


def _groups(learner: LearnerSection) -> list[str]:
    """What ranks share beside the weights."""
    lines = []
    if (size := learner.expert_parallel_size) > 1:
        lines.append(f"            the experts of a layer over {size} of them, tokens sent there and back")
    if (size := learner.context_parallel_size) > 1:
        lines.append(f"            each row over {size} of them, heads of attention instead of tokens meanwhile")
    return lines


def _memory(
    model: ModelSection,
    sampler: SamplerSection | None,
    *,
    trains: bool,
    beta: float,
    grpo: GrpoRecipe | None = None,
) -> list[str]:
    """Bytes per process; activations and the runtime itself (1 to 2 GB a process) come on top."""
    adapters = grpo is not None and grpo.lora is not None
    shares = grpo.learner.num_workers if grpo is not None and grpo.learner.parallel == "fsdp" else 1
    count = model_parameters(model)
    if count is None:
        return ["memory      unknown until the checkpoint is here"]
    lines = []
    if trains:
        # float32 weights, gradients and AdamW's two moments, whatever the sampler's type: bfloat16 is autocast.
        own = count / shares
        one = size(own * 4)
        if adapters:
            lines.append(f"each learner {one}: weights; gradients and AdamW of the adapters only")
        else:
            lines.append(f"each learner {size(own * 16)}: weights {one}, gradients {one}, AdamW {size(own * 8)}")
        if shares > 1:
            lines.append(f"that is its share of {shares}, which it reads and writes by itself")
    if beta > 0 and not adapters:
        lines.append(f"its reference {size(count * 4 / shares)}: float32 weights")
    if sampler is not None:
        devices = sampler.tensor_parallel_size
        weights, cache = count * _BYTES[model.dtype] / devices, int(sampler.kv_cache_gib * 2**30)
        one = "each sampler" if devices == 1 else f"each of a sampler's {devices} devices"
        on_gpu = f"{sampler.gpu_memory_utilization:.0%} of the memory on a GPU"
        lines.append(f"{one} {size(weights + cache)}: weights {size(weights)}, KV cache {size(cache)}; {on_gpu}")
    lines.append("on top of it: activations, and 1 to 2 GB of runtime a process")
    return [f"memory      {lines[0]}", *(f"            {line}" for line in lines[1:])]


def _beside(recipe: GrpoRecipe) -> list[str]:
    """Memory of a critic and of a teacher."""
    lines = []
    section = (recipe.critic or CriticSection()) if recipe.algorithm.baseline == "critic" else None
    critic = section and recipe.model.model_copy(
        update={"model_name_or_path": section.model_name_or_path or recipe.model.model_name_or_path}
    )
    if critic and (count := model_parameters(critic)):
        lines.append(f"            each critic {size(count * 16)}: as a learner")
    return lines + _teacher_memory(recipe.model, recipe.teacher, "learner", "float32")


def _teacher_memory(
    model: ModelSection, section: TeacherSection | SftTeacherSection | None, place: str, dtype: str
) -> list[str]:
    if section is None:
        return []
    teacher = model.model_copy(update={"model_name_or_path": section.model_name_or_path, "build": None})
    count = model_parameters(teacher)
    if count is None:
        return []
    return [f"            its teacher {size(count * _BYTES[dtype])} in each {place}: {dtype} weights"]


# --- stages -----------------------------------------------------------------------------------------------------------


_LOSS_ON = {
    "assistant": "what the assistant says, in every turn",
    "last_assistant": "what the assistant says in its last turn",
    "completion": "what follows the last question",
    "all": "all tokens",
}


def _sft(recipe: SftRecipe) -> list[str]:
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    kind = "packed rows" if training.packing else "samples"
    return [
        f"batch       {training.per_device_train_batch_size} {kind} x {training.gradient_accumulation_steps} accumulated "
        f"= {rows} {kind} of up to {training.max_length} tokens per optimizer step and rank",
        f"            = up to {rows * training.max_length:,} tokens per optimizer step and rank",
        *_sft_loss(recipe),
        *_schedule(training, recipe.optimizer),
    ]


def _schedule(training: TrainerSection, optimizer: OptimizerSection) -> list[str]:
    """Of a stage on a TRL trainer."""
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    end = f" to {optimizer.min_learning_rate:g}" if optimizer.lr_scheduler_type == "cosine" else ""
    return [
        f"optimizer   {training.optim}, learning rate {optimizer.learning_rate:g}{end}, {optimizer.lr_scheduler_type}, "
        f"{optimizer.warmup_steps} warm-up steps",
        f"length      {length}",
    ]


def _reward_model(recipe: RewardModelRecipe) -> list[str]:
    training, validation = recipe.training, recipe.validation
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if validation.datasets is None:
        measured = [f"{validation.fraction:.0%} of the prompts"]
    else:
        measured = [_source(dataset) for dataset in validation.datasets]
    every = f"every {validation.eval_steps} steps and at the end" if validation.eval_steps else "at the end"
    return [
        f"batch       {size} pairs x {accumulated} accumulated = {size * accumulated} pairs, so {2 * size * accumulated} "
        f"chats of up to {training.max_length} tokens, per optimizer step and rank",
        f"loss        Bradley-Terry with margin, centring {training.center_rewards_coefficient:g}",
        *_schedule(training, recipe.optimizer),
        *(f"held out    {source}, measured {every}" for source in measured),
    ]


def microbatch_bound(recipe: GrpoRecipe) -> int:
    """Most microbatches of one minibatch on one rank, when every sample is as long as the sampler allows.

    Best-fit packing leaves at most one row with fewer than row_length // max_model_len samples, so no mix of shorter
    samples needs more rows.
    """
    learner = recipe.learner
    minibatch = recipe.samples_per_step // recipe.algorithm.num_minibatches
    rows = math.ceil(minibatch / (learner.row_length // recipe.sampler.max_model_len))
    rows_per_microbatch = learner.max_tokens_per_microbatch // learner.row_length
    return math.ceil(math.ceil(rows / rows_per_microbatch) * learner.context_parallel_size / learner.num_workers)


def _grpo(recipe: GrpoRecipe) -> list[str]:
    algorithm, learner, parity = recipe.algorithm, recipe.learner, recipe.parity
    samples = recipe.samples_per_step
    minibatch = samples // algorithm.num_minibatches
    steps = algorithm.num_minibatches * algorithm.num_iterations
    passes = "" if algorithm.num_iterations == 1 else f" x {algorithm.num_iterations} passes"
    played = recipe.environment
    names = [*([(played.weight, "environment")] if played else []), *((r.weight, r.label) for r in recipe.rewards)]
    rewards = ", ".join(f"{weight:g} x {label}" for weight, label in names)
    episodes = (
        [f"episodes    up to {played.max_turns} turns with {played.func}, a process for each episode"] if played else []
    )
    return [
        f"batch       {recipe.rollout.num_prompts} prompts x {recipe.rollout.num_generations} generations = {samples} "
        f"completions per step",
        f"            -> {algorithm.num_minibatches} minibatches of {minibatch} completions{passes} -> {steps} optimizer "
        f"steps per step",
        f"            -> at most {microbatch_bound(recipe)} microbatches of up to {learner.max_tokens_per_microbatch} "
        f"tokens on each of {learner.num_workers} learner rank(s) per minibatch",
        *_groups(learner),
        f"length      {recipe.max_steps} steps, {recipe.max_steps * samples:,} completions, "
        f"{recipe.max_steps * steps:,} optimizer steps",
        *episodes,
        f"reward      {rewards}",
        f"loss        clip {algorithm.epsilon:g} / {algorithm.clip_high:g}, KL {algorithm.beta:g} ({algorithm.kl_estimator}), "
        f"mean per {algorithm.loss_aggregation}",
        f"optimizer   AdamW, learning rate {recipe.optimizer.learning_rate:g}, {recipe.optimizer.lr_scheduler_type}",
        _sampler(recipe.sampler),
        f"parity      stops when sampler and learner differ by more than {parity.max_logprob_gap:g} nats, or choose the "
        f"same experts for less than {parity.min_routing_agreement:.2%}",
    ]


def _pipeline(recipe: PipelineRecipe) -> list[str]:
    """Every stage's own plan below its name, file and overrides."""
    lines = []
    for number, section in enumerate(recipe.stages, start=1):
        lines += ["", f"{number}. {section.name}: {section.recipe} {' '.join(section.overrides)}".rstrip()]
        lines += [f"   {line}" for line in describe(stage_recipe(section, recipe.run_dir)).splitlines()]
    return lines
