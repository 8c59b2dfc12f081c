"""The stages of a pipeline as a graph: who uses what another makes, and the order that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.recipe import PipelineRecipe, Recipe, RecipeError, StageSection
from posttrain.recipe_file import nearest, stage_recipe
from posttrain.stage_inputs import RUN_DIR, Input, find_inputs

RECORD = "stage.json"  # in a stage's directory: see stage_records.py


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with its recipe resolved."""

    section: StageSection
    recipe: Recipe
    directory: Path
    inputs: tuple[Input, ...]
    needs: tuple[str, ...]  # the stages before it, in the order of the recipe

    @property
    def name(self) -> str:
        return self.section.name


def build_graph(recipe: PipelineRecipe) -> tuple[Stage, ...]:
    """The stages in an order in which each comes after those that it needs: the recipe's own order where that will do.

    Raises:
        RecipeError: a stage that does not exist is named, stages need each other in a circle, or one uses what a later one
            makes.
    """
    names = [section.name for section in recipe.stages]
    stages = {}
    for index, section in enumerate(recipe.stages):
        try:
            stages[section.name] = _stage(section, recipe.run_dir, names)
        except RecipeError as error:
            raise RecipeError(f"stages.{index} ({section.name}): {error}") from None
    order = _in_order({name: stage.needs for name, stage in stages.items()})
    for index, stage in enumerate(stages.values()):
        _check_direction(stage, index, names)
    return tuple(stages[name] for name in order)


def needed_by(stages: Sequence[Stage], name: str) -> list[str]:
    """The stages that use what `name` makes."""
    return [stage.name for stage in stages if name in stage.needs]


def _stage(section: StageSection, run_dir: Path, names: Sequence[str]) -> Stage:
    recipe = stage_recipe(section, run_dir)
    inputs = []
    for found in find_inputs(recipe, run_dir):
        if found.stage is None or found.stage in names:
            inputs.append(found)
        else:
            inputs.append(_of_no_stage(found, run_dir, names))
    for after in section.after:
        if after not in names:
            raise RecipeError(f"after: {after!r} is no stage{nearest(after, names)}; stages are {', '.join(names)}")
        inputs.append(Input("after", f"{RUN_DIR}/{after}", run_dir / after, after))
    used = {found.stage for found in inputs if found.stage is not None}
    if section.name in used:
        key = next(found.key for found in inputs if found.stage == section.name)
        raise RecipeError(f"{key}: it uses what it makes itself; name another stage, or a path elsewhere")
    needs = tuple(name for name in names if name in used)
    return Stage(section, recipe, run_dir / section.name, tuple(inputs), needs)


def _of_no_stage(found: Input, run_dir: Path, names: Sequence[str]) -> Input:
    """An input in the run directory that no stage makes: a file of the user's. Refused where it cannot be one."""
    assert found.path is not None and found.stage is not None
    if not found.path.exists():
        raise RecipeError(
            f"{found.key}: {found.name} is in the folder of {found.stage!r}, which is no stage"
            f"{nearest(found.stage, names)}; stages are {', '.join(names)}"
        )
    if (run_dir / found.stage / RECORD).exists():
        raise RecipeError(
            f"{found.key}: {found.name} was made by a stage that is not in this recipe; add that stage, or move the folder "
            f"out of {run_dir}"
        )
    return Input(found.key, found.name, found.path)


def _in_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Kahn's algorithm; of several stages that could be next, the one that the recipe lists first."""
    order: list[str] = []
    while len(order) < len(needs):
        ready = (name for name in needs if name not in order and set(needs[name]) <= set(order))
        following = next(ready, None)
        if following is None:
            raise RecipeError(
                f"stages: {' -> '.join(_circle(needs, order))}: each needs the one after it; break the circle"
            )
        order.append(following)
    return order


def _circle(needs: Mapping[str, Sequence[str]], done: Sequence[str]) -> list[str]:
    """Stages that need each other, the first one again at the end."""
    path = [next(name for name in needs if name not in done)]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in needs[path[-1]] if name not in done))
    return path[path.index(path[-1]) :]


def _check_direction(stage: Stage, index: int, names: Sequence[str]) -> None:
    for found in _uses(stage):
        assert found.stage is not None
        if names.index(found.stage) > index and found.stage not in stage.section.after:
            raise RecipeError(
                f"stages.{index} ({stage.name}): {found.key}: it uses what {found.stage!r} makes, which is listed after it; "
                f"list {found.stage!r} first, or add after: [{found.stage}]"
            )


def _uses(stage: Stage) -> Iterator[Input]:
    return (found for found in stage.inputs if found.stage is not None and found.key != "after")
