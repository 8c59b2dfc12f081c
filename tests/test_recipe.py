"""Recipes: what is refused, how it is said, and that what is shipped is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.cli import run_stage
from posttrain.recipe import RECIPES, DatasetSection, GrpoRecipe, Recipe, RecipeError, RewardSection, SftRecipe
from posttrain.recipe_file import _key_paths, dump_recipe, is_local_path, load_recipe

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
    ("rollout.num_generations=1", "rollout.num_generations", "give 2 or more"),
    ("rollout.temperature=0", "rollout.temperature", "greater than 0"),
    ("rollout.oversampling=1.5", "rollout.oversampling", "set algorithm.importance: truncate"),
    ("rollout.oversampling=3", "rollout.oversampling", "less than or equal to 2"),
    ("rollout={oversampling: 1.5, request_seeds: true}", "rollout", "leave one out"),
    ("rollout.max_carries=2", "rollout", "has no meaning without oversampling"),
    ("rollout.cache_on_update=recompute", "rollout", "without in_flight_updates or oversampling"),
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
    (
        "eval={datasets: [{task: chain_sum, size: 1}], max_completion_length: 256}",
        "eval.max_completion_length",
        "raise",
    ),
    ("eval={datasets: [{task: chain_sum, size: 1, weight: 2}]}", "eval", "weight=2.0 has no meaning here; remove it"),
    ("eval={datasets: [{task: chain_sum}]}", "eval.datasets.0", "needs size"),
    ("model={build: {}}", "model.build", "build the model in an SFT stage"),
    ("model={build: {kv_lora_rank: 256}}", "model.build", "leave both out"),
    ("datasets.0.worked_fraction=0.5", "datasets.0", "remove it"),
    ("datasets.0.levels=[1, 1]", "datasets.0", "name each once"),
    ("datasets.0.levels=[]", "datasets.0.levels", "at least 1 item"),
    ("datasets.0.levels=[9]", "datasets.0.levels", "use some of 1, 2, 3, 4"),
    ("datasets.0.task=chain_smu", "datasets.0.task", "did you mean 'chain_sum'"),
    ("datasets.0.split=test", "datasets.0", "'train' and 'eval'"),
    ("sampler.kv_cache_gib=0.5", "sampler", "whole GiB"),
    ('rewards=[{func: "a.b:c"}, {func: "x.b:d"}]', "rewards", "give each its own name"),
    ("rewards.0.func=os:sep", "rewards.0.func", "not a function"),
    ("rewards=[]", "rewards", "name at least one, or an environment"),
    ('environment={func: "rewards.guessing:Guess"}', "environment.func", "did you mean 'Guessing'"),
    ('environment={func: "rewards.guessing:main"}', "environment.func", "not a class with reset and step"),
    ('environment={func: "rewards.guessing:Guessing", kwargs: {a: 1}}', "environment.func", "do not fit"),
    (
        'environment={func: "rewards.guessing:Guessing", max_turns: 0}',
        "environment.max_turns",
        "greater than or equal to 1",
    ),
    (
        'eval={datasets: [{path: a/b}], environment: {func: "rewards.guessing:Guessing"}}',
        "eval.environment",
        "write `environment` at the top",
    ),
    ("rewards.0.func=os.path:join", "rewards.0.func", "must take (completion, answer, **metadata)"),
    ("datasets.²=1", "datasets.²", "use 0 to 0"),
    ("optimizer..learning_rate=1", "optimizer..learning_rate", "write key.path=value"),
    ("max_steps=", "max_steps", "write one after ="),
    ("optimizer={learning_rate: 1, learning_rate: 2}", "learning_rate", "quote it"),
    ("max_steps=2024-01-01", "max_steps", "valid integer"),
    ("stage=[grpo]", "stage", "allowed: sft, reward_model, grpo, distill, eval, upcycle, pipeline"),
    ("stage=grop", "stage", "did you mean 'grpo'"),
    ("nonsense", "nonsense", "written key.path=value"),
    ("seed.inner=1", "seed", "valid integer"),
    ("seed=[1", "seed", "quote it"),
    ("model={build: {n_routed_experts: 8, n_group: 3}}", "model.build", "set n_group to a divisor"),
    ("model={build: {num_experts_per_tok: 6}}", "model.build", "lower num_experts_per_tok"),
    ("model.extra_characters=零", "model", "a checkpoint has its tokenizer; remove it"),
    (
        "model={build: {}, extra_characters: 零零}",
        "model",
        "'零' is ASCII, which every built policy knows, or there twice",
    ),
    ("model={build: {}, extra_characters: 零e}", "model", "'e' is ASCII"),
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
    ("stage: grpo\nmax_steps: 1\nmax_steps: 2\n", "at line 3, column 1: the key 'max_steps' is there twice"),
    ("stage: grpo\n1: 2\n", "keys should be strings"),
    ("run_name: x\nstage: null\n", "allowed: sft, reward_model, grpo, distill, eval, upcycle, pipeline"),
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


def test_a_missing_base_is_refused_in_the_name_of_the_file_that_extends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "child.yaml").write_text("extends: bsae.yaml\n")
    (tmp_path / "base.yaml").write_text(GOOD)
    line = refusal(capsys, str(tmp_path / "child.yaml"))
    assert f"{tmp_path / 'child.yaml'}: extends: " in line and "did you mean 'base.yaml'" in line


def test_a_file_that_is_not_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert "give a UTF-8 YAML file" in refusal(capsys, str(tmp_path / "recipe.yaml"))


def test_a_directory_without_a_model_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    line = refusal(capsys, str(file), f"model.model_name_or_path={tmp_path}")
    assert "model.model_name_or_path" in line and "it has no config.json" in line


def test_a_reward_file_that_fails_to_import_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    (tmp_path / "bad.py").write_text("import os\nraise RuntimeError('two\\nlines')\n")
    line = refusal(capsys, str(tmp_path / "recipe.yaml"), f"rewards.0.func={tmp_path / 'bad.py'}:score")
    assert "rewards.0.func" in line and "RuntimeError: two lines" in line and "bad.py, line 2" in line


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("Qwen/Qwen2.5-0.5B", False),  # the dots in it are no file ending
        ("meta-llama/Llama-3.2-1B", False),
        ("owner/name", False),
        ("owner/data.jsonl", True),
        ("./name", True),
        ("~/name", True),
        ("runs/tiny/sft", True),
        ("name", True),
    ],
)
def test_hub_names_are_told_from_paths(name: str, local: bool) -> None:
    assert is_local_path(name) is local


def test_a_hub_model_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    assert (
        run_stage("grpo", stage_must_not_run, [str(file), "--dry-run", "model.model_name_or_path=Qwen/Qwen3-0.6B"]) == 0
    )


@pytest.mark.parametrize(
    ("func", "label"),
    [
        ("rewards.task_answer:score", "task_answer"),
        ("exact:score", "exact"),
        ("my/short.py:score", "short"),
        ("./short.v2.py:score", "short.v2"),
    ],
)
def test_a_reward_is_logged_by_its_module_or_file(func: str, label: str) -> None:
    assert RewardSection(func=func).label == label
    assert RewardSection(func=func, name="mine").label == "mine"


def test_worked_solutions_of_a_file_may_be_mixed_with_direct_answers() -> None:
    assert DatasetSection(path="owner/name", worked_fraction=0.5).worked_fraction == 0.5


def test_only_grpo_evaluates_between_steps() -> None:
    with pytest.raises(RecipeError, match=r"eval\.eval_steps=5: only GRPO"):
        load_recipe(ROOT / "recipes/tiny/sft.yaml", ["eval.eval_steps=5"])
    assert load_recipe(ROOT / "recipes/tiny/grpo.yaml", ["eval.eval_steps=5"]).eval.eval_steps == 5


def test_a_run_without_a_name_takes_the_files() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny/sft.yaml", ["run_name=null"])
    assert str(recipe.run_dir) == "runs/sft"


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
    overrides = ["optimizer.learning_rate=1e-5", "seed.x=3", "max_steps=2"]
    assert parse("grpo", words) == ("r.yaml", overrides, False, {"resume": True})


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
    from posttrain.planning.shapes import TINY_VOCABULARY, model_parameters, parameter_count

    recipe = load_recipe(ROOT / "recipes/tiny/sft.yaml")
    assert isinstance(recipe, SftRecipe) and recipe.model.build is not None
    tokenizer = build_tokenizer()
    assert len(tokenizer) == TINY_VOCABULARY
    for change in ({}, {"q_lora_rank": 48, "first_k_dense_replace": 2, "n_shared_experts": 2}):
        build = recipe.model.build.model_copy(update=change)
        policy = build_policy(build.model_dump(), tokenizer, seed=0)
        assert parameter_count(build, len(tokenizer)) == sum(p.numel() for p in policy.parameters())
    more = recipe.model.model_copy(update={"extra_characters": "零一"})
    assert model_parameters(more) == model_parameters(recipe.model) + 2 * 2 * recipe.model.build.hidden_size


def test_every_key_is_explained_where_its_section_is() -> None:
    _, *parts = (ROOT / "docs/recipes.md").read_text().split("\n## ")
    chapters = {part.partition("\n")[0]: part for part in parts}
    elsewhere = {
        "reward": "rewards",
        "verifier": "rewards",
        "build": "model",
    }  # written like entries of `rewards`; in the chapter of its parent

    def explained(path: str) -> bool:
        *parents, key = path.split(".")
        section = elsewhere.get(parents[-1], parents[-1]) if parents else None
        found = [text for title, text in chapters.items() if section and f"`{section}`" in title.partition("(")[0]]
        # keys of no section, and small sections, share chapters; a section itself may have one of its own
        top = next(text for title, text in chapters.items() if title.startswith("Upcycling"))
        shared = [chapters["All stages"], chapters["The rest"], top, *(f"`{title}" for title in chapters)]
        return any(f"`{key}`" in text for text in found or [*shared, *chapters])

    missing = sorted({path for recipe in RECIPES.values() for path in _key_paths(recipe) if not explained(path)})
    assert missing == []


SFT = """
stage: sft
model: {model_name_or_path: some/model}
datasets: [{path: some/chats}]
training: {max_steps: 10}
"""

MALFORMED_SFT = [
    ("training={}", "exactly one of max_steps and num_train_epochs"),
    ("training.loss_on=answer", "'assistant', 'last_assistant', 'completion' or 'all'"),
    ("training.assistant_only_loss=true", "unknown key"),
    ("training.max_seq_length=9", "did you mean 'training.max_length'"),
    ("preparation.too_long=split", "'drop', 'truncate' or 'error'"),
    ("preparation={streaming: true, mixture_temperature: 2}", "give each source a weight"),
    ("datasets=[{path: a/b, weight: 1}, {path: c/d}]|preparation.mixture_temperature=2", "remove one"),
    ("datasets=[{path: a/b}, {path: c/d}]|preparation.streaming=true", "give each one a weight"),
    ("training={num_train_epochs: 1}|preparation.streaming=true", "give training.max_steps"),
    ("preparation.streaming=true|validation.fraction=0.1", "give validation.datasets"),
    ("preparation.decontamination={datasets: []}", "at least 1 item"),
    ("preparation.decontamination={datasets: [{path: a/b, weight: 1}]}", "weight=1.0 has no meaning here"),
    ("validation={}", "exactly one of datasets (held-out chats) and fraction"),
    ("validation={fraction: 1.5}", "less than 1"),
    ("validation={fraction: 0.1, early_stopping_threshold: 0.1}", "without early_stopping_patience"),
    ("lora={targets: []}", "at least 1 item"),
    ("lora={targets: [all-linear]}", "'attention', 'routed_experts'"),
    ("lora={dropout: 0.1, targets: [routed_experts]}", "cannot have dropout"),
    ("lora={r: 0}", "greater than or equal to 1"),
    ("lora={targets: [router]}|router.freeze=true", "contradicts"),
    ("lora={}|mtp={}", "remove one"),
    ("mtp={loss_weight: 0}", "greater than 0"),
    ("router.sequence_balance_alpha=-1", "greater than or equal to 0"),
    ("eval={datasets: [{task: chain_sum, size: 4}], eval_steps: 5}", "only GRPO evaluates between its steps"),
    ("report_to=[mlflow]", "'tensorboard', 'wandb' or 'trackio'"),
]


@pytest.mark.parametrize(("overrides", "words"), MALFORMED_SFT)
def test_a_wrong_sft_recipe_is_refused_with_the_cure(overrides: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(SFT)
    with pytest.raises(RecipeError) as refused:
        load_recipe(file, overrides.split("|"), stage="sft")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_errors_are_value_errors() -> None:
    assert issubclass(RecipeError, ValueError)


def test_what_a_recipe_goes_on_from_is_what_another_one_writes() -> None:
    """Run as they are, without a pipeline that says where things are."""
    made: set[str] = set()
    trees = {path: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
    trees = {path: tree for path, tree in trees.items() if "stage" in tree}  # not the descriptions of clusters
    for path, tree in trees.items():
        name = tree.get("run_name", path.stem)
        made |= {f"{name}/{stage['name']}" for stage in tree["stages"]} if tree["stage"] == "pipeline" else {name}
    wanted = {
        (path.name, found)
        for path, tree in trees.items()
        for found in re.findall(r"\bruns/([\w/]+)/(?:checkpoints|dataset|pairs|generations)\b", path.read_text())
        if tree["stage"] != "pipeline"
    }
    assert wanted and not {(name, found) for name, found in wanted if found not in made}
