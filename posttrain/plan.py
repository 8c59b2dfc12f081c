"""What a recipe will need, on paper: memory, time, GPUs, hours and cost, every number with its formula and source.

    python -m posttrain.plan recipe.yaml [key.path=value ...] [--hardware h100] [--price 2.5] [--mean-length 8000]
    python -m posttrain.plan recipe.yaml --simulate [--splits 128:384,256:256] [--lags 0,1,2]

Nothing is downloaded, looked up or started: shapes come from the recipe, from posttrain/architectures.py or from a local
config.json; ceilings from posttrain/planning/hardware.yaml or a file that benchmarks/plan.py wrote. `--simulate` plays
samplers, learner, stragglers and failures as discrete events. How far plans are from measurements is in docs/measured/plan.md.

Exit codes: 0; 2 for a recipe or an option that makes no plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.planning.hardware import load_hardware
from posttrain.planning.plans import Plan, make_plan
from posttrain.planning.splits import Chances, Measured, parse_splits, study
from posttrain.planning.stages import DEFAULT_SIGMA, Assumptions, engine_of
from posttrain.recipe import GrpoRecipe, ModelSection, PipelineRecipe, Recipe, RecipeError
from posttrain.recipe_file import load_recipe, stage_recipe


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.plan",
        description="memory, time, GPUs and cost of a recipe, on paper",
        epilog="key.path=value changes the recipe; docs/scale.md explains the numbers",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME|FILE", help="h100, h800, h200, a100, or a YAML file"
    )
    parser.add_argument("--price", type=float, help="of a GPU hour, in any currency")
    parser.add_argument("--mean-length", type=float, help="tokens of a completion (a quarter of the longest)")
    parser.add_argument(
        "--length-sigma", type=float, default=DEFAULT_SIGMA, help="deviation of its logarithm (%(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of a prompt (%(default)s)")
    parser.add_argument(
        "--gpus-per-sampler", type=int, help="over which an engine's weights are spread (as few as fit)"
    )
    parser.add_argument("--ranks", type=int, help="SFT, reward model: processes of `accelerate launch`")
    parser.add_argument("--steps", type=int, help="SFT, reward model: where the recipe counts epochs")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    simulated = parser.add_argument_group("simulation of a GRPO recipe")
    simulated.add_argument(
        "--simulate", action="store_true", help="play the run as discrete events, for splits and lags"
    )
    simulated.add_argument(
        "--splits", type=words_of, metavar="S:L,...", help="GPUs of samplers : learner (shares of all)"
    )
    simulated.add_argument("--lags", type=words_of, default=["0", "1", "2"], help="values of rollout.max_lag (0,1,2)")
    simulated.add_argument("--measured", metavar="RUN", help="take seconds from this synchronous run's metrics")
    simulated.add_argument("--simulated-steps", type=int, default=20, help="%(default)s")
    simulated.add_argument("--straggler-share", type=float, default=0.0, help="engines that are slow in a rollout (0)")
    simulated.add_argument("--straggler-factor", type=float, default=2.0, help="so many times slower (%(default)s)")
    simulated.add_argument("--mtbf-hours", type=float, help="mean time between failures of a node (none fails)")
    simulated.add_argument(
        "--restart-seconds", type=float, default=300.0, help="of an engine (%(default)s); learner: 3 x"
    )
    simulated.add_argument("--seed", type=int, default=0, help="of the simulation")
    return parser


def words_of(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [word for word in text.split(",") if word]


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(argv)
    try:
        print(output(options))
    except RecipeError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


def output(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        RecipeError: the recipe or an option makes no plan.
    """
    for name in ("price", "mean_length", "prompt_tokens", "gpus_per_sampler", "ranks", "steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    assumed = Assumptions(
        hardware=load_hardware(options.hardware),
        mean_length=options.mean_length,
        length_sigma=options.length_sigma,
        prompt_tokens=options.prompt_tokens,
        gpus_per_sampler=options.gpus_per_sampler,
        ranks=options.ranks,
        steps=options.steps,
        price=options.price,
    )
    recipe: Recipe = load_recipe(options.recipe, options.overrides)
    if options.simulate:
        return simulated(recipe, assumed, options)
    if options.measured or options.splits or options.mtbf_hours:
        raise RecipeError("--measured, --splits and --mtbf-hours are of the simulation; add --simulate")
    plans = plans_of(recipe, assumed)
    if options.json:
        return json.dumps({name: as_json(plan) for name, plan in plans.items()}, indent=2)
    if not isinstance(recipe, PipelineRecipe):
        return plans[recipe.stage].text()
    return "\n\n".join(f"{number}. {name}\n{plan.text()}" for number, (name, plan) in enumerate(plans.items(), start=1))


def simulated(recipe: Recipe, assumed: Assumptions, options: argparse.Namespace) -> str:
    """The table of --simulate.

    Raises:
        RecipeError: the recipe is of another stage than GRPO, or an option is out of range.
    """
    if not isinstance(recipe, GrpoRecipe):
        raise RecipeError(f"--simulate plays GRPO runs and this recipe is for {recipe.stage!r}; leave --simulate out")
    refuse(assumed, "ranks", "steps")
    if not 0 <= options.straggler_share <= 1 or options.straggler_factor < 1:
        raise RecipeError("--straggler-share is 0 to 1 and --straggler-factor at least 1; change them")
    if not all(word.isdigit() for word in options.lags) or options.simulated_steps < 1 or options.restart_seconds < 0:
        raise RecipeError(
            "--lags are 0 or more, --simulated-steps at least 1, --restart-seconds 0 or more; change them"
        )
    if options.mtbf_hours is not None and options.mtbf_hours <= 0:
        raise RecipeError(f"--mtbf-hours {options.mtbf_hours:g}: give a number above 0, or leave it out")
    chances = Chances(
        steps=options.simulated_steps,
        straggler_share=options.straggler_share,
        straggler_factor=options.straggler_factor,
        mtbf_hours=options.mtbf_hours,
        restart_seconds=options.restart_seconds,
        seed=options.seed,
    )
    measured = Measured.of_run(options.measured) if options.measured else None
    splits = parse_splits(options.splits, recipe, engine_of(recipe, assumed))
    return study(recipe, assumed, splits, [int(word) for word in options.lags], chances, measured)


def plans_of(recipe: Recipe, assumed: Assumptions) -> dict[str, Plan]:
    """The plan of a stage under its name, or of those stages of a pipeline that train.

    Raises:
        RecipeError: a stage makes no plan, or no stage of a pipeline trains.
    """
    if not isinstance(recipe, PipelineRecipe):
        if isinstance(recipe, GrpoRecipe):
            refuse(assumed, "ranks", "steps")
        return {recipe.stage: make_plan(recipe, assumed)}
    found: dict[str, Plan] = {}
    made: dict[Path, ModelSection] = {}
    for section in recipe.stages:
        stage = stage_recipe(section, recipe.run_dir)
        if stage.stage not in ("sft", "reward_model", "grpo"):
            continue
        stage = stage.model_copy(update={"model": _as_made(stage.model, made)})
        made[stage.run_dir] = stage.model
        try:
            found[section.name] = make_plan(stage, assumed)
        except RecipeError as error:
            raise RecipeError(f"stages: {section.name}: {error}") from None
    if not found:
        raise RecipeError("stages: none of them trains a policy or a reward model, so there is nothing to plan")
    return found


def _as_made(model: ModelSection, made: Mapping[Path, ModelSection]) -> ModelSection:
    """A stage's model; where an earlier stage of the pipeline makes it, with the origin of that one's."""
    for run_dir, earlier in made.items():
        if model.model_name_or_path is not None and Path(model.model_name_or_path).is_relative_to(run_dir):
            origin = ("model_name_or_path", "build", "extra_characters")
            return model.model_copy(update={name: getattr(earlier, name) for name in origin})
    return model


def refuse(assumed: Assumptions, *names: str) -> None:
    """Refuse options that mean nothing for GRPO.

    Raises:
        RecipeError: one of them was given.
    """
    for name in names:
        if getattr(assumed, name) is not None:
            raise RecipeError(
                f"--{name}: a GRPO recipe says it itself (learner.num_workers, max_steps); remove the option"
            )


def as_json(plan: Plan) -> dict[str, object]:
    """A plan as JSON's own types."""
    sections = {title: [asdict(quantity) for quantity in lines] for title, lines in plan.sections.items()}
    return {"head": plan.head, "sections": sections, "warnings": plan.warnings}


if __name__ == "__main__":
    sys.exit(main())
