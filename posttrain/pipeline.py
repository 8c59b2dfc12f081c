"""Stages as a graph, each in a process of its own; what is finished and unchanged is not run again.

    python -m posttrain.pipeline recipe.yaml [key.path=value ...] [--dry-run] [--only NAME] [--until NAME]
    python -m posttrain.pipeline recipe.yaml --lineage      where every artefact came from
    python -m posttrain.pipeline recipe.yaml --prune        delete what was put aside

A stage runs in `<run directory>/<stage name>`. It needs the stages whose output its recipe names, and runs after them. It
is finished when its summary says so, and unchanged when its recipe and the content of all that it takes in are the same
as when it ran. One that was cut short goes on from its newest checkpoint. One whose recipe or inputs have changed begins
anew, and its old directory is put aside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.report import write_report
from posttrain import checkpoint, stage_records
from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.fingerprints import Digests
from posttrain.lineage import lineage, show_lineage, write_lineage
from posttrain.pipeline_graph import Stage, build_graph
from posttrain.pipeline_plan import describe_all, forecast, require_settled, selected
from posttrain.pipeline_progress import Timings, Watch, clock, time_left
from posttrain.progress import before_after_table, paths_written
from posttrain.recipe import PipelineRecipe
from posttrain.recipe_file import dump_recipe, module_of, stage_overrides
from posttrain.run_dir import RunDir
from posttrain.stage_process import locked, run_process
from posttrain.stage_records import StageRecord, Verdict, judge


def run(
    recipe: PipelineRecipe,
    *,
    lineage: bool = False,
    prune: bool = False,
    only: str | None = None,
    until: str | None = None,
) -> int:
    """Run the stages, or do what an option asks for. Returns 0, or the exit code of the first stage that did not end well."""
    stages = build_graph(recipe)
    if lineage:
        return print_lineage(stages, recipe.run_dir)
    chosen = selected(stages, only=only, until=until)
    with locked(recipe.run_dir) as lock:
        if prune:
            return print_pruned(recipe.run_dir)
        pipeline = Pipeline(recipe, stages, lock)
        code = pipeline.run_all(chosen)
        return code or pipeline.finish()


class Pipeline:
    """The stages of one run directory, whose lock is held."""

    def __init__(self, recipe: PipelineRecipe, stages: Sequence[Stage], lock: int) -> None:
        self.recipe, self.stages, self.lock = recipe, stages, lock
        self.run_dir = RunDir(recipe.run_dir)
        self.digests = Digests(self.run_dir.path)
        self.timings = Timings(self.run_dir.path)
        self.has_run = False

    def run_all(self, chosen: Sequence[Stage]) -> int:
        """Each stage in turn, judged when its turn comes: by then the stages before it are as they will stay."""
        expected = forecast(self.stages, self.run_dir.path, self.digests)
        require_settled(chosen, expected)
        to_run = [stage for stage in chosen if expected[stage.name].runs]
        if to_run:
            print(f"{len(to_run)} of {len(chosen)} stages to run; {time_left(to_run, self.timings, {})}", flush=True)
        for number, stage in enumerate(chosen, start=1):
            verdict = judge(stage, self.run_dir.path, self.digests)
            if verdict.action == "finished" and expected[stage.name].forced:
                verdict = replace(verdict, action="started anew", reason=expected[stage.name].reason)
            label = f"[{number}/{len(chosen)}] {stage.name}"
            print(f"{label}: {verdict.action} ({verdict.reason})", flush=True)
            later = [other for other in chosen[number:] if expected[other.name].runs]
            code = self.settle(stage, verdict, label, later)
            if code:
                return code
        return 0

    def settle(self, stage: Stage, verdict: Verdict, label: str, later: Sequence[Stage]) -> int:
        """Do what was found about a stage. Returns its exit code; 0 where it need not run."""
        if verdict.runs:
            self.begin()
            return self.run_one(stage, verdict, label, later)
        if verdict.kept is not None:
            self.begin()
            stage_records.take_back(stage.directory, verdict.kept)
        record = stage_records.read_record(stage.directory)
        # It was run by its own command, or the pipeline was killed just before it could write down the end.
        if record is None or not record.finished:
            seconds = read_summary(stage.directory)["seconds"]
            self.record_end(stage, record or self.new_record(stage, verdict, seconds))
        return 0

    def begin(self) -> None:
        """Write down what is about to be run, and on what, unless that is done."""
        if self.has_run:
            return
        self.has_run = True
        self.run_dir.write_recipe(dump_recipe(self.recipe))
        self.run_dir.write_environment(self.recipe.seed)

    def run_one(self, stage: Stage, verdict: Verdict, label: str, later: Sequence[Stage]) -> int:
        """Run one stage to its end. Returns its exit code."""
        require_inputs(stage)
        if verdict.action == "started anew" and stage.directory.exists():
            aside = stage_records.put_aside(stage.directory, verdict.books)
            print(f"{label}: the earlier run is kept in {aside}", flush=True)
        earlier = stage_records.read_record(stage.directory)
        before = earlier.seconds if earlier else 0.0
        record = self.new_record(stage, verdict, before)
        record.write(stage.directory)
        self.digests.save()
        watch = Watch(label, [stage, *later], self.timings, before)
        spent = before

        def beat(seconds: float) -> None:
            nonlocal spent
            spent = before + seconds
            replace(record, seconds=spent).write(stage.directory)
            watch.beat(seconds)

        words = [stage.section.recipe, *stage_overrides(stage.section, self.run_dir.path)]
        words += ["--resume"] if verdict.resumes else []
        code = run_process(module_of(stage.recipe.stage), words, self.lock, beat)
        if code:
            print(f"{label}: ended with exit code {code}; the same command goes on from here", flush=True)
            return code
        if not stage_records.has_ended(stage.directory):
            raise RunStopped(f"stage {stage.name} left no summary that says it has finished in {stage.directory}")
        self.record_end(stage, replace(record, seconds=spent))
        self.timings.remember(stage, spent)
        print(f"{label}: done in {clock(spent)}; {time_left(later, self.timings, {})}", flush=True)
        return 0

    def new_record(self, stage: Stage, verdict: Verdict, seconds: float) -> StageRecord:
        return StageRecord(verdict.snapshot, stage.recipe.stage, stage.section.recipe, seconds=seconds)

    def record_end(self, stage: Stage, record: StageRecord) -> None:
        """Hash what a stage has made, and bring the lineage up to date."""
        stage_records.record_outputs(record, stage.directory, self.digests).write(stage.directory)
        self.digests.save()
        write_lineage(self.run_dir.path, lineage(self.stages, self.digests))

    def finish(self) -> int:
        """Summary and report, once all stages have ended; a run that had nothing to do leaves them as they are."""
        self.digests.save()
        ended = [stage for stage in self.stages if stage_records.has_ended(stage.directory)]
        summaries = {stage.name: read_summary(stage.directory) for stage in ended}
        report = self.run_dir.path / "report.html"
        if self.has_run or not report.exists() or read_summary(self.run_dir.path)["stages"] != summaries:
            report.unlink(missing_ok=True)  # so that a kill before the new one is written is noticed
            records = [stage_records.read_record(stage.directory) for stage in ended]
            seconds = sum(record.seconds for record in records if record is not None)
            is_whole = len(ended) == len(self.stages)
            self.run_dir.write_summary(
                {"stage": "pipeline", "seconds": seconds, "finished": is_whole, "stages": summaries}
            )
            write_report(self.run_dir.path)
        show(summaries)
        last = [stage.directory / "checkpoints" / checkpoint.LATEST for stage in ended]
        paths_written(self.run_dir.path, [*[path for path in last if path.exists()][-1:], report])
        return 0


def require_inputs(stage: Stage) -> None:
    """Refuse to start a stage that uses what an earlier one has not made after all.

    Raises:
        RunStopped: naming what is not there, or what is damaged.
    """
    for found in stage.inputs:
        if found.stage is not None and found.path is not None and not found.path.exists():
            raise RunStopped(
                f"stage {stage.name}: {found.key}: {found.path} is not there; run stage {found.stage!r} first (leave --only "
                f"out), or name something that it makes"
            )
        # A checkpoint, or a file in one.
        for place in (found.path, found.path.parent) if found.path is not None and found.stage is not None else ():
            checkpoint.require_sound(place)


def print_lineage(stages: Sequence[Stage], run_dir: Path) -> int:
    found = lineage(stages, Digests(run_dir))
    show_lineage(stages, found)
    if run_dir.exists():
        print(f"written: {write_lineage(run_dir, found)}")
    return 0


def print_pruned(run_dir: Path) -> int:
    for path in stage_records.prune(run_dir):
        print(f"deleted {path}")
    return 0


def read_summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def show(summaries: dict[str, Any]) -> None:
    """The evaluations of all stages in one table, if there are any."""
    results = {
        f"{name}, {moment}": result
        for name, summary in summaries.items()
        for moment, result in summary.get("eval", {}).items()
    }
    if results:
        before_after_table(results)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("pipeline", run, argv, plan=describe_all)


if __name__ == "__main__":
    sys.exit(main())
