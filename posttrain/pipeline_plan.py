"""What a pipeline would do: which stages would run and why, told before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.dry_run import describe
from posttrain.errors import RunStopped
from posttrain.fingerprints import Digests
from posttrain.pipeline_graph import Stage, build_graph, needed_by
from posttrain.pipeline_progress import Timings, time_left
from posttrain.recipe import PipelineRecipe, Recipe, RecipeError
from posttrain.recipe_file import nearest
from posttrain.stage_records import judge, missing_outputs, read_record, stale_directories


@dataclass(frozen=True, slots=True)
class Expected:
    """What will become of a stage, as far as can be told now."""

    action: str  # of a Verdict, or "depends": on what stages before it make
    reason: str
    forced: bool = False  # it is finished and unchanged, and must run all the same

    @property
    def settled(self) -> bool:
        """Whether what it makes is there and stays as it is."""
        return self.action == "finished"

    @property
    def runs(self) -> bool:
        """Whether it will run, or may."""
        return self.action not in ("finished", "taken back")


def selected(stages: Sequence[Stage], *, only: str | None, until: str | None) -> list[Stage]:
    """The stages that --only and --until leave.

    Raises:
        RecipeError: both are given, or there is no such stage.
    """
    names = [stage.name for stage in stages]
    if only is not None and until is not None:
        raise RecipeError("command line: --only and --until: give one of them")
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in names:
            raise RecipeError(
                f"command line: {option} {name}: no such stage{nearest(name, names)}; stages are {', '.join(names)}"
            )
    if only is not None:
        return [stage for stage in stages if stage.name == only]
    return list(stages if until is None else stages[: names.index(until) + 1])


def require_settled(chosen: Sequence[Stage], expected: Mapping[str, Expected]) -> None:
    """Refuse stages that would be run on what a stage that is left out has to make first.

    Raises:
        RunStopped: there is one.
    """
    names = {stage.name for stage in chosen}
    for stage in chosen:
        first = next((name for name in stage.needs if name not in names and not expected[name].settled), None)
        if first is not None:
            found = expected[first]
            raise RunStopped(
                f"--only {stage.name}: it needs {first!r}, which is to run first ({found.action}: {found.reason}); use "
                f"--until {stage.name}"
            )


def forecast(stages: Sequence[Stage], run_dir: Path, digests: Digests) -> Mapping[str, Expected]:
    """What will become of all the stages. Changes nothing.

    A finished stage whose files somebody has deleted runs again where they are needed: by a stage that will run, or
    because nothing else follows from them.
    """
    expected: dict[str, Expected] = {}
    for stage in stages:
        unsettled = [name for name in stage.needs if not expected[name].settled]
        verdict = judge(stage, run_dir, digests, unsettled)
        if unsettled and not verdict.runs:
            expected[stage.name] = Expected(
                "depends", f"runs if {', '.join(unsettled)} comes out otherwise than before"
            )
        else:
            expected[stage.name] = Expected(verdict.action, verdict.reason)
    for stage in reversed(stages):
        if expected[stage.name].action in ("finished", "depends"):
            missing = _missed(stage, stages, expected)
            if missing:
                expected[stage.name] = Expected("started anew", f"{missing[0]} was deleted and is needed", forced=True)
    return expected


def _missed(stage: Stage, stages: Sequence[Stage], expected: Mapping[str, Expected]) -> list[str]:
    users = needed_by(stages, stage.name)
    if users:
        running = [other for other in stages if other.name in users and expected[other.name].runs]
        used = [found for other in running for found in other.inputs if found.stage == stage.name]
        return [found.name for found in used if found.path is not None and not found.path.exists()]
    record = read_record(stage.directory)
    return missing_outputs(record, stage.directory) if record else []


def describe_all(recipe: Recipe) -> str:
    """The plan of --dry-run: every stage's own, and then the graph.

    Raises:
        RecipeError: a local checkpoint, or a stage, cannot be read.
    """
    assert isinstance(recipe, PipelineRecipe)
    return f"{describe(recipe)}\n\n{describe_graph(build_graph(recipe), recipe.run_dir)}"


def describe_graph(stages: Sequence[Stage], run_dir: Path) -> str:
    """The stages in the order of running, what would become of each and why, and how long that would take."""
    digests = Digests(run_dir)
    expected = forecast(stages, run_dir, digests)
    digests.save()
    width = max(len(stage.name) for stage in stages)
    lines = ["graph, in the order of running"]
    for number, stage in enumerate(stages, start=1):
        found = expected[stage.name]
        needs = f"  (needs {', '.join(stage.needs)})" if stage.needs else ""
        lines.append(f"  {number}. {stage.name:{width}}  {found.action}: {found.reason}{needs}")
    to_run = [stage for stage in stages if expected[stage.name].runs]
    lines.append(f"{len(to_run)} of {len(stages)} stages would run; {time_left(to_run, Timings(run_dir), {})}")
    stale = stale_directories(run_dir)
    if stale:
        lines.append(f"put aside: {', '.join(path.name for path in stale)}; --prune deletes them")
    return "\n".join(lines)
