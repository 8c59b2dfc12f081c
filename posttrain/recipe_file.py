"""Reading and writing recipes: YAML, `extends`, `key.path=value` overrides, and errors that say the cure.

    recipe = load_recipe("recipes/tiny/grpo.yaml", ["optimizer.learning_rate=1e-4"], stage="grpo")

A recipe is one YAML mapping. `extends: other.yaml` starts from another recipe (its path is relative to this file) and
replaces what this one says. Whatever is wrong (unknown key, wrong type, out of range, missing file) raises `RecipeError`,
whose one line names the file, the key, the value and the cure.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from posttrain.quantized import require_trainable
from posttrain.recipe import RECIPES, DatasetSection, PipelineRecipe, Recipe, RecipeError, Section, StageSection
from posttrain.redaction import find_secret

# Names that users of other trainers type, and ours. Unknown keys are also matched by spelling.
OTHER_NAMES = {
    "lr": "learning_rate",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "group_size": "num_generations",
    "kl_coef": "beta",
    "clip_range": "epsilon",
    "reward_funcs": "rewards",
    "model_name": "model_name_or_path",
    "dataset_name": "path",
}

TRAINING_STAGES = ("sft", "grpo", "reward_model")
DATA_ENDINGS = (".jsonl", ".json", ".parquet")
MOST_VALUES = 100_000  # of a recipe; YAML's aliases can write more in a few lines than any memory holds
# PyYAML lets the errors of int, float and date through; deep nesting ends in a RecursionError.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, stage: str | None = None) -> Any:
    """Read, merge and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; the value is read as YAML. A list item is addressed by its index,
            as in `datasets.0.size=500`.
        stage: which recipe is expected; refused when the file says another.

    Returns:
        The recipe of that stage, e.g. `SftRecipe`; see `posttrain.recipe.RECIPES`.

    Raises:
        RecipeError: whatever is wrong, in one line.
    """
    path = Path(path)
    tree = _read_tree(path)
    for override in overrides:
        _apply_override(tree, override)
    named = tree.get("stage", stage)
    if not isinstance(named, str) or named not in RECIPES:
        hint = nearest(named, RECIPES) if isinstance(named, str) else "; add e.g. stage: sft"
        raise RecipeError(f"{path}: stage: {_shown(named)} is not a stage; allowed: {', '.join(RECIPES)}{hint}")
    if stage is not None and named != stage:
        raise RecipeError(
            f"{path}: stage: this is a recipe for {_shown(named)}; run it with python -m {module_of(named)} {path}"
        )
    _refuse_secrets(tree, path)
    if tree.get("run_name") is None:
        tree["run_name"] = path.stem
    try:
        return RECIPES[named].model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_middle_out(_explain(error, RECIPES[named]))}") from None


def stage_recipe(section: StageSection, run_dir: Path) -> Any:
    """The recipe that a pipeline's stage runs: its file, its overrides, and a folder in the pipeline's run directory.

    Raises:
        RecipeError: whatever is wrong with it, or a pipeline inside a pipeline.
    """
    recipe = load_recipe(section.recipe, stage_overrides(section, run_dir))
    if isinstance(recipe, PipelineRecipe):
        raise RecipeError(f"{section.recipe}: stage: 'pipeline' inside a pipeline; list its stages in the outer one")
    return recipe


def stage_overrides(section: StageSection, run_dir: Path) -> list[str]:
    """What a pipeline changes in a stage's recipe: its own overrides, and where the stage writes."""
    changes = [change.replace("{run_dir}", str(run_dir)) for change in section.overrides]
    return [*changes, f"run_name={section.name}", f"output_dir={run_dir / section.name}"]


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe, every default spelled out; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False)


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """A resolved recipe as plain mappings, lists and values, every default spelled out."""
    tree = _plain(recipe)
    assert isinstance(tree, dict)
    return tree


def tree_paths(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key path of a `recipe_tree`, sections and lists included, with what stands there."""
    if key:
        yield key, tree
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            yield from tree_paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for index, inner in enumerate(tree):
            yield from tree_paths(inner, f"{key}.{index}")


def module_of(stage: str) -> str:
    """What `python -m` runs for a stage."""
    return "eval" if stage == "eval" else f"posttrain.{stage}"


def is_local_path(name: str) -> bool:
    """Whether a model or dataset name means a place on disk rather than a hub name (`owner/name`)."""
    marked = name.startswith((".", "/", "~")) or name.endswith(DATA_ENDINGS)
    return marked or name.count("/") != 1 or Path(name).exists()


def check_files(recipe: Recipe, source: str | Path, *, made_in: Path | None = None) -> None:
    """Refuse a recipe whose local files are not there (hub names are not looked up).

    Args:
        recipe: to check.
        source: its file, for the message.
        made_in: a directory whose content earlier stages of a pipeline make; what lies in it is not asked for.

    Raises:
        RecipeError: a file does not exist, a checkpoint has no config.json, or one that is to be trained is FP8.
    """
    for key, value in walk(recipe):
        if not key.endswith((".model_name_or_path", ".path")) or not isinstance(value, str):
            continue
        path = Path(value).expanduser()
        if not is_local_path(value) or (made_in is not None and path.is_relative_to(made_in)):
            continue
        if not path.exists():
            raise RecipeError(
                f"{source}: {key}: {value!r} does not exist; give a path that does, or a hub name (owner/name)"
            )
        if key.endswith("model_name_or_path") and not (path / "config.json").is_file():
            raise RecipeError(
                f"{source}: {key}: {value!r} is no checkpoint in Hugging Face format: it has no config.json; give the "
                f"directory that has it, e.g. runs/<name>/checkpoints/latest"
            )
        if (
            key.endswith("model_name_or_path") and recipe.stage in TRAINING_STAGES
        ):  # loaded by transformers, all of them
            try:
                require_trainable(value, json.loads((path / "config.json").read_text()).get("quantization_config"))
            except ValueError as error:
                raise RecipeError(f"{source}: {key}: {error}") from None


def _plain(value: Any) -> Any:
    """YAML's own types. Datasets keep only what was said of them: some keys are refused beside `task` or `path`."""
    if isinstance(value, DatasetSection):
        return {name: _plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its key path."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from walk(item, f"{key}.{index}")
    else:
        yield key, value


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key said twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            # "<<" merges another mapping in and may come more than once.
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe file over that of the file it extends.

    Raises:
        RecipeError: no such file, not readable, no mapping, or files that extend each other in a circle.
    """
    tree = _read_file(path, f"{seen[-1]}: extends: " if seen else "")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: {_shown(base)} is not a path; give the path of another recipe")
    chain = (*seen, path)
    if (path.parent / base).resolve() in [file.resolve() for file in chain]:
        raise RecipeError(f"{path}: extends: {_shown(base)} leads back here in a circle; remove one extends")
    return _merge(_read_tree(path.parent / base, chain), tree)


def _read_file(path: Path, named_by: str) -> dict[str, Any]:
    """A file as it is. `named_by` says in messages who asked for it."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # a SafeLoader
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(
            f"{named_by}{path}: no such recipe file{nearest(path.name, siblings)}; give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{named_by}{path}: cannot be read ({error}); give a UTF-8 YAML file") from None
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or f"{error!s:.200}"
        raise RecipeError(f"{named_by}{path}: not readable as YAML{where}: {problem}; mend that line") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise RecipeError(
            f"{named_by}{path}: a recipe is a mapping of keys to values and this file is {found}; see docs/recipes.md"
        )
    _require_plain(tree, f"{named_by}{path}")
    return tree


def _require_plain(tree: Any, place: str) -> None:
    """Refuse a tree that is larger than any recipe (it may hold itself), and text that no file can hold."""
    waiting, count = [tree], 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise RecipeError(f"{place}: more than {MOST_VALUES:,} values, aliases written out; write a smaller recipe")
        if isinstance(value, dict):
            waiting.extend(value.keys())
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        elif isinstance(value, str) and (
            "\0" in value or (not value.isascii() and value.encode(errors="ignore").decode() != value)
        ):
            raise RecipeError(f"{place}: {value!r:.60} holds a zero or half of a surrogate pair; write it without")


def _refuse_secrets(tree: dict[str, Any], path: Path) -> None:
    found = find_secret(tree)
    if found is not None:
        key, why = found
        raise RecipeError(
            f"{path}: {key}: holds a secret ({why}), and a recipe is copied into run directory and reports; put it in an "
            f"environment variable and name that, e.g. api_key_env: MY_KEY"
        )


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Change one value of a tree in place.

    Args:
        tree: of a recipe; sections on the way that are not there are made.
        override: `key.path=value`.

    Raises:
        RecipeError: not of that form, or a path that leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {_shown(override)}: write key.path=value, e.g. optimizer.learning_rate=1e-5")
    if not text:
        raise RecipeError(f"override {_shown(override)}: there is no value; write one after =, or null for none")
    try:
        value = yaml.load(text, _StrictLoader)
    except _UNREADABLE:
        raise RecipeError(
            f"override {_shown(override)}: the value {_shown(text)} is not readable as YAML; quote it"
        ) from None
    _require_plain([override, value], f"override {_shown(override)}")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(
            f"override {_shown(override)}: {_shown('.'.join(parents))} holds a value, not keys; override it whole"
        )


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, override)]
    if not isinstance(node, dict):
        raise RecipeError(
            f"override {_shown(override)}: {_shown(name)} is below a value, not below keys; override that value whole"
        )
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list[Any], name: str, override: str) -> int:
    if not node:
        raise RecipeError(f"override {_shown(override)}: the list is empty; override it whole")
    if not name.isdecimal() or int(name) >= len(node):
        raise RecipeError(
            f"override {_shown(override)}: {_shown(name)} is no item of a list of {len(node)}; use 0 to {len(node) - 1}"
        )
    return int(name)


def _shown(value: Any) -> str:
    """A value for a message, cut to a glance."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _middle_out(message: str) -> str:
    """A message without its middle, where a key or a value is longer than anybody reads."""
    return message if len(message) <= 1500 else f"{message[:1000]} ... {message[-400:]}"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint to add to a message: the candidate spelled most like `name`; empty when none is near."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _explain(error: ValidationError, recipe_type: type[Section]) -> str:
    """The first problem of a validation error as one line: key, value, what is allowed."""
    problems = error.errors(include_url=False)
    # A key that should not be there explains better than those it leaves missing.
    first = next((p for p in problems if p["type"] in ("extra_forbidden", "invalid_key")), problems[0])
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(where, recipe_type)}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is required; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    shown = _shown(first["input"])
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{key + ': ' if key else ''}{message}{more}"  # a section's own message has the values in it
    return f"{key}: {shown} is not accepted: {message[0].lower()}{message[1:]}; change the value{more}"


def _nearest_key(where: Sequence[str], recipe_type: type[Section]) -> str:
    """A hint for an unknown key: another trainer's name, the same name in another section, or the nearest spelling."""
    *parents, last = where
    allowed = {path: path.split(".")[-1] for path in _key_paths(recipe_type)}
    prefix = ".".join(part for part in parents if not part.isdigit())
    here = {path: name for path, name in allowed.items() if ".".join(path.split(".")[:-1]) == prefix}
    wanted = OTHER_NAMES.get(last, last)
    for candidates in (here, allowed):
        exact = [path for path, name in candidates.items() if name == wanted]
        if exact:
            return f"; did you mean {exact[0]!r}?"
    for candidates in (here, allowed):
        found = difflib.get_close_matches(last, list(candidates.values()), n=1, cutoff=0.6)
        if found:
            return f"; did you mean {next(path for path, name in candidates.items() if name == found[0])!r}?"
    return f"; allowed here: {', '.join(sorted(here.values()))}"


def _key_paths(section: type[Section], prefix: str = "") -> list[str]:
    """Every key below a section, written `section.key`; items of lists have no index."""
    paths = []
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        paths.append(path)
        for inner in _sections_in(info.annotation):
            paths.extend(_key_paths(inner, f"{path}."))
    return paths


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections_in(part)]
