"""The command line that all stages share.

    python -m posttrain.<stage> recipe.yaml [key.path=value ...] [--key.path value ...] [--dry-run] [--resume]

A recipe that cannot be run is refused here with one line and exit code 2, before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from posttrain.errors import RunStopped
from posttrain.plan import describe
from posttrain.recipe import EvalSection, Recipe, RecipeError, RewardSection
from posttrain.recipe_file import check_files, load_recipe
from rewards import RewardFunction

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_stage(stage: str, run: Callable[..., int], argv: Sequence[str] | None = None) -> int:
    """Parse the command line, check the recipe and run the stage.

    Returns:
        What `run(recipe, resume=...)` returns; 2 for a recipe that cannot be run, 3 for a run that had to stop, 130 when
        it was interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        source, overrides, dry_run, resume = parse(stage, arguments)
        recipe = load_recipe(source, overrides, stage=stage)
        check_packages()
        check_files(recipe, source)
        check_rewards(recipe, source)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if dry_run:
        print(describe(recipe))
        return 0
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(recipe, resume=resume)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(stage: str, arguments: Sequence[str]) -> tuple[str, list[str], bool, bool]:
    """The recipe's path, the overrides, --dry-run, --resume.

    Raises:
        RecipeError: no recipe, two of them, or an option that does not exist.
    """
    parser = argparse.ArgumentParser(prog=f"python -m posttrain.{stage}", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("words", nargs="*", metavar="recipe.yaml | key.path=value")
    parser.add_argument("--config", help="the recipe, instead of the first word")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print the plan and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run directory")
    words, options = _split_overrides(arguments)
    try:
        known, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise RecipeError(f"command line: {error}; see --help") from None
    if unknown:
        raise RecipeError(f"command line: {unknown[0]!r} is no option; options are --config, --dry-run, --resume")
    files = [word for word in known.words if "=" not in word]
    if known.config:
        files.insert(0, known.config)
    if len(files) != 1:
        given = ", ".join(map(repr, files)) or "none"
        raise RecipeError(f"command line: give one recipe file, not {given}; a change to it is written key.path=value")
    overrides = [word for word in known.words if "=" in word] + options
    return files[0], overrides, known.dry_run, known.resume


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--a.b v` and `--a.b=v` out of the command line, as `a.b=v`."""
    words, overrides = [], []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and "." in name:
            if not equals:
                value = next(rest, "")
            overrides.append(f"{name}={value}")
        else:
            words.append(word)
    return words, overrides


def check_packages() -> None:
    """`rewards`, `data` and `eval` are common names: make sure that ours are imported.

    Raises:
        RecipeError: another package of that name comes first.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("rewards", "data", "eval"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            raise RecipeError(
                f"the package {name!r} is imported from {found} and not from {home}: rename yours, or run from a "
                f"directory without a folder of that name"
            )


def check_rewards(recipe: Recipe, source: str) -> None:
    """Resolve every reward the recipe names.

    Raises:
        RecipeError: one does not resolve, or does not take the options given.
    """
    sections: list[tuple[str, RewardSection]] = [
        (f"rewards.{index}", section) for index, section in enumerate(getattr(recipe, "rewards", ()))
    ]
    evaluation: EvalSection | None = getattr(recipe, "eval", None)
    if evaluation is not None:
        sections.append(("eval.reward", evaluation.reward))
    for key, section in sections:
        try:
            RewardFunction(section.label, section.func, section.weight, dict(section.kwargs))
        except ValueError as error:
            raise RecipeError(f"{source}: {key}.func: {error}") from None
        except Exception as error:  # a user's file may fail in any way when it is imported
            raise RecipeError(
                f"{source}: {key}.func: {section.func!r} fails to import: {type(error).__name__}: {error}; mend it"
            ) from error


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
