"""Where every artefact of a pipeline came from: the stage, its recipe, and the inputs, back to what was given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from posttrain.disk import write_atomically
from posttrain.fingerprints import Digests, tree_digest
from posttrain.pipeline_graph import Stage, needed_by
from posttrain.pipeline_progress import clock
from posttrain.stage_inputs import RUN_DIR
from posttrain.stage_records import StageRecord, read_record

FILE = "lineage.json"


def lineage(stages: Sequence[Stage], digests: Digests) -> dict[str, Any]:
    """What is recorded of the stages that have ended, as JSON.

    Returns:
        `stages`: name -> kind, recipe (its file), fingerprint, seconds, inputs (key, name, stage, artefact, sha256,
        current: false where the stage has made something else since);
        `artefacts`: path in the run directory -> stage, sha256, names (links to it, such as checkpoints/latest), files,
        unchanged (whether the files are still what the stage made).
    """
    made: dict[str, dict[str, Any]] = {}
    origins: dict[str, dict[str, Any]] = {}
    for stage in stages:
        record = read_record(stage.directory)
        if record is None or not record.finished:
            continue
        found = _artefacts(stage, record, digests)
        made |= found
        inputs = [_origin(row, stages, made) for row in record.snapshot.inputs]
        origins[stage.name] = {
            "kind": record.kind,
            "recipe": record.recipe_file,
            "fingerprint": record.snapshot.fingerprint,
            "seconds": record.seconds,
            "inputs": inputs,
            "artefacts": list(found),
        }
    return {"stages": origins, "artefacts": made}


def write_lineage(run_dir: Path, found: Mapping[str, Any]) -> Path:
    """lineage.json in the pipeline's run directory."""
    write_atomically(run_dir / FILE, json.dumps(found, indent=2))
    return run_dir / FILE


def show_lineage(stages: Sequence[Stage], found: Mapping[str, Any]) -> None:
    """A tree for each stage that no other one uses. What two trees share is spelled out in the first."""
    console, seen = Console(), set[str]()
    console = Console(width=max(console.width, 160))  # a hash must not be cut off
    for stage in stages:
        if not needed_by(stages, stage.name) or stage.name not in found["stages"]:
            console.print(_tree(stage.name, found, seen))


def _tree(name: str, found: Mapping[str, Any], seen: set[str]) -> Tree:
    stage = found["stages"].get(name)
    if stage is None:
        return Tree(f"[bold]{escape(name)}[/bold]: not finished")
    title = f"[bold]{escape(name)}[/bold] ({stage['kind']}, {escape(stage['recipe'])}, {clock(stage['seconds'])})"
    if name in seen:
        return Tree(f"{title}: see above")
    seen.add(name)
    tree = Tree(title)
    for path in stage["artefacts"]:
        artefact = found["artefacts"][path]
        names = "".join(f" = {escape(link)}" for link in artefact["names"])
        note = "" if artefact["unchanged"] else "  [red]changed since[/red]"
        tree.add(f"made {escape(path)}{names}  {artefact['sha256'][:12]}{note}")
    shown: set[str] = set()
    for row in stage["inputs"]:
        note = "" if row["current"] else "  [red]made anew since[/red]"
        digest = (row["sha256"] or "by its name")[:12]
        branch = tree.add(f"from {escape(row['name'])} ({row['key']})  {digest}{note}")
        if row["stage"] is not None and row["stage"] not in shown:
            shown.add(row["stage"])
            branch.add(_tree(row["stage"], found, seen))
    return tree


def _artefacts(stage: Stage, record: StageRecord, digests: Digests) -> dict[str, dict[str, Any]]:
    """A stage's files by what they belong to: a checkpoint, a folder, or themselves."""
    groups: dict[str, dict[str, str]] = {}
    for name, digest in record.outputs.items():
        group = _group(name, record.outputs)
        groups.setdefault(group, {})[name] = digest
    return {
        f"{stage.name}/{group}": {
            "stage": stage.name,
            "sha256": record.digest(Path(group)) or tree_digest(files),
            "names": [f"{stage.name}/{link}" for link, target in record.links.items() if target == group],
            "files": len(files),
            "unchanged": all(_is_same(stage.directory / name, digest, digests) for name, digest in files.items()),
        }
        for group, files in groups.items()
    }


def _group(name: str, outputs: Mapping[str, str]) -> str:
    """The outermost folder above a file with a model in it; else the file's folder; at the top the file itself."""
    folders = [str(parent) for parent in reversed(Path(name).parents) if str(parent) != "."]
    checkpoints = [folder for folder in folders if f"{folder}/config.json" in outputs]
    return (checkpoints or folders[-1:] or [name])[0]


def _origin(row: Mapping[str, Any], stages: Sequence[Stage], made: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded input, with the artefact that it is, or is in, and whether the stage that makes it still has it so."""
    maker = next((stage for stage in stages if stage.name == row["stage"]), None)
    record = read_record(maker.directory) if maker is not None else None
    if maker is None or record is None:
        return {**row, "artefact": None, "current": row["stage"] is None}
    below = row["name"].removeprefix(f"{RUN_DIR}/{maker.name}").removeprefix("/")
    place = f"{maker.name}/{record.without_links(below)}"
    artefact = next((path for path in made if place == path or place.startswith(f"{path}/")), None)
    return {**row, "artefact": artefact, "current": record.digest(Path(below)) == row["sha256"]}


def _is_same(path: Path, digest: str, digests: Digests) -> bool:
    return path.exists() and digests.of_file(path) == digest
