"""Going on with a run: from which checkpoint, and whether the recipe still means what it meant.

Each checkpoint keeps what it was made with: the resolved recipe, and a hash of every file that the recipe names. A resumed
run is compared with that, key by key. What cannot change the result (where things are written, how the work is spread over
the machine) may differ; for all else the user has to say that it is meant, with `--allow-change`. docs/resume.md lists both.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain import checkpoint
from posttrain.disk import warn
from posttrain.errors import RunStopped
from posttrain.fingerprints import Change, Snapshot, changes, neutral_recipe, quick_digest
from posttrain.recipe import RECIPES, Recipe, RecipeError
from posttrain.recipe_file import load_recipe, nearest, tree_paths
from posttrain.run_dir import RunDir
from posttrain.stage_inputs import find_inputs

if TYPE_CHECKING:
    from accelerate import PartialState

MADE_WITH = "made_with"  # in a checkpoint's progress
ROWS_PER_STEP = "rows_per_step"  # among the keys: rows of an optimizer step, all ranks together

# Keys that cannot change what a run learns, and what is below them; `*` is one name or number.
_WRITING = ("stage", "run_name", "output_dir", "report_to", "checkpoint")
_REWARD = (
    "retries",
    "max_failed_fraction",
    "max_processes",
    "max_workers",
    "max_concurrency",
    "batch_size",
    "num_workers",
)
FREE: Mapping[str, Sequence[str]] = {
    "sft": (
        *_WRITING,
        *("eval", "sampler", "training.logging_steps", "training.gradient_checkpointing"),
        # Their product with the number of ranks is ROWS_PER_STEP, which is compared.
        *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    ),
    "reward_model": (
        *_WRITING,
        *(
            "training.logging_steps",
            "training.gradient_checkpointing",
            "validation.eval_steps",
            "validation.batch_size",
        ),
        *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    ),
    "grpo": (
        *_WRITING,
        *("ray_address", "log_token_completions", "faults", "learner", "sampler", "parity", "audit.on_alarm"),
        *(f"{place}.{key}" for place in ("rewards.*", "audit.verifier") for key in (*_REWARD, "num_cpus", "num_gpus")),
        *("environment.max_concurrency", "environment.max_failed_fraction"),
    ),
}
NOT_FREE = ("sampler.dtype", "sampler.max_model_len")  # of GRPO, although what is around them is
_LENGTHS = ("max_steps", "training.max_steps", "training.num_train_epochs")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a resumed run goes on."""

    path: Path  # the checkpoint
    changed: tuple[str, ...] = ()  # keys that mean something else now, as the user has allowed

    def has_changed(self, *keys: str) -> bool:
        """Whether one of these keys, or one below them, means something else now."""
        return any(_is_below(key, place) for key in self.changed for place in keys)


def made_with(recipe: Recipe, rows_per_step: int | None = None) -> dict[str, Any]:
    """What a checkpoint keeps of the recipe and of the files that it names, JSON-able.

    Args:
        recipe: of the run.
        rows_per_step: that an optimizer step takes, where the recipe alone does not say.
    """
    rows = [
        {
            "key": found.key,
            "name": found.name,
            "stage": None,
            "sha256": quick_digest(found.path) if found.path else None,
        }
        for found in find_inputs(recipe, recipe.run_dir)
        if found.path is None or found.path.exists()
    ]
    more = {} if rows_per_step is None else {ROWS_PER_STEP: rows_per_step}
    return {MADE_WITH: {"recipe": {**neutral_recipe(recipe, recipe.run_dir), **more}, "inputs": rows}}


def made_with_on(recipe: Recipe, ranks: PartialState) -> dict[str, Any]:
    """`made_with` of a stage on a TRL trainer; nothing on ranks but the first, which alone saves and compares."""
    return made_with(recipe, rows_per_step(recipe, ranks.num_processes)) if ranks.is_main_process else {}


def start_from(
    recipe: Recipe, run_dir: RunDir, kept: Mapping[str, Any], allowed: Sequence[str], *, from_start: bool = False
) -> Start:
    """The newest sound checkpoint of the run, if its recipe means the same as this one.

    Call it before the recipe of the run directory is written anew.

    Args:
        recipe: to go on with.
        run_dir: of the run.
        kept: `made_with` of the recipe.
        allowed: keys whose change is meant, see `read_allowed`.
        from_start: step 0 counts as a checkpoint to go on from.

    Raises:
        RunStopped: there is no checkpoint, none is whole, or the recipe means something else.
        RecipeError: a key that is allowed to change does not exist.
    """
    path = checkpoint.newest_sound(run_dir.checkpoints, start=from_start)
    if path is None:
        raise RunStopped(
            f"--resume: no checkpoint in {run_dir.checkpoints}; set checkpoint.save_steps, or start without --resume"
        )
    now = Snapshot(kept[MADE_WITH]["recipe"], kept[MADE_WITH]["inputs"])
    before = _before(checkpoint.load_progress(path), recipe, run_dir, now)
    if before is None:
        warn(f"{path} does not say with which recipe it was made: make sure that it was this one")
        return Start(path)
    _require_known(allowed, before, now)
    found = [change for change in _told_apart(before, now) if not is_free(change.key, recipe)]
    refused = [change for change in found if not any(_is_below(change.key, key) for key in allowed)]
    if refused:
        keys = ",".join(dict.fromkeys(change.key for change in refused))
        raise RunStopped(
            f"--resume: the recipe means something else than when {path.name} was saved: {'; '.join(map(str, refused))}; "
            f"give the old values, or say that it is meant: --allow-change {keys}"
        )
    for change in found:
        warn(f"from {path.name} on, as allowed: {change}")
    return Start(path, tuple(change.key for change in found))


def last_checkpoint(
    recipe: Recipe, run_dir: RunDir, kept: Mapping[str, Any], allowed: Sequence[str], ranks: PartialState
) -> Path:
    """`start_from` where there are several ranks: the first looks, and the others take what it has left. Collective."""
    if ranks.is_main_process:
        start_from(recipe, run_dir, kept, allowed)
    ranks.wait_for_everyone()
    found = checkpoint.newest_trained(run_dir.checkpoints)
    assert found is not None
    return found


def rows_per_step(recipe: Any, num_processes: int) -> int:
    """Rows, or pairs, that an optimizer step of a stage on a TRL trainer takes, all ranks together."""
    training = recipe.training
    return int(training.per_device_train_batch_size * training.gradient_accumulation_steps * num_processes)


def read_allowed(texts: Iterable[str]) -> tuple[str, ...]:
    """The keys of `--allow-change a,b`.

    Raises:
        RecipeError: an empty one.
    """
    keys = tuple(key.strip() for text in texts for key in text.split(","))
    if not all(keys):
        raise RecipeError("command line: --allow-change: write keys with commas between, e.g. max_steps,rewards.0.func")
    return keys


def is_free(key: str, recipe: Recipe) -> bool:
    """Whether a key may differ when a run goes on, because it cannot change what the run learns."""
    if any(_is_below(key, place) for place in NOT_FREE) and recipe.stage == "grpo":
        return False
    if key in _LENGTHS:
        return _is_constant(recipe)
    if recipe.stage == "grpo" and _is_below(key, "eval"):
        return not getattr(recipe, "checkpoint").keep_best  # noqa: B009  # which is best depends on it
    return any(_is_below(key, place) for place in FREE[recipe.stage])


def _is_constant(recipe: Any) -> bool:
    """Whether no learning rate depends on how long the run is."""
    critic = getattr(recipe, "critic", None)
    optimizers = [recipe.optimizer, *([critic.optimizer] if critic is not None else [])]
    return all(optimizer.lr_scheduler_type == "constant" for optimizer in optimizers)


def _told_apart(before: Snapshot, now: Snapshot) -> list[Change]:
    """What differs; a model or file that lies elsewhere and is the same is no difference."""
    old, new = _contents(before), _contents(now)
    moved = {key for key in old.keys() & new.keys() if old[key] == new[key]}
    return [change for change in changes(before, now) if change.key not in moved]


def _contents(look: Snapshot) -> dict[str, tuple[str, str]]:
    """Of keys that name one file or directory and nothing else: its hash, and the function in it that is meant."""
    whole = dict(tree_paths(look.recipe))
    return {
        row["key"]: (row["sha256"], row["name"].rpartition(".py:")[2] if ".py:" in row["name"] else "")
        for row in look.inputs
        if row["sha256"] and whole.get(row["key"]) == row["name"]
    }


def _before(progress: Mapping[str, Any], recipe: Recipe, run_dir: RunDir, now: Snapshot) -> Snapshot | None:
    """What a checkpoint was made with, read as this version of the software reads it. None: it does not say."""
    found = progress.get(MADE_WITH)
    if found is None:
        file = run_dir.path / "recipe.yaml"
        if not file.exists():
            return None
        # Before checkpoints kept it themselves, the files that a recipe names were not hashed, nor the rows counted.
        tree = neutral_recipe(load_recipe(file, stage=recipe.stage), recipe.run_dir)
        return Snapshot({**{key: now.recipe[key] for key in (ROWS_PER_STEP,) if key in now.recipe}, **tree}, now.inputs)
    tree = dict(found["recipe"])
    more = {key: tree.pop(key) for key in (ROWS_PER_STEP,) if key in tree}
    with suppress(ValidationError):  # keys that are gone since are shown as they were
        # Those that have come since get their defaults.
        tree = neutral_recipe(RECIPES[recipe.stage].model_validate(tree), recipe.run_dir)
    return Snapshot({**tree, **more}, found["inputs"])


def _require_known(allowed: Sequence[str], before: Snapshot, now: Snapshot) -> None:
    known = {row["key"] for row in (*before.inputs, *now.inputs)}
    for look in (before, now):
        known |= {key for key, _ in tree_paths(look.recipe)}
    for key in allowed:
        if key not in known:
            raise RecipeError(f"--allow-change: {key!r} is no key of this recipe{nearest(key, known)}")


def _is_below(key: str, place: str) -> bool:
    """Whether a key is the one that a pattern names, or in the section that it names."""
    parts, wanted = key.split("."), place.split(".")
    same = (fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=False))
    return len(parts) >= len(wanted) and all(same)
