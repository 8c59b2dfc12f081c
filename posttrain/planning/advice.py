"""What will not fit or will not pay, and the key that mends it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.planning.hardware import Hardware
from posttrain.planning.learner import Training, sum_bytes
from posttrain.planning.quantities import Quantity, duration, size
from posttrain.planning.sampler import Engine
from posttrain.planning.steps import Batch, StepTimes
from posttrain.recipe import GrpoRecipe

_FULL = 0.95  # of the memory: beyond it an allocator's gaps do not fit


def learner_advice(training: Training, parts: Sequence[Quantity], hardware: Hardware, stage: str) -> list[str]:
    """About the memory of a rank, and of the node that it is on."""
    found = []
    memory, needed = hardware.memory_gb * 1e9, sum_bytes(parts)
    if needed > _FULL * memory:
        largest = max(parts, key=lambda part: part.value)
        found.append(
            f"each learner rank needs {size(needed)} of {size(memory)}; the largest part is {largest.name} "
            f"({size(largest.value)}): {_cure(largest.name, training, stage)}"
        )
        gathered = sum(part.value for part in parts if part.name.startswith("gathered") or "cast" in part.name)
        if largest.name != "gathered layers" and gathered > 0.5 * memory:
            found.append(f"gathered weights alone take {size(gathered)}: {_cure('gathered layers', training, stage)}")
    copies = min(training.ranks, hardware.gpus_per_node)
    loaded = 4.0 * training.shape.parameters * copies
    in_parts = stage == "grpo" and training.sharded  # each rank reads its own
    if loaded > hardware.host_memory_gb * 1e9 and not in_parts:
        found.append(
            f"each rank loads the whole model in float32 into main memory first: {copies} ranks of a node take {size(loaded)} "
            f"of its {size(hardware.host_memory_gb * 1e9)}; "
            + (
                "set learner.parallel: fsdp with learner.num_workers: 2 or more, where each reads its own part"
                if stage == "grpo"
                else "start fewer ranks on a node, which helps until one copy is too large"
            )
        )
    if training.width > 16384 and training.context_parallel == 1:
        found.append(
            f"rows of {training.width:,} tokens need a mask of {size(training.width**2 * 3)} and attention over all of it; "
            + (
                "lower learner.row_length to what most samples need, or divide rows over ranks (learner.context_parallel_size)"
                if stage == "grpo"
                else "lower training.max_length to what most samples need"
            )
        )
    return found


def _cure(part: str, training: Training, stage: str) -> str:
    """The key for the largest part of a rank's memory."""
    trainer = stage != "grpo"
    if part in ("weights", "gradients", "optimizer"):
        if trainer:
            return "spread it over more ranks (accelerate launch with FSDP), take training.optim: adafactor, or lora"
        spread = (
            "raise learner.num_workers"
            if training.sharded
            else "set learner.parallel: fsdp with learner.num_workers: 2 or more"
        )
        return f"{spread}, learner.offload_optimizer: true, or lora"
    if part == "reference, teacher":
        return "set algorithm.beta: 0, lora (its reference costs nothing), or learner.offload_reference: true with ddp"
    if part in ("activations", "gradients in passing", "attention mask"):
        if not training.checkpointing:
            return f"set {'training' if trainer else 'learner'}.gradient_checkpointing: true"
        if trainer:
            return "lower training.per_device_train_batch_size or training.max_length"
        return (
            "lower learner.max_tokens_per_microbatch (at least row_length), then learner.row_length, or raise "
            "learner.context_parallel_size"
        )
    if part == "logits":
        return "lower learner.logits_chunk"
    if part == "weights cast to bfloat16":
        return f"set {'training' if trainer else 'learner'}.gradient_checkpointing: true, which keeps one layer's"
    if part == "gathered layers":
        fitting = math.gcd(training.ranks, training.shape.num_experts)
        if not trainer and training.expert_parallel < fitting:
            return f"set learner.expert_parallel_size (up to {fitting}), so that no rank gathers all experts of a layer"
        return (
            "FSDP2 gathers whole layers on every rank, here with all of their experts: take GPUs with more memory "
            "(--hardware h200), or a smaller policy"
            if training.expert_parallel == 1
            else "take GPUs with more memory (--hardware h200), or a smaller policy"
        )
    if part == "tokens on their way":
        return "lower learner.max_tokens_per_microbatch (at least row_length)"
    return "take GPUs with more memory"


def engine_advice(recipe: GrpoRecipe, engine: Engine, mean_tokens: float) -> list[str]:
    """About the memory of a sampler."""
    found = []
    devices, per_node = recipe.sampler.tensor_parallel_size, engine.hardware.gpus_per_node
    if engine.gpus > devices:
        found.append(
            f"a sampler of this recipe is {devices} GPU(s), and the weights need {engine.gpus}: planned as "
            f"{max(1, recipe.sampler.devices // engine.gpus)} engines of {engine.gpus} GPUs; "
            + (
                f"set sampler.tensor_parallel_size: {engine.gpus} and lower sampler.num_workers"
                if engine.gpus <= per_node
                else f"a sampler is on one node, which has {per_node}: take GPUs with more memory (--hardware h200), or a "
                f"smaller policy"
            )
        )
    if engine.cache_bytes <= 0:
        found.append(
            f"the weights ({size(engine.weights_bytes)} a GPU) leave no room for a cache in "
            f"{recipe.sampler.gpu_memory_utilization:.0%} of the memory; raise sampler.gpu_memory_utilization or "
            f"--gpus-per-sampler"
        )
    elif engine.sequences(engine.max_model_len) < 1:
        found.append(
            f"the cache does not hold one sequence of sampler.max_model_len={engine.max_model_len}; lower it, or raise "
            f"sampler.gpu_memory_utilization"
        )
    elif engine.sequences(mean_tokens) < engine.max_num_seqs:
        found.append(
            f"the cache holds {engine.sequences(mean_tokens)} sequences of the mean length, fewer than sampler.max_num_seqs="
            f"{engine.max_num_seqs}: vLLM pre-empts and computes again; raise sampler.gpu_memory_utilization, or lower "
            f"max_num_seqs"
        )
    return found


def step_advice(recipe: GrpoRecipe, training: Training, batch: Batch, times: StepTimes) -> list[str]:
    """About where the time of a step goes."""
    found = []
    lag = recipe.rollout.max_lag
    step = times.step(overlap=lag > 0, in_flight=recipe.rollout.in_flight_updates)
    per_round = training.ranks * training.rows // training.context_parallel
    if batch.rows_of_minibatch < 0.75 * per_round:
        found.append(
            f"a minibatch makes about {batch.rows_of_minibatch:,.0f} full rows for {per_round:,} places on {training.ranks} "
            f"ranks, so the others wait: lower learner.num_workers, algorithm.num_minibatches or learner.row_length"
        )
    if times.talking > times.computing:
        found.append(
            f"the ranks exchange weights and gradients for {duration(times.talking)} a step and compute for "
            f"{duration(times.computing)}: raise learner.max_tokens_per_microbatch (each microbatch gathers everything), or "
            f"take fewer ranks"
        )
    if times.publication > 0.2 * step:
        found.append(
            f"publication is {times.publication / step:.0%} of a step ({duration(times.publication)}): raise "
            f"rollout.num_prompts, or set rollout.max_lag: 1 with rollout.in_flight_updates: true so that samplers "
            f"go on meanwhile"
        )
    if not lag:
        faster = times.step(overlap=True, in_flight=False)
        if faster < 0.8 * step:
            found.append(
                f"generation and learning take turns: rollout.max_lag: 1 (with algorithm.importance: truncate) would make a "
                f"step {duration(faster)} instead of {duration(step)}"
            )
    longer, shorter = max(times.generation, times.learning), min(times.generation, times.learning)
    if lag and shorter < 0.6 * longer:
        slow, fast = ("sampler", "learner") if times.generation > times.learning else ("learner", "sampler")
        found.append(
            f"{fast}s wait for {slow}s ({duration(shorter)} against {duration(longer)}): move GPUs from {fast}.num_workers to "
            f"{slow}.num_workers; --simulate compares splits"
        )
    if times.generation == float("inf"):
        found.append("no sequence fits into the cache, so nothing is generated; see the samplers' memory")
    return found
