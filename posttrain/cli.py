"""The command line that all stages share.

    python -m posttrain.<stage> recipe.yaml [key.path=value ...] [--key.path value ...] [--dry-run] [--resume] [--preflight]

A recipe that cannot be run is refused here with one line and exit code 2, before anything heavy is imported.

Exit codes: what the stage returns (0 done, 130 ended early by a signal), 2 a recipe that cannot be run, 3 a run that had
to stop, 75 one whose learner or Ray is gone, which the same command with --resume goes on with (--max-restarts N does that by
itself). Any other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain import restarts
from posttrain.disk import is_full
from posttrain.dry_run import describe
from posttrain.environments import build_environment
from posttrain.errors import EXIT_TRY_AGAIN, RunInterrupted, RunStopped
from posttrain.flight_recorder import recording
from posttrain.interrupt import reader_has_left, sigterm_interrupts
from posttrain.layout import check_layout
from posttrain.pipeline_graph import build_graph
from posttrain.recipe import (
    DatasetSection,
    EnvironmentSection,
    EvalRecipe,
    PipelineRecipe,
    Recipe,
    RecipeError,
    RewardSection,
)
from posttrain.recipe_file import check_files, load_recipe, module_of, nearest, stage_recipe, walk
from posttrain.redaction import redact
from posttrain.resume import read_allowed
from posttrain.reward_setup import build_reward
from posttrain.threads import SHORT_SPIN

# Options beyond --dry-run that a stage takes; each becomes a keyword of its `run`.
STAGE_OPTIONS = {
    "resume": ("sft", "reward_model", "grpo", "distill", "eval"),
    "preflight": ("sft",),
    "lineage": ("pipeline",),
    "prune": ("pipeline",),
}
NAMING_OPTIONS = {  # the same for options with a value
    "only": ("pipeline",),
    "until": ("pipeline",),
    "allow-change": ("sft", "reward_model", "grpo"),
}
RESTARTS = "--max-restarts"  # no keyword of `run`: it runs the command itself, see posttrain/restarts.py
EXPLAINED = {
    "resume": "go on where the run stopped: from its newest whole checkpoint, or with the answers it lacks",
    "preflight": "load policy and data, show what would be trained, and stop",
    "lineage": "show where every artefact came from, and stop",
    "prune": "delete the directories that were put aside when their stage changed, and stop",
    "only": "run this stage and no other",
    "until": "run the stages up to this one",
    "allow-change": "with --resume: keys of the recipe, with commas between, that are meant to differ from the checkpoint's",
    "max_restarts": "go on by itself, so often, when the run is killed or its learner or Ray is gone",
}
LOOKING = ("preflight", "lineage")  # options with which a stage shows something and stops
OPTIONS = ("--config", "--dry-run", *(f"--{name}" for name in (*STAGE_OPTIONS, *NAMING_OPTIONS)), RESTARTS, "--help")
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_stage(
    stage: str,
    run: Callable[..., int | None],
    argv: Sequence[str] | None = None,
    *,
    plan: Callable[[Recipe], str] = describe,
) -> int:
    """Parse the command line, check the recipe and run the stage.

    Args:
        plan: the text of --dry-run.

    Returns:
        What `run(recipe, **options)` returns (None is 0); 2 for a recipe that cannot be run, 3 for a run that had to
        stop, 130 when it was interrupted. Where what is only looked at is piped to a program that ends early, such as
        head, 0.
    """
    code = 0
    try:
        try:
            with restarts.running():
                code = _run_stage(stage, run, sys.argv[1:] if argv is None else list(argv), plan)
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here and not while the interpreter ends, where nothing could be caught
    except BrokenPipeError:
        if not reader_has_left():
            raise
    return code


def _run_stage(
    stage: str, run: Callable[..., int | None], arguments: Sequence[str], plan: Callable[[Recipe], str]
) -> int:
    try:
        arguments, max_restarts = _take_restarts(stage, arguments)
        source, overrides, dry_run, options = parse(stage, arguments)
        recipe = load_recipe(source, overrides, stage=stage)
        check_recipe(recipe, source)
        text = plan(recipe) if dry_run else ""
    except RecipeError as error:
        return _end("error", error, 2)
    if dry_run:
        print(text)
        return 0
    for name, value in {**QUIET, **SHORT_SPIN}.items():  # before torch is imported
        os.environ.setdefault(name, value)
    _warn_of_remote_code(recipe)
    try:
        if max_restarts is not None:
            return restarts.run(recipe, arguments, max_restarts)
        # A pipeline has nothing of its own to record, and an upcycled policy's directory is a checkpoint's.
        kept = recording(stage, recipe.run_dir) if stage not in ("pipeline", "upcycle") else nullcontext()
        with sigterm_interrupts(), kept:
            code = run(recipe, **options) or 0
            sys.stdout.flush()
            return code
    except RecipeError as error:
        return _end("error", error, 2)
    except RunInterrupted as error:
        return _end("stopped", error, EXIT_TRY_AGAIN)
    except RunStopped as error:
        return _end("stopped", error, 3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if any(options.get(name) for name in LOOKING) or not reader_has_left():
            raise
        goes_on = "--resume goes on" if "resume" in options else "the same command goes on or begins again"
        return _end("stopped", RunStopped(f"the program that read the output has ended; {goes_on}"), 3)
    except OSError as error:
        if not is_full(error):
            raise
        return _end("stopped", RunStopped(f"the disk is full ({error}): make room, and go on with --resume"), 3)


def _warn_of_remote_code(recipe: Recipe) -> None:
    """Say it loudly where a checkpoint's own code may run: it runs as this user, with what this user may do."""
    for key, value in walk(recipe):
        if key.rpartition(".")[2] == "trust_remote_code" and value:
            where = f"{key.rpartition('.')[0]}.model_name_or_path"
            name = next((text for other, text in walk(recipe) if other == where), "the checkpoint")
            print(
                f"WARNING: {key} is true: Python code that comes with {name} will run as you, on every node, with your files "
                f"and keys; read it first",
                file=sys.stderr,
            )


def _end(word: str, error: Exception, code: int) -> int:
    print(f"{word}: {redact(' '.join(str(error).splitlines()))}", file=sys.stderr)
    return code


# --- the command line -------------------------------------------------------------------------------------------------


def parse(stage: str, arguments: Sequence[str]) -> tuple[str, list[str], bool, dict[str, Any]]:
    """The recipe's path, the overrides in their order, --dry-run, and the stage's own options.

    Raises:
        RecipeError: no recipe, two of them, or an option that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module_of(stage)}",
        usage="%(prog)s recipe.yaml [key.path=value ...] [--key.path value ...] [options]",
        description="key.path=value changes the recipe, e.g. optimizer.learning_rate=1e-5 datasets.0.size=500",
        epilog="docs/recipes.md lists the keys",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("recipe", nargs="?", help="the recipe, a YAML file")
    parser.add_argument("--config", metavar="FILE", help="the recipe, instead of the first word")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print the plan and stop")
    taken = [name for name, stages in STAGE_OPTIONS.items() if stage in stages]
    for name in taken:
        parser.add_argument(f"--{name}", action="store_true", help=EXPLAINED[name])
    named = [name for name, stages in NAMING_OPTIONS.items() if stage in stages]
    for name in named:
        parser.add_argument(f"--{name}", metavar="NAME", help=EXPLAINED[name])
    if stage in STAGE_OPTIONS["resume"]:
        parser.add_argument(RESTARTS, metavar="N", help=EXPLAINED["max_restarts"])
    words, overrides = _split_overrides(stage, arguments)
    try:
        known, extra = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise RecipeError(f"command line: {error}; see --help") from None
    files = [*filter(None, (known.config, known.recipe)), *extra]
    if len(files) != 1:
        given = ", ".join(map(repr, files)) or "none"
        raise RecipeError(f"command line: give one recipe file, not {given}; a change to it is written key.path=value")
    options = {name: getattr(known, name.replace("-", "_")) for name in (*taken, *named)}
    allowed = options.pop("allow-change", None)
    if allowed is not None:
        if not options["resume"]:
            raise RecipeError("command line: --allow-change has no meaning without --resume; add it, or leave it out")
        options["allow_change"] = read_allowed([allowed])
    return files[0], overrides, known.dry_run, options


def _take_restarts(stage: str, arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The command line without --max-restarts, and its value; None where it is not given.

    Raises:
        RecipeError: it is no number, or the stage cannot be resumed.
    """
    kept: list[str] = []
    found: str | None = None
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != RESTARTS:
            kept.append(word)
            continue
        _require_option(stage, RESTARTS)
        found = value if equals else next(iter(_next(rest)), "")
    if found is not None and not found.isdecimal():
        raise RecipeError(f"command line: {RESTARTS} {found}: how often? give a number, e.g. {RESTARTS} 3")
    return kept, None if found is None else int(found)


def _split_overrides(stage: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `a.b=v`, `--a.b=v` and `--a.b v` out of the command line, as `a.b=v`."""
    words: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--config":
            words.extend((word, *_next(rest)))
        elif word.startswith("--") and name in NAMING_OPTIONS and stage in NAMING_OPTIONS[name]:
            words.extend((word,) if equals else (word, *_next(rest)))
        elif word in ("--dry-run", "-h", "--help") or word.startswith("--config="):
            words.append(word)
        elif word.removeprefix("--") in STAGE_OPTIONS and word.startswith("--"):
            _require_option(stage, word)
            words.append(word)
        elif word.startswith("-"):
            if not equals:
                value = next(iter(_next(rest)), "")
            if not word.startswith("--") or not name or (not equals and (not value or value.startswith("--"))):
                hint = nearest(word, OPTIONS) or f"; options are {', '.join(OPTIONS)}"
                raise RecipeError(f"command line: {word!r} is no option and has no value{hint}; see --help")
            overrides.append(f"{name}={value}")
        elif equals:
            overrides.append(word)
        else:
            words.append(word)
    return words, overrides


def _require_option(stage: str, option: str) -> None:
    if stage in STAGE_OPTIONS["resume" if option == RESTARTS else option.removeprefix("--")]:
        return
    why = f"has no {option}"
    if option in ("--resume", RESTARTS):
        why = "goes on by itself where it stopped" if stage == "pipeline" else "has nothing to go on from"
    raise RecipeError(f"command line: {option!r}: {stage} {why}; leave {option} out")


def _next(words: Iterator[str]) -> list[str]:
    """The next word as a list; empty when there is none."""
    return [word for word in (next(words, None),) if word is not None]


# --- what only looking around can tell --------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, source: str | Path, *, made_in: Path | None = None) -> None:
    """Check what the recipe names: files, tasks, rewards and, of a pipeline, its graph and all that for its stages.

    Args:
        recipe: to check.
        source: its file, for the message.
        made_in: the run directory of the pipeline that this is a stage of; earlier stages write there.

    Raises:
        RecipeError: something is not there, or is not what it is used as.
    """
    check_files(recipe, source, made_in=made_in)
    check_tasks(recipe, source)
    check_rewards(recipe, source)
    check_benchmarks(recipe, source)
    check_trackers(recipe, source)
    check_devices(recipe, source)
    if not isinstance(recipe, PipelineRecipe):
        return
    for index, section in enumerate(recipe.stages):
        try:
            check_recipe(stage_recipe(section, recipe.run_dir), section.recipe, made_in=recipe.run_dir)
        except RecipeError as error:
            raise RecipeError(f"{source}: stages.{index} ({section.name}): {error}") from None
    try:
        build_graph(recipe)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def check_devices(recipe: Recipe, source: str | Path) -> None:
    """Check that the policy can be spread over the devices of a sampler, and its experts and rows over ranks of the learner.

    Raises:
        RecipeError: something of it does not divide by them.
    """
    sampler = getattr(recipe, "sampler", None)
    model = getattr(recipe, "model", None) or getattr(getattr(recipe, "teacher", None), "model", None)
    if model is None:
        return
    try:
        check_layout(model, sampler, getattr(recipe, "learner", None))
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def check_tasks(recipe: Recipe, source: str | Path) -> None:
    """Check that every generated task, each of its levels, and every adapter exists.

    Raises:
        RecipeError: there is no such task or level.
    """
    from data.tasks import get_task, task_names

    lists: dict[str, tuple[DatasetSection, ...]] = {"datasets": getattr(recipe, "datasets", ())}
    for name in ("eval", "validation"):
        section = getattr(recipe, name, None)
        if section is not None and section.datasets is not None:
            lists[f"{name}.datasets"] = section.datasets
    cleaning = getattr(getattr(recipe, "selection", None), "decontamination", None)
    if cleaning is not None:
        lists["selection.decontamination.datasets"] = cleaning.datasets
    for key, sections in lists.items():
        for index, section in enumerate(sections):
            if section.task is None:
                if section.adapter is not None:
                    _check_adapter(recipe, section.adapter, f"{source}: {key}.{index}.adapter")
                continue
            if section.task not in task_names():
                hint = nearest(section.task, task_names()) or f"; tasks are {', '.join(task_names())}"
                raise RecipeError(f"{source}: {key}.{index}.task: {section.task!r} is no task{hint}")
            known = get_task(section.task).levels
            wrong = [level for level in section.levels if level not in known]
            if wrong:
                raise RecipeError(
                    f"{source}: {key}.{index}.levels: {section.task} has no level {wrong[0]}; "
                    f"use some of {', '.join(map(str, known))}"
                )


def _check_adapter(recipe: Recipe, adapter: str, place: str) -> None:
    from data.adapters import resolve_adapter

    try:
        resolve_adapter(adapter, "pairs" if recipe.stage == "reward_model" else "records")
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from None


def check_benchmarks(recipe: Recipe, source: str | Path) -> None:
    """Check that every benchmark exists and that what grades it is there; their data are looked at when the stage starts.

    Raises:
        RecipeError: there is no such benchmark, or it lacks a judge, the sandbox or a package.
    """
    if not isinstance(recipe, EvalRecipe) or not recipe.eval.benchmarks:
        return
    from eval.benchmarks import get_benchmark
    from eval.benchmarks.loading import check
    from eval.likelihood import check_likelihood

    for index, section in enumerate(recipe.eval.benchmarks):
        try:
            benchmark = get_benchmark(section.name)
            if section.method == "lm_eval":
                check_likelihood(section, recipe.eval)
            else:
                check(
                    benchmark,
                    section.path,
                    has_judge=recipe.eval.judge is not None,
                    sandbox=recipe.eval.sandbox,
                    languages=section.languages,
                )
        except ValueError as error:
            raise RecipeError(f"{source}: eval.benchmarks.{index}: {error}") from error


def check_trackers(recipe: Recipe, source: str | Path) -> None:
    """Look for the packages of `report_to`, before a run waits for its engines to find that one is missing.

    Raises:
        RecipeError: one is not installed.
    """
    for name in getattr(recipe, "report_to", ()):
        if find_spec(name) is None:
            raise RecipeError(
                f"{source}: report_to: the package {name} is not installed; pip install {name}, or leave it out"
            )


def check_rewards(recipe: Recipe, source: str | Path) -> None:
    """Resolve every reward and environment the recipe names.

    Raises:
        RecipeError: one does not resolve, or does not take the options given.
    """
    sections: list[tuple[str, RewardSection | EnvironmentSection]] = [
        (f"rewards.{index}", section) for index, section in enumerate(getattr(recipe, "rewards", ()))
    ]
    evaluation, audit = getattr(recipe, "eval", None), getattr(recipe, "audit", None)
    environment = getattr(recipe, "environment", None)
    if environment is not None:
        sections.append(("environment", environment))
    if evaluation is not None and evaluation.environment is not None:
        sections.append(("eval.environment", evaluation.environment))
    elif evaluation is not None and environment is None:
        sections.append(("eval.reward", evaluation.reward))
    if audit is not None:
        sections.append(("audit.verifier", audit.verifier))
    for key, section in sections:
        try:
            if isinstance(section, EnvironmentSection):
                build_environment(section)
            else:
                build_reward(section)
        except ValueError as error:
            raise RecipeError(f"{source}: {key}.func: {error}") from error
        except Exception as error:  # a user's file may fail in any way when it is imported
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RecipeError(
                f"{source}: {key}.func: {section.func!r} fails to import: {type(error).__name__}: {error} "
                f"({frame.filename}, line {frame.lineno}); mend it"
            ) from error
