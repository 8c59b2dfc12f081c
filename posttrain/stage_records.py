"""stage.json: with what a stage was run, what it made and how long it took; and what follows for the next run.

A stage's directory is never deleted here but by `prune`: a run with another recipe or other inputs begins in a new
directory, and the old one is kept as `<name>.stale-1`, `-2`, ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from posttrain import checkpoint
from posttrain.cli import STAGE_OPTIONS
from posttrain.fingerprints import LOGS, Digests, Snapshot, changes, take_snapshot, tree_digest
from posttrain.pipeline_graph import RECORD, Stage
from posttrain.recipe_file import dump_recipe
from posttrain.run_dir import write_atomically
from posttrain.stage_inputs import Input

Action = Literal["finished", "resumed", "started", "started anew"]
TRAINED = (
    "sft",
    "reward_model",
    "grpo",
)  # they resume from a checkpoint; other stages that resume keep books of their own
STALE = ".stale-"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What stage.json says."""

    snapshot: Snapshot
    kind: str  # sft, grpo, ...
    recipe_file: str
    finished: bool = False
    seconds: float = 0.0  # of all attempts; what a killed one took in its last seconds is not known
    outputs: Mapping[str, str] = field(default_factory=dict)  # file below the stage's directory -> SHA-256
    links: Mapping[str, str] = field(default_factory=dict)  # checkpoints/latest -> checkpoints/step-20

    def write(self, directory: Path) -> None:
        """Into a stage's directory, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        text = {"fingerprint": self.snapshot.fingerprint, **asdict(self)}
        write_atomically(directory / RECORD, json.dumps(text, indent=2))

    def digest(self, place: Path) -> str | None:
        """The hash of a place below the stage's directory as the stage made it; None where it made nothing."""
        real = self.links.get(str(place), str(place))
        if real in self.outputs:
            return self.outputs[real]
        above = "" if real == "." else f"{real}/"
        files = {name.removeprefix(above): digest for name, digest in self.outputs.items() if name.startswith(above)}
        return tree_digest(files) if files else None


def read_record(directory: Path) -> StageRecord | None:
    """What is recorded of a stage; None: nothing."""
    if not (directory / RECORD).exists():
        return None
    found = json.loads((directory / RECORD).read_text())
    found.pop("fingerprint")
    return StageRecord(Snapshot(**found.pop("snapshot")), **found)


def record_outputs(record: StageRecord, directory: Path, digests: Digests) -> StageRecord:
    """The record of a stage that has ended well."""
    links = {}
    for link in directory.rglob("*"):
        if link.is_symlink() and link.is_dir() and directory.resolve() in link.resolve().parents:
            links[str(link.relative_to(directory))] = str(link.resolve().relative_to(directory.resolve()))
    return replace(record, finished=True, outputs=digests.of_files(directory, LOGS), links=links)


# --- what to do about a stage -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a stage, and why."""

    action: Action
    reason: str
    snapshot: Snapshot

    @property
    def runs(self) -> bool:
        return self.action != "finished"


def judge(stage: Stage, run_dir: Path, digests: Digests, unsettled: Collection[str] = ()) -> Verdict:
    """Compare what a stage's directory says with the recipe and the inputs as they are now.

    Args:
        unsettled: stages that may still make something else than before; their output counts as unchanged.
    """
    record = read_record(stage.directory)
    now = snapshot(stage, run_dir, digests)
    if record is not None and unsettled:
        before = {(row["key"], row["name"]): row for row in record.snapshot.inputs}
        rows = [before.get((row["key"], row["name"]), row) if row["stage"] in unsettled else row for row in now.inputs]
        now = replace(now, inputs=rows)
    if record is None:
        return _judge_unrecorded(stage, now)
    different = changes(record.snapshot, now)
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        return Verdict("started anew", "; ".join(different[:3]) + more, now)
    if record.finished or has_ended(stage.directory):
        return Verdict("finished", "unchanged", now)
    return _cut_short(stage, now)


def snapshot(stage: Stage, run_dir: Path, digests: Digests) -> Snapshot:
    """A stage's recipe and inputs as they are."""
    rows = [(found, input_digest(found, run_dir, digests)) for found in stage.inputs]
    return take_snapshot(stage.recipe, run_dir, rows)


def input_digest(found: Input, run_dir: Path, digests: Digests) -> str | None:
    """The hash of an input; None for a hub name, and for what is not made yet.

    What an earlier stage made and somebody has deleted since keeps the hash that the stage recorded.
    """
    if found.path is None:
        return None
    if found.stage is not None:
        directory = run_dir / found.stage
        if found.name.count("/") == 1:  # all that the stage makes
            files = digests.of_files(directory, LOGS) if directory.exists() else {}
            if files:
                return tree_digest(files)
        elif found.path.exists():
            return digests.of(found.path)
        record = read_record(directory)
        return record.digest(Path(found.name.partition("/")[2]).relative_to(found.stage)) if record else None
    return digests.of(found.path) if found.path.exists() else None


def missing_outputs(record: StageRecord, directory: Path) -> list[str]:
    """Files that a stage made and that are gone; samples may be deleted."""
    return [name for name in record.outputs if not name.startswith("samples/") and not (directory / name).exists()]


def has_ended(directory: Path) -> bool:
    """Whether the stage itself says that it has come to its end."""
    summary = directory / "summary.json"
    return summary.exists() and bool(json.loads(summary.read_text()).get("finished"))


def _judge_unrecorded(stage: Stage, now: Snapshot) -> Verdict:
    """A directory that no pipeline has recorded: none, an empty one, or a run of the stage by itself."""
    recipe_file = stage.directory / "recipe.yaml"
    if not stage.directory.exists() or not any(stage.directory.iterdir()):
        return Verdict("started", "not run yet", now)
    if not recipe_file.exists() or recipe_file.read_text() != dump_recipe(stage.recipe):
        return Verdict("started anew", "what is there was made with another recipe", now)
    if has_ended(stage.directory):
        return Verdict("finished", "the same recipe; its inputs were not recorded", now)
    return _cut_short(stage, now)


def _cut_short(stage: Stage, now: Snapshot) -> Verdict:
    kind = stage.recipe.stage
    goes_on = kind in STAGE_OPTIONS["resume"] and (
        kind not in TRAINED or checkpoint.newest_trained(stage.directory / "checkpoints") is not None
    )
    if goes_on:
        return Verdict("resumed", "it was cut short", now)
    return Verdict("started", "it was cut short with nothing to go on from", now)


# --- directories put aside --------------------------------------------------------------------------------------------


def put_aside(directory: Path) -> Path:
    """Rename a stage's directory so that a new run can have its place. Returns where it is now."""
    number = 1
    while directory.with_name(f"{directory.name}{STALE}{number}").exists():
        number += 1
    aside = directory.with_name(f"{directory.name}{STALE}{number}")
    directory.rename(aside)
    return aside


def stale_directories(run_dir: Path) -> list[Path]:
    """All that was put aside, by name."""
    return sorted(path for path in run_dir.glob(f"*{STALE}*") if path.name.rpartition(STALE)[2].isdecimal())


def prune(run_dir: Path) -> list[Path]:
    """Delete what was put aside. Returns what it was."""
    found = stale_directories(run_dir)
    for path in found:
        shutil.rmtree(path)
    return found
