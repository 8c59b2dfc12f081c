"""`--dry-run`: what a recipe would do, in words and numbers. Imports no torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from posttrain.recipe import (
    BuildSection,
    DatasetSection,
    EvalRecipe,
    GrpoRecipe,
    ModelSection,
    PipelineRecipe,
    Recipe,
    SamplerSection,
    SftRecipe,
)

TINY_VOCABULARY = 107  # tokens of data.chat.build_tokenizer, which a built policy uses
_BYTES = {"float32": 4, "bfloat16": 2}


def describe(recipe: Recipe) -> str:
    """The plan as text, one fact a line."""
    lines = [f"stage       {recipe.stage}", f"writes to   {recipe.run_dir}", f"seed        {recipe.seed}"]
    if isinstance(recipe, GrpoRecipe):
        lines += _model(recipe.model) + _data(recipe.datasets) + _grpo(recipe)
    elif isinstance(recipe, SftRecipe):
        lines += _model(recipe.model) + _data(recipe.datasets) + _sft(recipe)
    elif isinstance(recipe, EvalRecipe):
        lines += _model(recipe.model) + _data(recipe.eval.datasets)
        lines += [f"completions {recipe.eval.num_samples} sampled per problem" + " and one greedy" * recipe.eval.greedy]
    elif isinstance(recipe, PipelineRecipe):
        lines += [
            f"{number}. {stage.name}: {stage.recipe} {' '.join(stage.overrides)}".rstrip()
            for number, stage in enumerate(recipe.stages, start=1)
        ]
    return "\n".join(lines)


def parameter_count(build: BuildSection, vocabulary: int) -> int:
    """Parameters of a DeepSeek-V3 of that shape: embeddings and head, MLA, dense and expert MLPs, norms, router.

    The router's correction bias is a buffer and not counted.
    """
    hidden, heads = build.hidden_size, build.num_attention_heads
    query_dim = heads * (build.qk_nope_head_dim + build.qk_rope_head_dim)
    if build.q_lora_rank is None:
        query = hidden * query_dim
    else:
        query = hidden * build.q_lora_rank + build.q_lora_rank + build.q_lora_rank * query_dim
    latent = hidden * (build.kv_lora_rank + build.qk_rope_head_dim) + build.kv_lora_rank
    key_value = build.kv_lora_rank * heads * (build.qk_nope_head_dim + build.v_head_dim)
    attention = query + latent + key_value + heads * build.v_head_dim * hidden
    dense = 3 * hidden * build.intermediate_size
    experts = build.n_routed_experts + build.n_shared_experts
    sparse = 3 * hidden * build.moe_intermediate_size * experts + build.n_routed_experts * hidden
    num_dense = build.first_k_dense_replace
    layers = build.num_hidden_layers * (attention + 2 * hidden) + num_dense * dense
    layers += (build.num_hidden_layers - num_dense) * sparse
    return layers + 2 * vocabulary * hidden + hidden


def checkpoint_parameters(path: Path) -> int | None:
    """Parameters of a local checkpoint, from its safetensors headers; None where there are none."""
    files = sorted(path.expanduser().glob("*.safetensors")) if path.expanduser().is_dir() else []
    total = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and not name.endswith("e_score_correction_bias"):
                size = 1
                for extent in entry["shape"]:
                    size *= extent
                total += size
    return total if files else None


def _parameters(model: ModelSection) -> int | None:
    if model.build is not None:
        return parameter_count(model.build, TINY_VOCABULARY)
    assert model.model_name_or_path is not None
    return checkpoint_parameters(Path(model.model_name_or_path))


def _model(model: ModelSection) -> list[str]:
    count = _parameters(model)
    origin = "new DeepSeek-V3 with random weights" if model.build is not None else model.model_name_or_path
    size = f"{count:,} parameters" if count is not None else "size unknown until it is downloaded"
    return [f"policy      {origin}, {size}, {model.dtype}"]


def _data(datasets: tuple[DatasetSection, ...]) -> list[str]:
    lines = []
    for section in datasets:
        amount = f"{section.size:,} records" if section.size is not None else "all records"
        if section.task is not None:
            levels = ", ".join(map(str, section.levels))
            lines.append(f"data        task {section.task}, level {levels}, {amount}")
        else:
            lines.append(f"data        {section.path}, {amount}")
    return lines


def _sampler(section: SamplerSection) -> str:
    workers = "1 vLLM worker" if section.num_workers == 1 else f"{section.num_workers} vLLM workers"
    return f"sampler     {workers}, up to {section.max_num_seqs} sequences each of up to {section.max_model_len} tokens"


def _sft(recipe: SftRecipe) -> list[str]:
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    kind = "packed rows" if training.packing else "samples"
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    return [
        f"batch       {training.per_device_train_batch_size} {kind} x {training.gradient_accumulation_steps} accumulated "
        f"= {rows} {kind} of up to {training.max_length} tokens per optimizer step and rank",
        f"length      {length}",
        *_memory(recipe.model, None, reference=False),
    ]


def _grpo(recipe: GrpoRecipe) -> list[str]:
    algorithm, learner = recipe.algorithm, recipe.learner
    samples = recipe.samples_per_step
    minibatch = samples // algorithm.num_minibatches
    steps = algorithm.num_minibatches * algorithm.num_iterations
    tokens = minibatch * recipe.sampler.max_model_len
    microbatches = max(1, -(-tokens // (learner.max_tokens_per_microbatch * learner.num_workers)))
    passes = "" if algorithm.num_iterations == 1 else f" x {algorithm.num_iterations} passes"
    rewards = ", ".join(f"{section.weight:g} x {section.label}" for section in recipe.rewards)
    return [
        f"batch       {recipe.rollout.num_prompts} prompts x {recipe.rollout.num_generations} generations = {samples} "
        f"completions per step",
        f"            -> {algorithm.num_minibatches} minibatches of {minibatch} completions{passes} -> {steps} optimizer "
        f"steps per step",
        f"            -> at most {microbatches} microbatches of up to {learner.max_tokens_per_microbatch} tokens on each of "
        f"{learner.num_workers} learner rank(s) per minibatch",
        f"length      {recipe.max_steps} steps, {recipe.max_steps * samples:,} completions, "
        f"{recipe.max_steps * steps:,} optimizer steps",
        f"reward      {rewards}",
        f"loss        clip {algorithm.epsilon:g} / {algorithm.clip_high:g}, KL {algorithm.beta:g} ({algorithm.kl_estimator}), "
        f"mean per {algorithm.loss_aggregation}",
        _sampler(recipe.sampler),
        f"parity      stops when sampler and learner differ by more than {recipe.parity.max_logprob_gap:g} nats",
        *_memory(recipe.model, recipe.sampler, reference=recipe.algorithm.beta > 0),
    ]


def _memory(model: ModelSection, sampler: SamplerSection | None, *, reference: bool) -> list[str]:
    """Weights and optimizer per role; activations and the runtime itself (1 to 2 GB a process) come on top."""
    count = _parameters(model)
    if count is None:
        return ["memory      unknown until the checkpoint is here"]
    # float32 weights, gradients and AdamW's two moments, whatever the sampler's type.
    lines = [f"memory      learner {_size(count * 16)} (weights, gradients, AdamW)"]
    if reference:
        lines.append(f"            reference {_size(count * 4)}")
    if sampler is not None:
        weights, cache = count * _BYTES[model.dtype], int(sampler.kv_cache_gib * 2**30)
        lines.append(f"            each sampler {_size(weights)} weights + {_size(cache)} KV cache (on CPU)")
    return lines


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
