"""Recipes: what is refused, how it is said, and that what is shipped is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import run_stage
from posttrain.recipe import GrpoRecipe, Recipe, RecipeError, SftRecipe
from posttrain.recipe_file import dump_recipe, load_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("recipes/**/*.yaml"))

GOOD = """
stage: grpo
max_steps: 3
model: {model_name_or_path: owner/name}
datasets: [{task: chain_sum, size: 10}]
rewards: [{func: "rewards.task_answer:score"}]
"""


def stage_must_not_run(recipe: Recipe, *, resume: bool) -> int:
    raise AssertionError("a malformed recipe reached the stage")


# override, key that must be named, words of the cure
MALFORMED_OVERRIDES = [
    ("learning_rate=1e-5", "learning_rate", "did you mean 'optimizer.learning_rate'"),
    ("optimizer.learning_rte=1e-5", "optimizer.learning_rte", "did you mean 'optimizer.learning_rate'"),
    ("optimizer.lr=1e-5", "optimizer.lr", "did you mean 'optimizer.learning_rate'"),
    ("model.torch_dtype=float32", "model.torch_dtype", "did you mean 'model.dtype'"),
    ("rollout.max_new_tokens=8", "rollout.max_new_tokens", "did you mean 'rollout.max_completion_length'"),
    ("rollout.num_generations=1", "rollout.num_generations", "greater than or equal to 2"),
    ("rollout.temperature=0", "rollout.temperature", "greater than 0"),
    ("rollout.top_p=1.5", "rollout.top_p", "less than or equal to 1"),
    ("seed=abc", "seed", "valid integer"),
    ("seed=-1", "seed", "greater than or equal to 0"),
    ("max_steps=ten", "max_steps", "valid integer"),
    ("max_steps=true", "max_steps", "number is needed"),
    ("max_steps=1.5", "max_steps", "valid integer"),
    ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "finite number"),
    ("optimizer.learning_rate=[1]", "optimizer.learning_rate", "valid number"),
    ("model.dtype=float8", "model.dtype", "'float32' or 'bfloat16'"),
    ("model.model_name_or_path=null", "model", "exactly one of model_name_or_path"),
    ("model.model_name_or_path=./no/such/checkpoint", "model.model_name_or_path", "give a path that does"),
    ("datasets.0.path=some.jsonl", "datasets.0", "exactly one of task"),
    ("datasets.0={path: missing.jsonl}", "datasets.0.path", "give a path that does"),
    ("datasets.0={task: chain_sum}", "datasets.0", "needs size"),
    ("datasets.0={path: a/b, levels: [2]}", "datasets.0", "remove it"),
    ("datasets=[]", "datasets", "at least 1 item"),
    ("datasets.3.size=1", "datasets.3.size", "use 0 to 0"),
    ("rewards.0.func=rewards.nothing:score", "rewards.0.func", "no module"),
    ("rewards.0.func=rewards.task_answer:scoer", "rewards.0.func", "did you mean 'score'"),
    ("rewards.0.func=no_such_file.py:score", "rewards.0.func", "does not exist"),
    ("rewards.0.func=score", "rewards.0.func", "module:function"),
    ("rewards.0.kwargs={wrong: 1}", "rewards.0.func", "no option 'wrong'"),
    ("algorithm.num_minibatches=7", "algorithm.num_minibatches", "choose a divisor of 512"),
    ("rollout.max_completion_length=4096", "rollout.max_completion_length", "raise sampler.max_model_len"),
    ("learner.row_length=99999", "learner", "raise max_tokens_per_microbatch"),
    ("learner.row_length=64", "learner.row_length", "raise learner.row_length"),
    ("parity.canary_length=256", "parity.canary_length", "lower parity.canary_length"),
    ("stage=grop", "stage", "did you mean 'grpo'"),
    ("nonsense", "nonsense", "written key.path=value"),
    ("seed.inner=1", "seed", "valid integer"),
    ("seed=[1", "seed", "quote it"),
    ("model={build: {n_routed_experts: 8, n_group: 3}}", "model.build", "set n_group to a divisor"),
    ("model={build: {num_experts_per_tok: 6}}", "model.build", "lower num_experts_per_tok"),
]

# file content, words that must be in the message
MALFORMED_FILES = [
    ("stage: grpo\n  max_steps: [", "not readable as YAML at line 2"),
    ("- a\n- b\n", "mapping of keys to values"),
    ("", "mapping of keys to values"),
    ("stage: grpo\n", "required"),
    ("stage: sft\n", "python -m posttrain.sft"),
    ("extends: other.yaml\n", "no such recipe file"),
    ("extends: recipe.yaml\n", "circle"),
    ("extends: 3\n", "not a path"),
]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert run_stage("grpo", stage_must_not_run, arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize(("override", "key", "cure"), MALFORMED_OVERRIDES)
def test_a_wrong_value_is_refused_in_one_line(
    override: str, key: str, cure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    line = refusal(capsys, str(file), override)
    assert key in line and cure in line
    assert str(file) in line or override in line


@pytest.mark.parametrize(("content", "words"), MALFORMED_FILES)
def test_a_wrong_file_is_refused_in_one_line(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    line = refusal(capsys, str(file))
    assert words in line and str(tmp_path) in line


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert "did you mean 'recipe.yaml'" in refusal(capsys, str(tmp_path / "recpie.yaml"))


@pytest.mark.parametrize("arguments", [(), ("a.yaml", "b.yaml"), ("a.yaml", "--fast")])
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "command line" in refusal(capsys, *arguments)


def test_a_refusal_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, posttrain.grpo as stage; code = stage.main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'vllm', 'ray', 'trl', 'datasets', 'scipy'} & set(sys.modules); "
        "print(sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "recipes/tiny/grpo.yaml", "learning_rate=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert "Traceback" not in done.stderr and "optimizer.learning_rate" in done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(ROOT)) for path in SHIPPED])
def test_shipped_recipes_load_and_survive_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_recipes_cannot_be_changed() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny/grpo.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.optimizer.learning_rate = 1.0


def test_overrides_reach_lists_and_new_sections_and_read_numbers(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    recipe = load_recipe(file, ["datasets.0.size=77", "optimizer.learning_rate=2e-5", "router.bias_update_speed=0.5"])
    assert isinstance(recipe, GrpoRecipe)
    assert (recipe.datasets[0].size, recipe.optimizer.learning_rate, recipe.router.bias_update_speed) == (77, 2e-5, 0.5)


def test_extends_replaces_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(GOOD)
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmax_steps: 9\nmodel: {dtype: bfloat16}\n")
    recipe = load_recipe(tmp_path / "child.yaml")
    assert (recipe.max_steps, recipe.model.dtype, recipe.model.model_name_or_path) == (9, "bfloat16", "owner/name")


def test_options_may_be_written_as_flags(tmp_path: Path) -> None:
    from posttrain.cli import parse

    words = ["--config", "r.yaml", "--optimizer.learning_rate", "1e-5", "--seed.x=3", "max_steps=2", "--resume"]
    assert parse("grpo", words) == ("r.yaml", ["optimizer.learning_rate=1e-5", "seed.x=3", "max_steps=2"], False, True)


def test_dry_run_spells_out_the_batch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    assert run_stage("grpo", stage_must_not_run, [str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "32 prompts x 16 generations = 512 completions per step" in text
    assert "4 minibatches of 128 completions -> 4 optimizer steps" in text


def test_the_plan_counts_parameters_as_torch_does() -> None:
    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy
    from posttrain.plan import TINY_VOCABULARY, parameter_count

    recipe = load_recipe(ROOT / "recipes/tiny/sft.yaml")
    assert isinstance(recipe, SftRecipe) and recipe.model.build is not None
    tokenizer = build_tokenizer()
    assert len(tokenizer) == TINY_VOCABULARY
    for change in ({}, {"q_lora_rank": 48, "first_k_dense_replace": 2, "n_shared_experts": 2}):
        build = recipe.model.build.model_copy(update=change)
        policy = build_policy(build.model_dump(), tokenizer, seed=0)
        assert parameter_count(build, len(tokenizer)) == sum(p.numel() for p in policy.parameters())


def test_errors_are_value_errors() -> None:
    assert issubclass(RecipeError, ValueError)
