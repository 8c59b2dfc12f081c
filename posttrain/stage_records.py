"""stage.json: with what a stage was run, what it made and how long it took; and what follows for the next run.

A stage's directory is never deleted here but by `prune`: a run with another recipe or other inputs begins in a new
directory, and the old one is kept as `<name>.stale-1`, `-2`, ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from posttrain import checkpoint
from posttrain.cli import STAGE_OPTIONS
from posttrain.disk import write_atomically
from posttrain.fingerprints import LOGS, Change, Digests, Snapshot, changes, take_snapshot, tree_digest
from posttrain.pipeline_graph import RECORD, Stage
from posttrain.recipe_file import dump_recipe
from posttrain.stage_inputs import Input

Action = Literal["finished", "taken back", "resumed", "started", "started anew"]
# A stage that trains resumes from a checkpoint, one of these from the books it keeps here. They serve a changed recipe as
# well, as long as the change is in keys that say what becomes of what is in them: what was paid for is not paid for again.
BOOKS = {"distill": Path("journal", "generations.jsonl"), "eval": Path("generations")}
AFTER_THE_BOOKS = {"distill": ("rewards", "rejection", "selection", "output", "report_to")}
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
        real = self.without_links(str(place))
        if real in self.outputs:
            return self.outputs[real]
        above = "" if real == "." else f"{real}/"
        files = {name.removeprefix(above): digest for name, digest in self.outputs.items() if name.startswith(above)}
        return tree_digest(files) if files else None

    def without_links(self, place: str) -> str:
        """A place below the stage's directory, with checkpoints/latest written as what it stands for."""
        for link, target in self.links.items():
            if place == link or place.startswith(f"{link}/"):
                return target + place.removeprefix(link)
        return place


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
    kept: Path | None = None  # "taken back": the directory to use again
    books: str | None = None  # "started anew": what the new directory takes over from the old one

    @property
    def runs(self) -> bool:
        return self.action not in ("finished", "taken back")

    @property
    def resumes(self) -> bool:
        """Whether the stage is told to go on with what it finds."""
        return self.action == "resumed" or self.books is not None


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
    verdict = _judge_unrecorded(stage, now) if record is None else _judge_recorded(stage, record, now)
    if verdict.action in ("started", "started anew"):
        kept = _kept_run(stage.directory, now.fingerprint)
        if kept is not None:
            return Verdict("taken back", f"{kept.name} was made with this recipe and these inputs", now, kept=kept)
    return verdict


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


def _judge_recorded(stage: Stage, record: StageRecord, now: Snapshot) -> Verdict:
    different = changes(record.snapshot, now)
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        books = _books(stage.recipe.stage, stage.directory, different)
        return Verdict("started anew", "; ".join(map(str, different[:3])) + more, now, books=books)
    if record.finished or has_ended(stage.directory):
        return Verdict("finished", "unchanged", now)
    return _cut_short(stage, now)


def _books(kind: str, directory: Path, different: Sequence[Change]) -> str | None:
    """The books that a changed stage goes on with; None where it has none, or where they answer another question."""
    keys = AFTER_THE_BOOKS.get(kind, ())
    serves = kind in BOOKS and all(change.key.partition(".")[0] in keys for change in different)
    return BOOKS[kind].parts[0] if serves and (directory / BOOKS[kind]).exists() else None


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
    if kind in BOOKS:
        goes_on = (stage.directory / BOOKS[kind]).exists()
    else:
        goes_on = checkpoint.newest_trained(stage.directory / "checkpoints") is not None
    if goes_on and kind in STAGE_OPTIONS["resume"]:
        return Verdict("resumed", "it was cut short", now)
    return Verdict("started", "it was cut short with nothing to go on from", now)


# --- directories put aside --------------------------------------------------------------------------------------------


def put_aside(directory: Path, books: str | None = None) -> Path:
    """Rename a stage's directory so that a new run can have its place.

    Args:
        directory: the stage's.
        books: a directory in it of which the new one gets a copy.

    Returns:
        Where the old one is now.
    """
    if books is not None:
        copy = directory.with_name(f".{directory.name}.{books}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory / books, copy)
    number = 1
    while directory.with_name(f"{directory.name}{STALE}{number}").exists():
        number += 1
    aside = directory.with_name(f"{directory.name}{STALE}{number}")
    directory.rename(aside)
    if books is not None:
        directory.mkdir()
        copy.rename(directory / books)
    return aside


def take_back(directory: Path, kept: Path) -> None:
    """Let a directory that was put aside have its place again; what is there now is put aside."""
    if directory.exists():
        put_aside(directory)
    kept.rename(directory)


def _kept_run(directory: Path, fingerprint: str) -> Path | None:
    """A whole run that was put aside and had the same recipe and inputs."""
    for path in directory.parent.glob(f"{directory.name}{STALE}*"):
        record = read_record(path)
        is_same = record is not None and record.finished and record.snapshot.fingerprint == fingerprint
        if record is not None and is_same and not missing_outputs(record, path):
            return path
    return None


def stale_directories(run_dir: Path) -> list[Path]:
    """All that was put aside, by name."""
    return sorted(path for path in run_dir.glob(f"*{STALE}*") if path.name.rpartition(STALE)[2].isdecimal())


def prune(run_dir: Path) -> list[Path]:
    """Delete what was put aside. Returns what it was."""
    found = stale_directories(run_dir)
    for path in found:
        shutil.rmtree(path)
    return found
