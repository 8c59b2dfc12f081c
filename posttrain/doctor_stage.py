"""What the doctor says of a recipe: is it right, are its files and keys there, do disk and memory suffice?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from posttrain.cli import check_recipe
from posttrain.doctor_machine import GIB, Finding, gpus, memory
from posttrain.planning.shapes import model_parameters
from posttrain.recipe import (
    DistillRecipe,
    EvalRecipe,
    GrpoRecipe,
    ModelSection,
    PipelineRecipe,
    Recipe,
    RecipeError,
    SamplerSection,
)
from posttrain.recipe_file import is_local_path, load_recipe, recipe_tree, stage_recipe, tree_paths

RUNTIME = int(1.5 * GIB)  # of a process that has torch, transformers and Ray
TRAINED = 16  # bytes a parameter: float32 weights, gradient and AdamW's two moments
SAVED = 12  # bytes a parameter: float32 weights and the moments


def read(path: str, overrides: Sequence[str]) -> tuple[Recipe | None, list[Finding]]:
    """The recipe, and what is found on reading it; None where it cannot be read or cannot be run."""
    try:
        recipe: Recipe = load_recipe(path, overrides)
        check_recipe(recipe, path)
    except RecipeError as error:
        return None, [Finding("fail", "recipe", " ".join(str(error).splitlines()))]
    return recipe, [Finding("ok", "recipe", f"{path}: a recipe for {recipe.stage}; its files and rewards are there")]


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Keys, code from elsewhere, disk and memory; of a pipeline, of each stage.

    Args:
        recipe: that was read and can be run.
    """
    if isinstance(recipe, PipelineRecipe):
        for section in recipe.stages:
            for finding in examine(stage_recipe(section, recipe.run_dir)):
                yield Finding(finding.level, finding.name, f"{section.name}: {finding.text}", finding.cure)
        return
    yield from _keys(recipe)
    yield from _remote_code(recipe)
    model = _model(recipe)
    try:
        count = model_parameters(model) if model else None
    except RecipeError as error:
        yield Finding("fail", "checkpoint", str(error))
        return
    if model is None:
        return
    if count is None:
        if is_local_path(str(model.model_name_or_path)):
            yield Finding("ok", "plan", f"its size is known once {model.model_name_or_path} has been made")
        else:
            cure = "huggingface-cli download it, or trust that there is room"
            yield Finding("warn", "plan", f"size unknown: {model.model_name_or_path} is not on this machine", cure)
        return
    yield from _disk(recipe, count)
    yield _memory(recipe, model, count)


def _keys(recipe: Recipe) -> Iterator[Finding]:
    """Are the environment variables set that hold the keys of endpoints? Their values are not looked at."""
    tree = recipe_tree(recipe)
    names = {value for key, value in tree_paths(tree) if key.endswith("api_key_env") and isinstance(value, str)}
    for name in sorted(names):
        if os.environ.get(name):
            yield Finding("ok", "api key", f"{name} is set")
        else:
            yield Finding("fail", "api key", f"the environment variable {name} is not set", "export it")


def _remote_code(recipe: Recipe) -> Iterator[Finding]:
    model = _model(recipe)
    if model is not None and model.trust_remote_code:
        text = f"trust_remote_code is on: code in {model.model_name_or_path} will run as you"
        yield Finding("warn", "remote code", text, "read that code, or leave the key out")


def _model(recipe: Recipe) -> ModelSection | None:
    """The policy, or the teacher that is loaded; None where nothing is."""
    if isinstance(recipe, DistillRecipe):
        return recipe.teacher.model
    found: ModelSection | None = getattr(recipe, "model", None)
    return found


def _trains(recipe: Recipe) -> bool:
    return not isinstance(recipe, DistillRecipe | EvalRecipe)


def _disk(recipe: Recipe, count: int) -> Iterator[Finding]:
    section = getattr(recipe, "checkpoint", None)
    if section is None:
        return
    # One more than are kept is there while it is written, and step 0 stays.
    need = count * SAVED * (section.save_total_limit + 2)
    place = next(
        parent for parent in (recipe.run_dir.absolute(), *recipe.run_dir.absolute().parents) if parent.exists()
    )
    free = shutil.disk_usage(place).free
    text = (
        f"{section.save_total_limit} checkpoints and the one being written take {_size(need)}, {_size(free)} are free"
    )
    if need > free:
        yield Finding("fail", "disk", text, "free some, lower checkpoint.save_total_limit, or give another output_dir")
    else:
        yield Finding("ok", "disk", text)


def _memory(recipe: Recipe, model: ModelSection, count: int) -> Finding:
    """Learners, samplers and Ray beside each other on this machine; or a learner on a GPU."""
    sampler: SamplerSection | None = getattr(recipe, "sampler", None)
    bytes_of_weight = 2 if model.dtype == "bfloat16" else 4
    cards = gpus()
    learners, shares = 1, 1
    if isinstance(recipe, GrpoRecipe):
        learners = recipe.learner.num_workers
        shares = learners if recipe.learner.parallel == "fsdp" else 1
        per_parameter = 4 if recipe.lora else TRAINED
        frozen = 4 if recipe.algorithm.beta and not recipe.lora else 0
    else:
        per_parameter, frozen = (TRAINED if _trains(recipe) else 0), 0
    learner = count * (per_parameter + frozen) // shares
    if cards:
        have = int(cards[0][1].split()[0]) * 2**20
        text = f"a learner takes {_size(learner)} and activations; a GPU has {_size(have)}"
        cure = "learner.parallel: fsdp, more learner.num_workers, lora, or a smaller model"
        return Finding("fail" if learner > have else "ok", "memory plan", text, cure if learner > have else "")
    need = learners * (learner + RUNTIME) if _trains(recipe) else RUNTIME
    if sampler is not None and (
        isinstance(recipe, GrpoRecipe | DistillRecipe | EvalRecipe) or getattr(recipe, "eval", None)
    ):
        cache = int(sampler.kv_cache_gib * GIB)
        need += sampler.num_workers * (count * bytes_of_weight + cache + RUNTIME)
    total, free = memory()
    text = f"about {_size(need)} and activations; the machine has {_size(total)}, {_size(free)} of them free"
    cure = "fewer workers, a smaller sampler.kv_cache_gib, lora, or a smaller model"
    if need > total:
        return Finding("fail", "memory plan", text, cure)
    if need > free:
        return Finding("warn", "memory plan", text, f"end other programs; or {cure}")
    return Finding("ok", "memory plan", text)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
