"""The command line: how it is read, what is checked before a stage runs, how a stage ends, and what --dry-run says."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import cli
from posttrain.cli import run_stage
from posttrain.dry_run import describe, microbatch_bound
from posttrain.errors import ParityError, RunStopped
from posttrain.planning.shapes import checkpoint_parameters
from posttrain.recipe import GrpoRecipe, Recipe, RecipeError
from posttrain.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
GRPO = """
stage: grpo
max_steps: 3
model: {model_name_or_path: owner/name}
datasets: [{task: chain_sum, size: 10}]
rewards: [{func: "rewards.task_answer:score"}]
"""
SFT = """
stage: sft
model: {build: {}}
datasets: [{task: chain_sum, size: 10}]
training: {max_steps: 3}
"""


@pytest.fixture
def grpo(tmp_path: Path) -> str:
    (tmp_path / "grpo.yaml").write_text(GRPO)
    return str(tmp_path / "grpo.yaml")


def raising(error: BaseException) -> Callable[..., int]:
    def run(recipe: Recipe, *, resume: bool) -> int:
        raise error

    return run


def must_not_run(recipe: Recipe, *, resume: bool) -> int:
    raise AssertionError("the stage ran")


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "overrides", "dry_run", "resume"),
    [
        ("r.yaml", [], False, False),
        ("--config r.yaml a=1", ["a=1"], False, False),
        ("--config=r.yaml", [], False, False),
        ("a=1 r.yaml", ["a=1"], False, False),
        # options may stand anywhere
        ("r.yaml --dry-run a.b=1 --resume c=2", ["a.b=1", "c=2"], True, True),
        ("--resume r.yaml", [], False, True),
        # both spellings keep their order, so that the last one wins
        ("r.yaml --a.b 1 a.b=2 --a.b=3", ["a.b=1", "a.b=2", "a.b=3"], False, False),
        ("r.yaml --seed 3 --max_steps=4", ["seed=3", "max_steps=4"], False, False),
        ("r.yaml --a.b -1", ["a.b=-1"], False, False),
        ("r.yaml a.b=x=y", ["a.b=x=y"], False, False),
    ],
)
def test_the_command_line_is_read(words: str, overrides: list[str], dry_run: bool, resume: bool) -> None:
    assert cli.parse("grpo", words.split()) == ("r.yaml", overrides, dry_run, {"resume": resume})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one recipe file, not none"),
        ("a.yaml --dry-run b.yaml", "give one recipe file, not 'a.yaml', 'b.yaml'"),
        ("--config a.yaml b.yaml", "give one recipe file"),
        ("--config", "expected one argument"),
        ("a.yaml --dryrun", "did you mean '--dry-run'"),
        ("a.yaml --optimizer.learning_rate", "has no value"),
        ("a.yaml --optimizer.learning_rate --dry-run", "has no value"),
        ("a.yaml -x 1", "options are --config, --dry-run, --resume"),
    ],
)
def test_a_wrong_command_line_says_why(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("grpo", must_not_run, words.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: command line: ") and message in line and line.count("\n") == 1


@pytest.mark.parametrize("stage", ["upcycle", "pipeline"])
def test_stages_that_cannot_resume_refuse_to(stage: str) -> None:
    with pytest.raises(RecipeError, match="leave --resume out"):
        cli.parse(stage, ["r.yaml", "--resume"])


def test_help_names_the_command_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run_stage("eval", must_not_run, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "python -m eval recipe.yaml" in text and "--preflight" not in text


# --- running --------------------------------------------------------------------------------------------------------


def test_the_stage_gets_recipe_and_resume_and_a_quiet_environment(grpo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")  # a user's choice wins
    seen = []

    def run(recipe: Recipe, *, resume: bool) -> None:
        seen.append((recipe.seed, resume, {name: os.environ.get(name) for name in cli.QUIET}))

    try:
        assert run_stage("grpo", run, [grpo, "--resume", "seed=7"]) == 0
    finally:
        for name in cli.QUIET:
            monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what run_stage set is undone
    assert seen == [(7, True, {**cli.QUIET, "VLLM_LOGGING_LEVEL": "DEBUG"})]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunStopped("no room:\nadd nodes"), 3, "stopped: no room: add nodes\n"),
        (ParityError("gap 0.3"), 3, "stopped: gap 0.3\n"),
        (RecipeError("x.yaml: lr: unknown key"), 2, "error: x.yaml: lr: unknown key\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_how_a_run_ends(
    error: BaseException, code: int, line: str, grpo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage("grpo", raising(error), [grpo]) == code
    assert capsys.readouterr().err == line


def test_the_exit_code_is_the_stages(grpo: str) -> None:
    assert run_stage("grpo", lambda recipe, resume: 130, [grpo]) == 130


def test_any_other_error_keeps_its_traceback(grpo: str) -> None:
    with pytest.raises(ZeroDivisionError):
        run_stage("grpo", raising(ZeroDivisionError()), [grpo])


PRINTS = """
import sys
from posttrain.cli import run_stage
def run(recipe, **options):
    for number in range(10_000):
        print(number)
sys.exit(run_stage("pipeline" if "--lineage" in sys.argv else "grpo", run))
"""
IMPORTS = "import sys\nfrom posttrain.errors import RunStopped"
PIPELINE = "stage: pipeline\nstages: [{name: rl, recipe: RECIPE}]\n"


def until_nobody_reads(words: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command whose reader, like head, is gone before it writes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    return process.wait(), said


def test_what_is_looked_at_may_be_cut_short(grpo: str, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(PIPELINE.replace("RECIPE", grpo))
    assert until_nobody_reads(["-m", "posttrain.grpo", grpo, "--dry-run"]) == (0, "")
    assert until_nobody_reads(["-m", "posttrain.sft", "--help"]) == (0, "")
    assert until_nobody_reads(["-c", PRINTS, str(pipeline), "--lineage"]) == (0, "")


def test_a_run_whose_reader_leaves_says_how_it_goes_on(grpo: str) -> None:
    said = "stopped: the program that read the output has ended; --resume goes on\n"
    assert until_nobody_reads(["-c", PRINTS, grpo]) == (3, said)


@pytest.mark.parametrize(("error", "code"), [("RunStopped('no room')", {3}), ("ZeroDivisionError()", {1, 120})])
def test_a_failure_is_not_hidden_by_a_reader_that_left(error: str, code: set[int], grpo: str) -> None:
    fails = PRINTS.replace(
        "    for number in range(10_000):\n        print(number)", f"    print(1)\n    raise {error}"
    )
    found, said = until_nobody_reads(["-c", fails.replace("import sys", IMPORTS), grpo])
    # 120 is what Python itself ends with when it cannot write what was printed.
    assert found in code and ("no room" in said or "ZeroDivisionError" in said), (found, said)


def test_another_broken_pipe_keeps_its_traceback(grpo: str) -> None:
    with pytest.raises(BrokenPipeError):
        run_stage("grpo", raising(BrokenPipeError()), [grpo])


def test_sigterm_runs_the_clean_up_and_the_handler_is_put_back(grpo: str) -> None:
    cleaned = []

    def run(recipe: Recipe, *, resume: bool) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)
        raise AssertionError("SIGTERM did not arrive")

    before = signal.getsignal(signal.SIGTERM)
    assert run_stage("grpo", run, [grpo]) == 130
    assert cleaned == [True] and signal.getsignal(signal.SIGTERM) is before


# --- checks that look around ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "grpo", "pipeline"])
@pytest.mark.parametrize("package", ["data", "rewards", "eval"])
def test_another_package_of_our_name_is_refused(package: str, stage: str, tmp_path: Path, grpo: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", f"posttrain.{stage}", grpo],
        cwd=tmp_path,  # first on the path of `python -m`
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"ImportError: the package {package!r} is imported from {tmp_path / package}" in last and "rename" in last


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("grpo", ["optimizer.lr=1"]),
        ("sft", ["training.max_seq_length=9"]),
        ("pipeline", ["stages=[]"]),
        ("distill", ["teacher={}"]),
    ],
)
def test_a_refused_command_loads_no_torch(stage: str, words: list[str], tmp_path: Path) -> None:
    empty = {name: f"stage: {name}\n" for name in ("pipeline", "distill")}
    recipe = {"grpo": GRPO, "sft": SFT, **empty}[stage]
    (tmp_path / "r.yaml").write_text(recipe)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"posttrain.{stage}", str(tmp_path / "r.yaml"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    timed = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(said) == 1 and said[0].startswith("error: ")
    assert "posttrain" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "ray", "trl", "datasets", "reasoning_gym"}


def test_a_pipeline_checks_all_its_stages_before_the_first_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "grpo.yaml").write_text(GRPO)
    (tmp_path / "p.yaml").write_text(
        f"stage: pipeline\noutput_dir: {tmp_path / 'out'}\nstages:\n"
        f"  - {{name: a, recipe: {tmp_path / 'sft.yaml'}}}\n"
        f"  - name: b\n    recipe: {tmp_path / 'grpo.yaml'}\n"
        f"    overrides: ['model.model_name_or_path={{run_dir}}/a/checkpoints/latest']\n"
    )
    pipeline = str(tmp_path / "p.yaml")
    # what an earlier stage will make is not asked for
    assert run_stage("pipeline", must_not_run, [pipeline, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "1. a: " in plan and "2. b: " in plan and f"writes to   {tmp_path / 'out' / 'b'}" in plan
    for change, words in [
        ("stages.1.overrides=['rewards.0.func=rewards.task_answer:scoer']", "did you mean 'score'"),
        ("stages.1.overrides=['model.model_name_or_path=./nowhere']", "'./nowhere' does not exist"),
        ("stages.1.overrides=['lr=1']", "did you mean 'optimizer.learning_rate'"),
        (f"stages.1={{name: b, recipe: {pipeline}}}", "list its stages in the outer one"),
        ("stages.1.recipe=nothing.yaml", "no such recipe file"),
    ]:
        assert run_stage("pipeline", must_not_run, [pipeline, change]) == 2
        line = capsys.readouterr().err
        assert f"{pipeline}: stages.1 (b): " in line and words in line and line.count("\n") == 1
    assert run_stage("pipeline", must_not_run, [pipeline, "stages.1.name=a"]) == 2
    assert "would share a folder" in capsys.readouterr().err
    assert run_stage("pipeline", must_not_run, [pipeline, "stages.1.name=../b"]) == 2
    assert "stages.1.name" in capsys.readouterr().err


# --- the plan ---------------------------------------------------------------------------------------------------------


def planned(grpo: str, *overrides: str) -> GrpoRecipe:
    recipe = load_recipe(grpo, overrides)
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def test_the_plan_spells_out_the_run(grpo: str) -> None:
    text = describe(planned(grpo, "algorithm.num_iterations=2", "learner.num_workers=2", "rewards.0.weight=0.5"))
    assert "32 prompts x 16 generations = 512 completions per step" in text
    # 512 / 4 minibatches, and 4 minibatches x 2 passes
    assert "4 minibatches of 128 completions x 2 passes -> 8 optimizer steps per step" in text
    # 128 samples, one a row of 256; 4096 / 256 = 16 rows a microbatch; 8 microbatches on 2 ranks
    assert "at most 4 microbatches of up to 4096 tokens on each of 2 learner rank(s)" in text
    assert "3 steps, 1,536 completions, 24 optimizer steps" in text
    assert "0.5 x task_answer" in text and "memory      unknown" in text


def test_no_packing_needs_more_microbatches_than_the_plan_says(grpo: str) -> None:
    from posttrain.packing import pack
    from posttrain.types import Sample

    rng = random.Random(0)
    for length, window, tokens, ranks in [
        (256, 256, 4096, 1),
        (384, 256, 1000, 2),
        (512, 128, 1024, 3),
        (300, 100, 900, 1),
    ]:
        recipe = planned(
            grpo,
            f"learner.row_length={length}",
            f"sampler.max_model_len={window}",
            "rollout.max_completion_length=32",
            "parity.canary_length=8",
            f"learner.max_tokens_per_microbatch={tokens}",
            f"learner.num_workers={ranks}",
        )
        bound = microbatch_bound(recipe)
        found = []
        for shortest in (2, window // 2, window):  # the last: every sample as long as can be
            sizes = [rng.randint(shortest, window) for _ in range(128)]
            samples = [Sample((1,) * (size - 1), (1,), (0.0,), 1.0) for size in sizes]
            batches = pack(
                samples, world_size=ranks, max_tokens_per_microbatch=tokens, row_length=length, pad_token_id=0
            )
            found.append(max(len(batch.microbatches) for batch in batches))
        assert max(found) == found[-1] == bound


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_a_checkpoint_is_counted_from_its_headers(tmp_path: Path, grpo: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "num_hidden_layers": 2}))
    write_safetensors(tmp_path / "model-1.safetensors", {"embed": [10, 8], "model.layers.1.w": [8, 8]})
    write_safetensors(
        tmp_path / "model-2.safetensors",
        {"model.layers.1.mlp.gate.e_score_correction_bias": [4], "model.layers.2.mtp": [100, 8], "norm": [8]},
    )
    assert checkpoint_parameters(tmp_path) == 80 + 64 + 8  # neither the bias nor the prediction layer
    text = describe(planned(grpo, f"model.model_name_or_path={tmp_path}", "model.dtype=bfloat16"))
    assert "(deepseek_v3), 152 parameters, bfloat16" in text
    # 152 x 4 bytes, and 16 bytes a parameter with gradients and two moments
    assert "each learner 2.38 KiB: weights 608 B, gradients 608 B, AdamW 1.19 KiB" in text
    assert "its reference 608 B" in text
    assert "weights 304 B, KV cache 1 GiB" in text
    no_reference = describe(planned(grpo, f"model.model_name_or_path={tmp_path}", "algorithm.beta=0"))
    assert "its reference" not in no_reference


def test_a_broken_checkpoint_is_refused(tmp_path: Path, grpo: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0")
    arguments = [grpo, "--dry-run", f"model.model_name_or_path={tmp_path}"]
    assert run_stage("grpo", must_not_run, arguments) == 2
    assert "is not a whole safetensors file; copy the checkpoint again" in capsys.readouterr().err


def test_a_saved_policy_counts_as_many_parameters_as_torch_says(policy_path: Path) -> None:
    from posttrain.model.load import load_policy

    policy = load_policy(
        str(policy_path),
        dtype="float32",
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    )
    assert checkpoint_parameters(policy_path) == sum(parameter.numel() for parameter in policy.parameters())


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_can_be_described(path: Path) -> None:
    recipe = load_recipe(path)
    text = describe(recipe)
    assert f"stage       {recipe.stage}" in text and str(recipe.run_dir) in text


def test_a_tracker_that_is_not_installed_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Any = SimpleNamespace(report_to=("tensorboard", "trackio"))
    monkeypatch.setattr(cli, "find_spec", lambda name: object() if name == "tensorboard" else None)
    with pytest.raises(
        RecipeError, match=r"r\.yaml: report_to: the package trackio is not installed; pip install trackio"
    ):
        cli.check_trackers(recipe, "r.yaml")
    recipe.report_to = ("tensorboard",)
    cli.check_trackers(recipe, "r.yaml")


@pytest.mark.parametrize("asked", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_ways_to_spread_a_model_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    from posttrain.ranks import join_ranks

    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(RunStopped, match="is not supported: start the ranks with --use_fsdp"):
        join_ranks()
