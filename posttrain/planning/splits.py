"""`--simulate`: the same GPUs divided between samplers and learner in several ways, with several lags."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.planning.plans import gpu_count
from posttrain.planning.quantities import duration
from posttrain.planning.sampler import Engine, generation_seconds
from posttrain.planning.simulation import Outcome, Setting, simulate
from posttrain.planning.stages import Assumptions, engine_of, lengths_of
from posttrain.planning.steps import step_times
from posttrain.recipe import GrpoRecipe, RecipeError

_WARMUP = 2  # steps of a measured run that are left out
_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the GPUs for samplers


@dataclass(frozen=True, slots=True)
class Chances:
    """What happens beside the plan. Hours are those of one node.

    Attributes:
        steps: to simulate.
        straggler_share, straggler_factor: see `Setting`.
        mtbf_hours: mean time between failures of a node; None: none fails.
        restart_seconds: of an engine; the learner, which all its nodes bring down, takes three times as long.
        seed: of all chance.
    """

    steps: int = 20
    straggler_share: float = 0.0
    straggler_factor: float = 2.0
    mtbf_hours: float | None = None
    restart_seconds: float = 300.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of a run's steps, in seconds."""

    generation: float
    learning: float
    publication: float
    rest: float

    @classmethod
    def of_run(cls, directory: str) -> Measured:
        """From metrics.jsonl of a synchronous run (rollout.max_lag: 0).

        Raises:
            RecipeError: there is none, it is too short, or its phases overlap.
        """
        path = Path(directory) / "metrics.jsonl"
        if not path.is_file():
            raise RecipeError(f"--measured {directory}: there is no metrics.jsonl; give a GRPO run's directory")
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(lines) <= _WARMUP or "time/rollout" not in lines[-1]:
            raise RecipeError(f"--measured {directory}: no GRPO run of more than {_WARMUP} steps; give a longer one")
        if any(line["lag/max"] for line in lines[_WARMUP:]):
            raise RecipeError(f"--measured {directory}: its phases overlap; give a run with rollout.max_lag: 0")
        names = ("rollout", "learn", "publish", "step")
        rollout, learn, publish, step = (
            statistics.median(line[f"time/{name}"] for line in lines[_WARMUP:]) for name in names
        )
        return cls(rollout, learn, publish, max(0.0, step - rollout - learn - publish))


def parse_splits(words: Sequence[str] | None, recipe: GrpoRecipe, engine: Engine) -> list[tuple[int, int]]:
    """(sampler GPUs, learner GPUs) of each split; without words shares of the recipe's GPUs, in whole engines.

    Raises:
        RecipeError: a word is no split, or leaves less than one engine.
    """
    if words:
        found = []
        for word in words:
            samplers, colon, learners = word.partition(":")
            if not colon or not samplers.isdigit() or not learners.isdigit() or not int(learners):
                raise RecipeError(f"--splits {word}: write sampler GPUs and learner GPUs, e.g. 128:384")
            if int(samplers) < engine.gpus:
                raise RecipeError(f"--splits {word}: an engine takes {engine.gpus} GPU(s); give samplers at least that")
            found.append((int(samplers), int(learners)))
        return found
    gpus = gpu_count(recipe)
    if gpus < 4 * engine.gpus:
        return [(max(engine.gpus, recipe.sampler.devices), recipe.learner.num_workers)]
    sizes = sorted({max(1, round(gpus * share / engine.gpus)) * engine.gpus for share in _SHARES})
    return [(size, gpus - size) for size in sizes if size < gpus]


def setting_of(
    recipe: GrpoRecipe,
    assumed: Assumptions,
    split: tuple[int, int],
    lag: int,
    chances: Chances,
    measured: Measured | None = None,
) -> Setting:
    """A split and a lag of a recipe.

    Args:
        recipe: for all else.
        assumed: what it does not say.
        split: GPUs of samplers and of the learner.
        lag: max_lag.
        chances: stragglers, failures.
        measured: seconds of the recipe as it is, which then take the place of the plan's; they scale with the split.
    """
    samplers, learners = split
    engine, lengths = engine_of(recipe, assumed), lengths_of(recipe, assumed)
    workers = max(1, samplers // recipe.sampler.tensor_parallel_size)
    divided = recipe.model_copy(
        update={
            "learner": recipe.learner.model_copy(update={"num_workers": learners}),
            "sampler": recipe.sampler.model_copy(update={"num_workers": workers}),
        }
    )
    engines = max(1, samplers // engine.gpus)
    slots = max(1, engine.sequences(assumed.prompt_tokens + lengths.mean))
    if measured is None:
        times = step_times(divided, assumed)
        learning, publication, rest, speed = times.learning, times.publication, 0.0, 1.0
    else:
        learning = measured.learning * recipe.learner.num_workers / learners
        publication, rest = measured.publication, measured.rest
        own = max(1, recipe.sampler.devices // engine.gpus)
        typical = lengths.typical(-(-recipe.samples_per_step // own))
        planned = generation_seconds(engine, typical, assumed.prompt_tokens)
        speed = measured.generation / planned
    mtbf = chances.mtbf_hours * 3600 if chances.mtbf_hours else None
    per_node = assumed.hardware.gpus_per_node
    return Setting(
        engines=engines,
        slots=slots,
        step_seconds=lambda batch, context: speed * engine.step_seconds(batch, context),
        prefill_seconds=speed * engine.prefill_seconds(assumed.prompt_tokens, 1),
        lengths=lengths,
        prompt_tokens=assumed.prompt_tokens,
        samples=recipe.samples_per_step,
        learning_seconds=learning,
        publication_seconds=publication,
        reward_seconds=rest,
        max_lag=lag,
        in_flight=recipe.rollout.in_flight_updates and lag > 0,
        steps=chances.steps,
        save_steps=recipe.checkpoint.save_steps or chances.steps,
        straggler_share=chances.straggler_share,
        straggler_factor=chances.straggler_factor,
        engine_mtbf=mtbf / max(1.0, engine.gpus / per_node) if mtbf else None,
        engine_restart=chances.restart_seconds,
        learner_mtbf=mtbf / max(1.0, learners / per_node) if mtbf else None,
        learner_restart=3 * chances.restart_seconds,
        seed=chances.seed,
    )


def study(
    recipe: GrpoRecipe,
    assumed: Assumptions,
    splits: Sequence[tuple[int, int]],
    lags: Sequence[int],
    chances: Chances,
    measured: Measured | None = None,
) -> str:
    """A table of all splits and lags, the fastest last.

    Raises:
        RecipeError: the recipe has something that is not simulated, or nothing can be generated.
    """
    if recipe.rollout.oversampling > 1:
        raise RecipeError(
            f"rollout.oversampling={recipe.rollout.oversampling:g} is not simulated; add rollout.oversampling=1 to the command"
        )
    if engine_of(recipe, assumed).sequences(1) < 1:
        raise RecipeError("sampler: no sequence fits into the cache; see the plan without --simulate")
    found: list[tuple[tuple[int, int], int, Outcome]] = []
    for split in splits:
        for lag in lags:
            found.append((split, lag, simulate(setting_of(recipe, assumed, split, lag, chances, measured))))
    base = found[0][2].step_seconds
    lines = [
        "| samplers : learner | max_lag | step | tokens/s | x first | samplers idle | learner waits | lag of completions "
        "| failures |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(split, lag, outcome, base) for split, lag, outcome in found),
    ]
    (samplers, learners), lag, best = min(found, key=lambda row: row[2].step_seconds)
    lines += [
        "",
        f"fastest: {samplers} sampler GPUs, {learners} learner GPUs, max_lag {lag}: {duration(best.step_seconds)} a step",
    ]
    return "\n".join(lines)


def _row(split: tuple[int, int], lag: int, outcome: Outcome, base: float) -> str:
    completions = sum(outcome.lags.values())
    lags = ", ".join(f"{lag}: {number / completions:.0%}" for lag, number in sorted(outcome.lags.items()))
    failed = f"{outcome.engine_failures} engines, {outcome.learner_failures} learner"
    return (
        f"| {split[0]} : {split[1]} | {lag} | {duration(outcome.step_seconds)} | {outcome.tokens / outcome.seconds:,.0f} "
        f"| {base / outcome.step_seconds:.2f} | {outcome.sampler_idle:.0%} | {outcome.learner_idle:.0%} | {lags} | {failed} |"
    )
