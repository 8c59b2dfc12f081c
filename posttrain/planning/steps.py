"""Time of a GRPO step and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.planning.hardware import Hardware
from posttrain.planning.kernels import step_seconds, update_seconds
from posttrain.planning.learner import Training, communication, scoring_flops, training_flops
from posttrain.planning.lengths import Lengths
from posttrain.planning.publication import publication
from posttrain.planning.quantities import Quantity, count, duration, size
from posttrain.planning.sampler import Engine, generation_seconds
from posttrain.planning.stages import Assumptions, engine_of, lengths_of, training_of
from posttrain.planning.work import flops_per_token
from posttrain.recipe import GrpoRecipe

_UPDATE_BYTES = (
    28  # of a parameter in an optimizer step: weight, gradient, two moments read; weight and moments written
)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step samples and trains on.

    Attributes:
        samples: completions.
        tokens: of all of them, prompts included.
        scored: microbatches of each rank that are scored before training.
        trained: microbatches of each rank that are trained on, over all passes and minibatches.
        updates: optimizer steps.
        passes: over the batch.
        rows_of_minibatch: full rows that a minibatch makes.
    """

    samples: int
    tokens: float
    scored: int
    trained: int
    updates: int
    passes: int
    rows_of_minibatch: float


def batch_of(recipe: GrpoRecipe, training: Training, lengths: Lengths, prompt_tokens: int) -> Batch:
    """The arithmetic of a step; every group is taken to have signal."""
    algorithm = recipe.algorithm
    samples = recipe.samples_per_step
    tokens = samples * (prompt_tokens + lengths.mean)
    passes = algorithm.num_minibatches * algorithm.num_iterations
    per_microbatch = training.ranks * training.tokens
    scored = math.ceil(tokens / per_microbatch) if recipe.parity.measured_on == "batch" else 0
    return Batch(
        samples=samples,
        tokens=tokens,
        scored=scored,
        trained=passes * math.ceil(tokens / algorithm.num_minibatches / per_microbatch),
        updates=passes,
        passes=algorithm.num_iterations,
        rows_of_minibatch=tokens / algorithm.num_minibatches / training.width,
    )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of one step.

    Attributes:
        flops: lines of operations.
        parts: lines of seconds.
        generation, learning, publication: seconds; the first two may overlap.
        computing, talking: seconds of the learner's arithmetic and of its exchange between ranks, which overlap.
    """

    flops: tuple[Quantity, ...]
    parts: tuple[Quantity, ...]
    generation: float
    learning: float
    publication: float
    computing: float
    talking: float

    def step(self, *, overlap: bool, in_flight: bool) -> float:
        """Seconds of a step."""
        if not overlap:
            return self.generation + self.learning + self.publication
        if in_flight:
            return max(self.generation, self.learning + self.publication)
        return max(self.generation, self.learning) + self.publication


def step_times(recipe: GrpoRecipe, assumed: Assumptions) -> StepTimes:
    """The step that a recipe describes, on that hardware."""
    training, engine, lengths = training_of(recipe, assumed), engine_of(recipe, assumed), lengths_of(recipe, assumed)
    batch = batch_of(recipe, training, lengths, assumed.prompt_tokens)
    learning, computing, talking = _learning(training, batch, assumed.hardware)
    engines = max(1, recipe.sampler.devices // engine.gpus)
    generating = _generation(engine, engines, batch, lengths, assumed.prompt_tokens)
    publishing = publication(training, recipe.model.dtype, assumed.hardware)
    return StepTimes(
        flops=_flops(training, batch, engine, lengths, assumed.prompt_tokens),
        parts=(generating, *learning, *publishing),
        generation=generating.value,
        learning=max(computing, talking) + sum(part.value for part in learning if part.name == "optimizer step"),
        publication=sum(part.value for part in publishing),
        computing=computing,
        talking=talking,
    )


def _flops(
    training: Training, batch: Batch, engine: Engine, lengths: Lengths, prompt_tokens: int
) -> tuple[Quantity, ...]:
    shape, models = training.shape, 1 + training.frozen
    per_token = flops_per_token(shape, training.width, training.trained_share)
    sampled = flops_per_token(shape, round(prompt_tokens + lengths.mean / 2), 1.0)
    return (
        Quantity(
            "forward, a token", per_token, "flop",
            f"2 x weights met + 2 x {shape.num_hidden_layers} layers x {shape.num_attention_heads} heads x (key + value) x "
            f"{training.width:,} keys + {training.trained_share:.0%} head",
            "posttrain/planning/work.py",
        ),
        Quantity(
            "generation", batch.samples * lengths.mean * sampled, "flop",
            f"{batch.samples:,} x {lengths.mean:,.0f} tokens x {sampled:.3g}", "posttrain/planning/work.py",
        ),
        Quantity(
            "scoring", models * batch.tokens * per_token if batch.scored else 0.0, "flop",
            f"{models} model(s) x {count(batch.tokens)} tokens x {per_token:.3g}", "policy, reference, teacher",
        ),
        Quantity(
            "training", 3 * batch.passes * batch.tokens * per_token, "flop",
            f"3 x {batch.passes} pass(es) x {count(batch.tokens)} tokens x {per_token:.3g}",
            "forward and twice as much backward; what checkpointing repeats is not counted",
        ),
    )  # fmt: skip


def _generation(engine: Engine, engines: int, batch: Batch, lengths: Lengths, prompt_tokens: int) -> Quantity:
    each = math.ceil(batch.samples / engines)
    seconds = generation_seconds(engine, lengths.typical(each), prompt_tokens)
    slots = engine.sequences(prompt_tokens + lengths.mean)
    batch_size = max(1, min(slots, each))
    hardware = engine.hardware
    one = engine.step_seconds(batch_size, prompt_tokens + lengths.mean / 2)
    return Quantity(
        "generation", seconds, "seconds",
        f"{each:,} completions on each of {engines} engine(s) of {engine.gpus} GPU(s), {batch_size} at a time; a full step "
        f"{duration(one)}: ({size(engine.weights_read(batch_size))} of weights + cache) / ({hardware.memory_gbps:g} GB/s x "
        f"{hardware.decode_efficiency:g}) + {engine.shape.num_hidden_layers} x {hardware.layer_overhead_us:g} us",
        f"lengths {lengths.text()}; {hardware.source('memory_gbps', 'decode_efficiency', 'layer_overhead_us')}",
    )  # fmt: skip


def _learning(training: Training, batch: Batch, hardware: Hardware) -> tuple[list[Quantity], float, float]:
    """Lines of the learner; seconds of arithmetic and of exchange."""
    models = 1 + training.frozen
    if hardware.calibration is not None:
        rates = hardware.calibration
        seconds = step_seconds(
            training, rates, scored=batch.scored, trained=batch.trained, models=models, updates=batch.updates
        )
        one = Quantity(
            "learning", seconds, "seconds",
            f"{batch.scored} microbatches scored by {models} model(s), {batch.trained} trained, {batch.updates} optimizer "
            f"steps, each {duration(update_seconds(training, rates))}: a sum over kernels",
            "rates measured by benchmarks/plan.py; posttrain/planning/kernels.py",
        )  # fmt: skip
        return [one], seconds, 0.0
    peak = hardware.flops(training.dtype) * hardware.training_efficiency
    scoring = scoring_flops(training, batch.scored, models) / peak
    learning = training_flops(training, batch.trained) / peak
    sent, counted = communication(training, batch.trained, batch.updates)
    if training.sharded:
        sent += 4 * training.shape.parameters * models * batch.scored
    link = hardware.link(training.ranks)
    update = training.trained_parameters * _UPDATE_BYTES / training.share / (hardware.memory_gbps * 1e9) * batch.updates
    if training.offload_optimizer:
        moved = 2 * 8 * training.trained_parameters / training.share
        update += moved / (hardware.host_link_gbps * 1e9) * batch.updates
    rate = f"({hardware.tflops[training.dtype]:g} TFLOPS x {hardware.training_efficiency:g})"
    source = f"{training.dtype}; {hardware.source('tflops', 'training_efficiency')}"
    return [
        Quantity(
            "scoring", scoring, "seconds",
            f"{batch.scored} microbatches x {models} model(s) x {training.tokens:,} tokens forward / {rate}", source,
        ),
        Quantity(
            "training", learning, "seconds",
            f"{batch.trained} microbatches x {training.tokens:,} tokens x 3 forward / {rate}", source,
        ),
        Quantity(
            "exchange between ranks", sent / link, "seconds",
            f"({counted}{' + gathers of scoring' if training.sharded and batch.scored else ''}) / {link / 1e9:g} GB/s; beside "
            f"the arithmetic, the longer counts",
            hardware.link_source(training.ranks),
        ),
        Quantity(
            "optimizer step", update, "seconds",
            f"{batch.updates} x {count(training.trained_parameters)} trained x {_UPDATE_BYTES} / {training.share} ranks / "
            f"{hardware.memory_gbps:g} GB/s" + (" + moments over the host link" if training.offload_optimizer else ""),
            hardware.source("memory_gbps"),
        ),
    ], scoring + learning, sent / link  # fmt: skip
