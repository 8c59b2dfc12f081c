"""The plan of a stage: sections of quantities, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.planning import advice
from posttrain.planning.hardware import Hardware
from posttrain.planning.kernels import step_seconds
from posttrain.planning.learner import Training, communication, memory, training_flops
from posttrain.planning.quantities import Quantity, count, duration, size, total
from posttrain.planning.sampler import engine_memory
from posttrain.planning.stages import Assumptions, engine_of, lengths_of, training_of
from posttrain.planning.steps import StepTimes, batch_of, step_times
from posttrain.planning.work import flops_per_token
from posttrain.recipe import GrpoRecipe, Recipe, RewardModelRecipe, SftRecipe


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stage will need.

    Attributes:
        head: what it is about, a line each.
        sections: title -> lines.
        warnings: what will not fit or pay, each with its cure.
    """

    head: tuple[str, ...]
    sections: dict[str, tuple[Quantity, ...]]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """For people: every number with formula and source on its line."""
        lines = list(self.head)
        for title, quantities in self.sections.items():
            lines += ["", title, *(quantity.line() for quantity in quantities)]
        lines += ["", "Warnings" if self.warnings else "Warnings: none"]
        return "\n".join([*lines, *(f"  ! {warning}" for warning in self.warnings)])

    def value(self, section: str, name: str) -> float:
        """A number of the plan; `section` is how its title begins.

        Raises:
            KeyError: there is none of that name.
        """
        for title, quantities in self.sections.items():
            for quantity in quantities:
                if title.startswith(section) and quantity.name == name:
                    return quantity.value
        raise KeyError(f"{section}: {name}")


def make_plan(recipe: Recipe, assumed: Assumptions) -> Plan:
    """The plan of a stage that trains.

    Raises:
        RecipeError: another stage, or a model whose shape is not known.
    """
    if isinstance(recipe, GrpoRecipe):
        return _grpo(recipe, assumed)
    training = training_of(recipe, assumed)
    assert isinstance(recipe, SftRecipe | RewardModelRecipe)
    return _trainer(recipe, training, assumed)


def _head(recipe: Recipe, training: Training, hardware: Hardware, name: str) -> list[str]:
    shape = training.shape
    return [
        f"plan        {recipe.stage} of {name}: {count(shape.parameters)} parameters, {count(shape.active_parameters)} of "
        f"them for a token (posttrain/architectures.py, or its config.json)",
        f"hardware    {hardware.name}, {hardware.gpus_per_node} on a node",
    ]


def _name(recipe: GrpoRecipe | SftRecipe | RewardModelRecipe) -> str:
    return recipe.model.model_name_or_path or "a new policy"


# --- GRPO -------------------------------------------------------------------------------------------------------------


def _grpo(recipe: GrpoRecipe, assumed: Assumptions) -> Plan:
    training, engine, lengths = training_of(recipe, assumed), engine_of(recipe, assumed), lengths_of(recipe, assumed)
    hardware, mean = assumed.hardware, assumed.prompt_tokens + lengths.mean
    ranks = memory(training, hardware)
    engines = engine_memory(engine, mean)
    times = step_times(recipe, assumed)
    batch = batch_of(recipe, training, lengths, assumed.prompt_tokens)
    head = [
        *_head(recipe, training, hardware, _name(recipe)),
        f"assumed     completions {lengths.text()}; prompts of {assumed.prompt_tokens} tokens; every group has signal; "
        f"rewards, evaluations and checkpoints are not counted",
    ]
    sections = {
        f"Memory of each of {training.ranks} learner rank(s)": (*ranks, *_fill(ranks, hardware)),
        f"Memory of each GPU of a sampler of {engine.gpus} GPU(s)": tuple(engines),
        "Operations of a step": times.flops,
        "Time of a step": (*times.parts, _step(recipe, times)),
        "The run": _run(recipe, times, assumed),
    }
    warnings = [
        *advice.learner_advice(training, ranks, hardware, recipe.stage),
        *advice.engine_advice(recipe, engine, mean),
        *advice.step_advice(recipe, training, batch, times),
    ]
    if recipe.algorithm.baseline == "critic":
        warnings.append("the critic's ranks are as many again as the learner's and are not in this plan")
    return Plan(tuple(head), sections, tuple(warnings))


def _fill(parts: Sequence[Quantity], hardware: Hardware) -> tuple[Quantity, Quantity]:
    available = hardware.memory_gb * 1e9
    everything = total("in all", parts)
    share = Quantity(
        "of what there is", everything.value / available, "share", f"{size(everything.value)} / {size(available)}",
        hardware.source("memory_gb"),
    )  # fmt: skip
    return everything, share


def _step(recipe: GrpoRecipe, times: StepTimes) -> Quantity:
    lag, in_flight = recipe.rollout.max_lag, recipe.rollout.in_flight_updates
    if not lag:
        formula = "generation + learning + publication, in turns"
    elif in_flight:
        formula = "the longer of generation and learning + publication"
    else:
        formula = "the longer of generation and learning, + publication"
    return Quantity(
        "step", times.step(overlap=lag > 0, in_flight=in_flight), "seconds",
        f"{formula} ({duration(times.generation)}, {duration(times.learning)}, {duration(times.publication)})",
        f"rollout.max_lag: {lag}",
    )  # fmt: skip


def gpu_count(recipe: GrpoRecipe) -> int:
    """GPUs that a run reserves."""
    each = 1 if recipe.learner.num_gpus is None else recipe.learner.num_gpus
    trained = 2 if recipe.algorithm.baseline == "critic" else 1
    return trained * recipe.learner.num_workers * each + recipe.sampler.devices


def _run(recipe: GrpoRecipe, times: StepTimes, assumed: Assumptions) -> tuple[Quantity, ...]:
    step = _step(recipe, times).value
    gpus, sampler = gpu_count(recipe), recipe.sampler
    of_several = f" of {sampler.tensor_parallel_size} GPUs" if sampler.tensor_parallel_size > 1 else ""
    found = [
        Quantity(
            "GPUs", gpus, "count", 
            f"{recipe.learner.num_workers} learner ranks + {sampler.num_workers} samplers{of_several}",
            "learner.num_workers, sampler.num_workers, sampler.tensor_parallel_size",
        )
    ]  # fmt: skip
    tokens = recipe.samples_per_step * lengths_of(recipe, assumed).mean
    found.append(
        Quantity(
            "generated tokens a second",
            tokens / step,
            "tokens",
            f"{count(tokens)} tokens / {duration(step)}",
            "the step above",
        )
    )
    return (*found, *_cost(recipe.max_steps, step, gpus, assumed.price))


def _cost(steps: int | None, seconds: float, gpus: int, price: float | None) -> list[Quantity]:
    """Hours and money of a run; nothing where its length is not known."""
    if steps is None:
        return []
    whole = steps * seconds
    found = [
        Quantity("hours", whole, "seconds", f"{steps:,} steps x {duration(seconds)}", "max_steps"),
        Quantity("GPU hours", whole / 3600 * gpus, "count", f"{duration(whole)} x {gpus:,} GPUs", "the lines above"),
    ]
    if price is not None:
        cost = whole / 3600 * gpus * price
        found.append(Quantity("cost", cost, "money", f"GPU hours x {price:g}", "--price, per GPU hour"))
    return found


# --- stages on a TRL trainer ------------------------------------------------------------------------------------------


def _trainer(recipe: SftRecipe | RewardModelRecipe, training: Training, assumed: Assumptions) -> Plan:
    hardware = assumed.hardware
    parts = memory(training, hardware)
    accumulated = recipe.training.gradient_accumulation_steps
    tokens = accumulated * training.tokens * training.ranks
    if hardware.calibration is not None:
        seconds = step_seconds(training, hardware.calibration, scored=0, trained=accumulated, models=0, updates=1)
        computing = Quantity(
            "computing", seconds, "seconds", f"{accumulated} microbatches and an optimizer step: a sum over kernels",
            "rates measured by benchmarks/plan.py; posttrain/planning/kernels.py",
        )  # fmt: skip
    else:
        rate = hardware.flops(training.dtype) * hardware.training_efficiency
        computing = Quantity(
            "computing", training_flops(training, accumulated) / rate, "seconds",
            f"{accumulated} x {training.tokens:,} tokens x 3 x {flops_per_token(training.shape, training.width, 1.0):.3g} / "
            f"({hardware.tflops[training.dtype]:g} TFLOPS x {hardware.training_efficiency:g})",
            f"{training.dtype}; {hardware.source('tflops', 'training_efficiency')}",
        )  # fmt: skip
    sent, counted = communication(training, accumulated, 1)
    link = hardware.link(training.ranks)
    exchange = Quantity(
        "exchange between ranks", sent / link, "seconds", f"({counted}) / {link / 1e9:g} GB/s",
        hardware.link_source(training.ranks),
    )  # fmt: skip
    step = Quantity(
        "step", max(computing.value, exchange.value), "seconds",
        f"the longer of the two; {count(tokens)} tokens of all ranks, padding included", "they overlap",
    )  # fmt: skip
    steps = assumed.steps or recipe.training.max_steps
    ranks = "--ranks" if assumed.ranks else "chosen so that weights, gradients and optimizer take half of the memory"
    head = [
        *_head(recipe, training, hardware, _name(recipe)),
        f"assumed     {training.ranks} rank(s) ({ranks}), {'FSDP' if training.sharded else 'DDP'}; full rows",
    ]
    if steps is None:
        head.append(
            f"            hours unknown: the recipe counts epochs and the data are not looked at; give --steps (tokens / "
            f"{tokens:,.0f})"
        )
    gpus = Quantity("GPUs", training.ranks, "count", f"{training.ranks} ranks", ranks)
    sections = {
        f"Memory of each of {training.ranks} rank(s)": (*parts, *_fill(parts, hardware)),
        "Time of a step": (computing, exchange, step),
        "The run": (gpus, *_cost(steps, step.value, training.ranks, assumed.price)),
    }
    warnings = advice.learner_advice(training, parts, hardware, recipe.stage)
    if exchange.value > computing.value:
        warnings.append(
            f"the ranks exchange for {duration(exchange.value)} a step and compute for {duration(computing.value)}: raise "
            f"training.per_device_train_batch_size or gradient_accumulation_steps, or take fewer ranks"
        )
    return Plan(tuple(head), sections, tuple(warnings))
