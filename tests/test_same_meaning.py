"""A run goes on with the recipe that it was started with, or with changes that are free or meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import checkpoint
from posttrain.cli import parse
from posttrain.errors import RunStopped
from posttrain.recipe import GrpoRecipe, Recipe, RecipeError, SftRecipe
from posttrain.recipe_file import dump_recipe
from posttrain.resume import MADE_WITH, Start, made_with, read_allowed, start_from
from posttrain.run_dir import RunDir


def grpo(home: Path, **changes: Any) -> GrpoRecipe:
    tree: dict[str, Any] = {
        "run_name": "run",
        "output_dir": str(home / "run"),
        "max_steps": 10,
        "model": {"model_name_or_path": str(home / "model")},
        "datasets": [{"task": "letter_counting", "levels": [1], "size": 20}],
        "rewards": [{"func": f"{home}/reward.py:score"}],
        **changes,
    }
    return GrpoRecipe.model_validate(tree)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A model, a reward, and a run with a checkpoint."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "reward.py").write_text("def score(completion, answer, **metadata):\n    return 0.0\n")
    save(grpo(tmp_path))
    return tmp_path


def save(recipe: Recipe, **more: Any) -> None:
    checkpoint.save(recipe.run_dir / "checkpoints", 3, lambda path: None, made_with(recipe, **more), keep=2)


def go_on(recipe: Recipe, *allowed: str, **more: Any) -> Start:
    return start_from(recipe, RunDir(recipe.run_dir), made_with(recipe, **more), allowed)


def test_the_same_recipe_goes_on(home: Path) -> None:
    start = go_on(grpo(home))
    assert (start.path.name, start.changed) == ("step-3", ())


FREE = [
    {"max_steps": 12},
    {"max_steps": 4},
    {"report_to": ["tensorboard"]},
    {"checkpoint": {"save_steps": 3, "save_total_limit": 7}},
    {"sampler": {"num_workers": 2, "max_num_seqs": 64}},
    {"learner": {"num_workers": 2, "max_tokens_per_microbatch": 512}},
    {"eval": {"datasets": [{"task": "letter_counting", "levels": [1], "size": 5}]}},
    {"faults": {"skip_publication": 2}},
    {"parity": {"max_logprob_gap": 1e-3}},
]


@pytest.mark.parametrize("changes", FREE, ids=[next(iter(changes)) for changes in FREE])
def test_what_cannot_change_the_result_may_change(home: Path, changes: dict[str, Any]) -> None:
    assert go_on(grpo(home, **changes)).changed == ()


CHANGED = [
    ({"optimizer": {"learning_rate": 2e-6}}, "optimizer.learning_rate 1e-06 -> 2e-06"),
    ({"rollout": {"temperature": 0.9}}, "rollout.temperature 1.0 -> 0.9"),
    ({"rollout": {"max_lag": 1}, "algorithm": {"importance": "mask"}}, "rollout.max_lag 0 -> 1; algorithm.importance"),
    ({"sampler": {"dtype": "bfloat16"}}, 'sampler.dtype null -> "bfloat16"'),
    ({"seed": 1}, "seed 0 -> 1"),
    ({"datasets": [{"task": "letter_counting", "levels": [1], "size": 21}]}, "datasets.0.size 20 -> 21"),
    ({"optimizer": {"lr_scheduler_type": "linear"}, "max_steps": 12}, "max_steps 10 -> 12"),
]


@pytest.mark.parametrize(("changes", "words"), CHANGED, ids=[words for _, words in CHANGED])
def test_another_meaning_is_refused_with_both_values_unless_it_is_meant(
    home: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = grpo(home, **changes)
    with pytest.raises(RunStopped) as refused:
        go_on(recipe)
    assert words in str(refused.value)
    _, _, keys = str(refused.value).partition("--allow-change ")
    start = go_on(recipe, *read_allowed([keys]))
    assert set(start.changed) == set(keys.split(",")) and words.split(";")[0] in capsys.readouterr().err
    # The next checkpoint is made with the new recipe, and asks no more; the old recipe is the change then.
    save(recipe)
    assert go_on(recipe, *read_allowed([keys])).changed == ()
    with pytest.raises(RunStopped, match="means something else"):
        go_on(grpo(home))


def test_a_section_may_be_allowed_as_a_whole_and_a_misspelt_key_is_refused(home: Path) -> None:
    recipe = grpo(home, optimizer={"learning_rate": 2e-6, "weight_decay": 0.1})
    with pytest.raises(RunStopped, match="optimizer.weight_decay"):
        go_on(recipe, "optimizer.learning_rate")
    assert go_on(recipe, "optimizer").has_changed("optimizer.weight_decay")
    with pytest.raises(RecipeError, match="no key of this recipe; did you mean 'optimizer.learning_rate'"):
        go_on(recipe, "optimizer.learning_rat")
    with pytest.raises(RecipeError, match="write keys with commas"):
        read_allowed(["a,,b"])


def test_the_files_that_a_recipe_names_are_part_of_its_meaning(home: Path) -> None:
    (home / "model").rename(home / "moved")
    moved = grpo(home, model={"model_name_or_path": str(home / "moved")})
    assert go_on(moved).changed == ()  # the same model at another place
    (home / "moved" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(RunStopped, match="model.model_name_or_path"):
        go_on(moved)
    (home / "moved" / "model.safetensors").write_bytes(b"weights")
    (home / "reward.py").rename(home / "judge.py")
    judged = {"model": moved.model, "rewards": [{"func": f"{home}/judge.py:score"}]}
    assert go_on(grpo(home, **judged)).changed == ()
    judged["rewards"] = [{"func": f"{home}/judge.py:other"}]
    with pytest.raises(RunStopped, match="rewards.0.func"):
        go_on(grpo(home, **judged))
    (home / "reward.py").write_text("def score(completion, answer, **metadata):\n    return 1.0\n")
    with pytest.raises(RunStopped, match=r"input .*reward.py:score \(rewards.0.func\) changed"):
        go_on(moved)
    assert go_on(moved, "rewards").changed == ("rewards.0.func",)


def test_keys_that_a_later_version_brings_have_their_defaults(home: Path) -> None:
    progress = home / "run" / "checkpoints" / "step-3" / "progress.json"
    tree = json.loads(progress.read_text())
    del tree[MADE_WITH]["recipe"]["optimizer"]["max_skipped_steps"]
    tree.pop("has_manifest")
    progress.write_text(json.dumps(tree))
    (progress.parent / "manifest.json").unlink()
    assert go_on(grpo(home)).changed == ()
    with pytest.raises(RunStopped, match="optimizer.max_skipped_steps 3 -> 4"):
        go_on(grpo(home, optimizer={"max_skipped_steps": 4}))


def test_an_old_checkpoint_is_compared_with_the_recipe_of_its_run(home: Path) -> None:
    checkpoint.save(home / "run" / "checkpoints", 4, lambda path: None, {}, keep=2)
    assert go_on(grpo(home, seed=1)).changed == ()  # nothing says what it was made with
    RunDir(home / "run").write_recipe(dump_recipe(grpo(home)))
    assert go_on(grpo(home)).changed == ()
    with pytest.raises(RunStopped, match="seed 0 -> 1"):
        go_on(grpo(home, seed=1))


def sft(home: Path, size: int, accumulated: int) -> SftRecipe:
    training = {"max_steps": 10, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    tree = {
        "run_name": "sft",
        "output_dir": str(home / "sft"),
        "model": {"model_name_or_path": str(home / "model")},
        "datasets": [{"task": "letter_counting", "levels": [1], "size": 20}],
        "training": training,
    }
    return SftRecipe.model_validate(tree)


def test_rows_may_be_spread_over_ranks_in_another_way_if_a_step_takes_as_many(home: Path) -> None:
    save(sft(home, 4, 2), rows_per_step=16)  # two ranks
    assert go_on(sft(home, 8, 2), rows_per_step=16).changed == ()
    with pytest.raises(RunStopped, match="rows_per_step 16 -> 8"):
        go_on(sft(home, 4, 2), rows_per_step=8)


def test_a_run_without_checkpoints_says_so(home: Path) -> None:
    with pytest.raises(RunStopped, match="--resume: no checkpoint in"):
        go_on(grpo(home, output_dir=str(home / "new")))


def test_the_command_line_takes_the_keys_with_resume_only() -> None:
    words = ["r.yaml", "--resume", "--allow-change", "max_steps,rewards", "seed=1"]
    expected = ("r.yaml", ["seed=1"], False, {"resume": True, "allow_change": ("max_steps", "rewards")})
    assert parse("grpo", words) == expected
    assert parse("sft", ["r.yaml", "--resume", "--allow-change=seed"])[3]["allow_change"] == ("seed",)
    with pytest.raises(RecipeError, match="--allow-change has no meaning without --resume"):
        parse("reward_model", ["r.yaml", "--allow-change", "seed"])
