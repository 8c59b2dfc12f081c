"""What a stage takes in: the files, checkpoints, plugins and hub names that its recipe names, under whatever key.

A place below the pipeline's run directory is what another stage makes; the graph is built from those.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from posttrain.recipe import Recipe
from posttrain.recipe_file import is_local_path, recipe_tree, tree_paths
from rewards.resolve import ENTRY_POINTS

RUN_DIR = "{run_dir}"
PLACES = ("model_name_or_path", "path", "source")  # keys that name a model or a dataset: a local path or a hub name
OURS = ("posttrain", "rewards", "data", "eval")
NO_INPUTS = ("stage", "run_name", "output_dir", "ray_address")  # keys at the top of a recipe
LONGEST_PATH = 1024  # characters; a longer text is a prompt or the like


@dataclass(frozen=True, slots=True)
class Input:
    """One thing that a stage takes in."""

    key: str  # of the recipe, e.g. "rewards.0.func"
    name: str  # as the recipe has it; a place in the run directory is written {run_dir}/sft/checkpoints/latest
    path: Path | None  # file or directory; None: known by its name alone, as on a hub
    stage: str | None = None  # the stage of the pipeline that makes it


def find_inputs(recipe: Recipe, run_dir: Path) -> tuple[Input, ...]:
    """The inputs of a stage's resolved recipe, in the order of its keys.

    Args:
        recipe: with `{run_dir}` filled in.
        run_dir: of the pipeline.
    """
    found: list[Input] = []
    for key, text in tree_paths(recipe_tree(recipe)):
        if not isinstance(text, str) or key in NO_INPUTS:
            continue
        if len(text) <= LONGEST_PATH and "\n" not in text and "\0" not in text:
            found += _made(key, text, run_dir) or _given(key, text)
    return tuple(found)


def neutral(text: str, run_dir: Path) -> str:
    """A text with the run directory written as `{run_dir}`, so that a pipeline may be moved."""
    for home in dict.fromkeys((os.path.abspath(run_dir), str(run_dir))):
        text = re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|$)", lambda _: RUN_DIR, text)
    return text


def _made(key: str, text: str, run_dir: Path) -> list[Input]:
    """The places in the run directory that a text names: as a path, as `path.py:function`, or inside a longer text."""
    home = Path(os.path.abspath(run_dir))
    words = [_file_of(text)] if "/" in text else []
    words += re.findall(rf"{re.escape(RUN_DIR)}/[^\s:,;'\"()\[\]{{}}]+", neutral(text, run_dir))
    places = [Path(os.path.abspath(Path(word.replace(RUN_DIR, str(home))).expanduser())) for word in words]
    inside = [place.relative_to(home) for place in dict.fromkeys(places) if home in place.parents]
    return [Input(key, f"{RUN_DIR}/{place}", home / place, place.parts[0]) for place in inside]


def _given(key: str, text: str) -> list[Input]:
    """What a text names that no stage makes: nothing, or one thing."""
    last = key.rpartition(".")[2]
    path = Path(_file_of(text)).expanduser()
    if last == "func" and path.suffix != ".py":
        return _module(key, text)
    if text.startswith("package:"):
        return [Input(key, f"{text} {_version(text.removeprefix('package:'))}", None)]
    if last in PLACES:
        return [Input(key, text, path if is_local_path(text) and path.exists() else None)]
    # Other texts only where they look like a path: a word such as "eval" may also be a directory here.
    looks_like_one = "/" in text or bool(path.suffix)
    return [Input(key, text, path)] if looks_like_one and path.exists() else []


def _file_of(text: str) -> str:
    """The file of `path/to/file.py:function`; any other text as it is."""
    place, colon, _ = text.rpartition(":")
    return place if colon and place.endswith(".py") else text


def _module(key: str, spec: str) -> list[Input]:
    """The file of `module:function`, or the package that publishes a reward. This project's own are no inputs."""
    module, colon, _ = spec.rpartition(":")
    if not colon:
        published = [point for point in metadata.entry_points(group=ENTRY_POINTS) if point.name == spec]
        return [Input(key, f"{spec} {point.dist.name} {point.dist.version}", None) for point in published if point.dist]
    if module.partition(".")[0] in OURS:
        return []
    found = importlib.util.find_spec(module)
    path = Path(found.origin) if found is not None and found.origin else None
    return [Input(key, spec, path if path is not None and path.is_file() else None)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
