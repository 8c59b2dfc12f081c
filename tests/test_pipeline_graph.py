"""The pipeline's graph, its fingerprints and what follows from them, on directories written by hand. No torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from stage_commands import ROOT

from posttrain import checkpoint
from posttrain.errors import RunStopped
from posttrain.fingerprints import Digests, Snapshot, changes
from posttrain.lineage import lineage, show_lineage
from posttrain.pipeline_graph import Stage, build_graph
from posttrain.pipeline_plan import describe_graph, forecast, require_settled, selected
from posttrain.pipeline_progress import TimeLeft, Timings, clock, time_left
from posttrain.recipe import PipelineRecipe, RecipeError
from posttrain.recipe_file import dump_recipe, load_recipe
from posttrain.stage_inputs import find_inputs
from posttrain.stage_process import locked
from posttrain.stage_records import (
    StageRecord,
    judge,
    prune,
    put_aside,
    read_record,
    record_outputs,
    snapshot,
    take_back,
)

SFT = """
stage: sft
model: {build: {}}
datasets: [{path: %s/chats.jsonl}]
training: {max_steps: 3, chat_template: %s/plain.jinja}
"""
GRPO = """
stage: grpo
max_steps: 3
model: {model_name_or_path: "owner/name"}
datasets: [{task: chain_sum, size: 10}]
rewards:
  - {func: "%s/reward.py:score", name: own}
  - {func: "rewards.format:score", name: format}
"""
EVAL = """
stage: eval
model: {model_name_or_path: "owner/name"}
eval: {datasets: [{task: chain_sum, size: 10}]}
"""
MODEL = "model.model_name_or_path={run_dir}/%s/checkpoints/latest"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Recipes, and the files that they name."""
    (tmp_path / "sft.yaml").write_text(SFT % (tmp_path, tmp_path))
    (tmp_path / "grpo.yaml").write_text(GRPO % tmp_path)
    (tmp_path / "eval.yaml").write_text(EVAL)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "plain.jinja").write_text("{{ messages }}")
    (tmp_path / "reward.py").write_text("def score(completion, answer, **metadata):\n    return 1.0\n")
    return tmp_path


def pipeline(home: Path, *stages: tuple[str, str, Sequence[str]], after: dict[str, list[str]] | None = None) -> Path:
    """A pipeline's file: (name, kind, overrides) for each stage."""
    tree = [
        {"name": name, "recipe": f"{home}/{kind}.yaml", "overrides": list(words), "after": (after or {}).get(name, [])}
        for name, kind, words in stages
    ]
    (home / "p.yaml").write_text(json.dumps({"stage": "pipeline", "output_dir": f"{home}/run", "stages": tree}))
    return home / "p.yaml"


def graph(file: Path, *overrides: str) -> tuple[Stage, ...]:
    return build_graph(load_recipe(file, overrides))


@pytest.fixture
def chain(home: Path) -> Path:
    """Two SFT stages, GRPO after the first of them, an evaluation of each end."""
    return pipeline(
        home,
        ("sft", "sft", []),
        ("other", "sft", ["seed=5"]),
        ("grpo", "grpo", [MODEL % "sft"]),
        ("eval", "eval", [MODEL % "grpo"]),
        ("eval_other", "eval", [MODEL % "other"]),
    )


def pretend(stage: Stage, weights: str) -> None:
    """Leave what a stage leaves, and what the pipeline records of it."""
    run_dir = stage.directory.parent
    digests = Digests(run_dir)
    record = StageRecord(snapshot(stage, run_dir, digests), stage.recipe.stage, stage.section.recipe, seconds=10.0)
    record.write(stage.directory)
    (stage.directory / "recipe.yaml").write_text(dump_recipe(stage.recipe))
    (stage.directory / "metrics.jsonl").write_text(json.dumps({"step": 3, "seconds": 9.0, "at": time.time_ns()}) + "\n")

    def write(path: str) -> None:
        (Path(path) / "config.json").write_text("{}")
        (Path(path) / "model.safetensors").write_text(weights)
        (Path(path) / "optimizer.pt").write_text(str(time.time_ns()))

    checkpoint.save(stage.directory / "checkpoints", 3, write, {"at": time.time_ns()}, keep=2)
    (stage.directory / "summary.json").write_text(json.dumps({"finished": True, "seconds": 10.0}))
    record_outputs(record, stage.directory, digests).write(stage.directory)


def pretend_all(file: Path) -> None:
    for stage in graph(file):
        pretend(stage, f"weights of {stage.name}")


def expectations(file: Path, *overrides: str) -> dict[str, str]:
    stages = graph(file, *overrides)
    run_dir = stages[0].directory.parent
    return {name: found.action for name, found in forecast(stages, run_dir, Digests(run_dir)).items()}


def reason(file: Path, name: str, *overrides: str) -> str:
    stages = graph(file, *overrides)
    run_dir = stages[0].directory.parent
    return forecast(stages, run_dir, Digests(run_dir))[name].reason


# --- the graph --------------------------------------------------------------------------------------------------------


def test_needs_follow_from_the_paths_of_a_recipe_wherever_they_stand(home: Path) -> None:
    file = pipeline(
        home,
        ("a", "sft", []),
        ("b", "sft", []),
        ("c", "sft", []),
        ("d", "sft", []),
        ("e", "sft", []),
        (
            "last",
            "grpo",
            [
                MODEL % "a",
                "datasets=[{path: '{run_dir}/b/data/train.jsonl'}]",
                "rewards.0.func={run_dir}/c/reward.py:score",
                "rewards.1.kwargs={command: 'serve --model {run_dir}/d/checkpoints/latest --port 1'}",
            ],
        ),
        after={"last": ["e"]},
    )
    last = graph(file)[-1]
    assert last.needs == ("a", "b", "c", "d", "e")
    assert {found.key: found.name for found in last.inputs if found.stage} == {
        "model.model_name_or_path": "{run_dir}/a/checkpoints/latest",
        "datasets.0.path": "{run_dir}/b/data/train.jsonl",
        "rewards.0.func": "{run_dir}/c/reward.py",
        "rewards.1.kwargs.command": "{run_dir}/d/checkpoints/latest",
        "after": "{run_dir}/e",
    }


def test_a_path_written_out_or_relative_is_found_too(home: Path, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for path in (f"{home}/run/sft/checkpoints/latest", "run/sft/checkpoints/latest", "./run/../run/sft/checkpoints/x"):
        assert graph(chain, f"stages.3.overrides=['model.model_name_or_path={path}']")[3].needs == ("sft",)
        relative = graph(chain, "output_dir=run", f"stages.3.overrides=['model.model_name_or_path={path}']")
        assert relative[3].needs == ("sft",)


def test_the_order_is_the_recipes_unless_a_stage_has_to_wait(home: Path) -> None:
    stages: list[tuple[str, str, Sequence[str]]] = [(name, "sft", []) for name in "abcd"]
    assert [stage.name for stage in graph(pipeline(home, *stages))] == ["a", "b", "c", "d"]
    waiting = pipeline(home, *stages, after={"a": ["c"]})
    assert [stage.name for stage in graph(waiting)] == ["b", "c", "a", "d"]
    stages[0] = ("a", "grpo", [MODEL % "c"])  # allowed, because it says that it waits
    assert [stage.name for stage in graph(pipeline(home, *stages, after={"a": ["c"]}))] == ["b", "c", "a", "d"]


@pytest.mark.parametrize(
    ("words", "after", "message"),
    [
        (
            [MODEL % "last"],
            [],
            "stages.1 (b): model.model_name_or_path: it uses what 'last' makes, which is listed after",
        ),
        ([MODEL % "b"], [], "stages.1 (b): model.model_name_or_path: it uses what it makes itself"),
        ([MODEL % "aa"], [], "in the folder of 'aa', which is no stage; did you mean 'a'?"),
        ([], ["lats"], "stages.1 (b): after: 'lats' is no stage; did you mean 'last'?; stages are a, b, last"),
        ([], ["last"], "stages: b -> last -> b: each needs the one after it; break the circle"),
        ([], ["b"], "stages.1 (b): after: it uses what it makes itself"),
    ],
)
def test_a_graph_that_cannot_be_walked_is_refused(words: list[str], after: list[str], message: str, home: Path) -> None:
    needs_b = [MODEL % "b"] if after == ["last"] else []
    file = pipeline(home, ("a", "sft", []), ("b", "grpo", words), ("last", "grpo", needs_b), after={"b": after})
    with pytest.raises(RecipeError) as refused:
        graph(file)
    assert message in str(refused.value)


def test_what_a_removed_stage_made_is_refused_and_a_users_own_file_is_not(home: Path, chain: Path) -> None:
    pretend_all(chain)
    with pytest.raises(RecipeError, match="was made by a stage that is not in this recipe"):
        graph(pipeline(home, ("grpo", "grpo", [MODEL % "sft"])))
    (home / "run" / "mine.jsonl").write_text("{}\n")
    (stage,) = graph(pipeline(home, ("new", "sft", ["datasets.0.path={run_dir}/mine.jsonl"])))
    assert stage.needs == () and home / "run" / "mine.jsonl" in [found.path for found in stage.inputs]


def test_inputs_are_files_plugins_templates_and_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "chain_sum").mkdir()  # a directory with the name of a task is not an input
    (home / "plugins").mkdir()
    (home / "plugins" / "short.py").write_text("")
    monkeypatch.syspath_prepend(str(home))
    sft = {found.key: found.path for found in find_inputs(load_recipe(home / "sft.yaml"), home / "run")}
    assert sft == {"datasets.0.path": home / "chats.jsonl", "training.chat_template": home / "plain.jinja"}
    grpo = load_recipe(home / "grpo.yaml", ["rewards.1={func: 'plugins.short:score', name: short}"])
    assert {found.key: (found.name, found.path) for found in find_inputs(grpo, home / "run")} == {
        "model.model_name_or_path": ("owner/name", None),
        "rewards.0.func": (f"{home}/reward.py:score", home / "reward.py"),
        "rewards.1.func": ("plugins.short:score", home / "plugins" / "short.py"),
    }
    (home / "up.yaml").write_text("stage: upcycle\nsource: package:pytest\n")
    (package,) = find_inputs(load_recipe(home / "up.yaml"), home / "run")
    assert package.name == f"package:pytest {pytest.__version__}" and package.path is None


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_a_file_is_hashed_by_content_and_read_again_when_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("one")
    old = time.time_ns() - 10**10
    os.utime(file, ns=(old, old))
    digests = Digests(tmp_path)
    # sha256 of "one", from sha256sum
    assert digests.of(file) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    file.write_text("two")
    os.utime(file, ns=(old, old))  # as `cp -p` leaves it: same size, same time of change
    assert digests.of(file) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    file.touch()
    assert Digests(tmp_path).of(file) == digests.of(file)


def test_what_is_remembered_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "model.safetensors"
    file.write_text("one")
    time.sleep(1.1)  # until it is settled
    digests = Digests(tmp_path / "run")
    before = digests.of(file)
    digests.save()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert Digests(tmp_path / "moved").of(tmp_path / "moved" / "model.safetensors") == before


def test_a_checkpoints_hash_is_that_of_what_others_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "trainer_state.json").write_text(name)
        (tmp_path / name / ".cache").write_text(name)
    digests = Digests(tmp_path)
    assert digests.of(tmp_path / "a") == digests.of(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert digests.of(tmp_path / "a") != digests.of(tmp_path / "b")
    (tmp_path / "latest").symlink_to("b")
    assert digests.of(tmp_path / "latest") == digests.of(tmp_path / "b")


def test_changes_are_named() -> None:
    row = {"key": "datasets.0.path", "name": "a.jsonl", "stage": None, "sha256": "1"}
    before = Snapshot({"rewards": [{"weight": 1.0}], "seed": 0, "kwargs": {}}, [row])
    assert changes(before, before) == []
    now = Snapshot({"rewards": [{"weight": 0.5}], "seed": 0, "kwargs": {"k": 1}}, [{**row, "sha256": "2"}])
    assert [str(change) for change in changes(before, now)] == [
        "rewards.0.weight 1.0 -> 0.5",
        "kwargs.k 1 is new",
        "kwargs {} was removed",
        "input a.jsonl (datasets.0.path) changed",
    ]
    assert before.fingerprint != now.fingerprint


def test_a_run_directory_may_be_moved(home: Path, chain: Path) -> None:
    pretend_all(chain)
    shutil.move(home / "run", home / "elsewhere")
    assert set(expectations(chain, f"output_dir={home}/elsewhere").values()) == {"finished"}


# --- what runs again --------------------------------------------------------------------------------------------------


def test_nothing_has_run_then_everything_is_done(chain: Path) -> None:
    assert set(expectations(chain).values()) == {"started"}
    pretend_all(chain)
    assert set(expectations(chain).values()) == {"finished"}


def test_a_changed_reward_weight_runs_its_stage_and_what_follows_from_it(chain: Path) -> None:
    pretend_all(chain)
    weight = "stages.2.overrides=['model.model_name_or_path={run_dir}/sft/checkpoints/latest', rewards.0.weight=0.5]"
    assert expectations(chain, weight) == {
        "sft": "finished",
        "other": "finished",
        "grpo": "started anew",
        "eval": "depends",
        "eval_other": "finished",
    }
    assert reason(chain, "grpo", weight) == "rewards.0.weight 1.0 -> 0.5"
    stages = graph(chain, weight)
    text = describe_graph(stages, stages[0].directory.parent)
    assert "3. grpo        started anew: rewards.0.weight 1.0 -> 0.5  (needs sft)" in text
    assert "4. eval        depends: runs if grpo comes out otherwise than before  (needs grpo)" in text
    assert "2 of 5 stages would run; time left: unknown for grpo, eval" in text


@pytest.mark.parametrize(
    ("file", "started", "depending"),
    [
        ("reward.py", {"grpo"}, {"eval"}),
        ("chats.jsonl", {"sft", "other"}, {"grpo", "eval", "eval_other"}),
        ("plain.jinja", {"sft", "other"}, {"grpo", "eval", "eval_other"}),
    ],
)
def test_a_changed_file_runs_the_stages_that_read_it(
    file: str, started: set[str], depending: set[str], home: Path, chain: Path
) -> None:
    pretend_all(chain)
    with (home / file).open("a") as text:
        text.write("\n")
    found = expectations(chain)
    assert {name for name, action in found.items() if action == "started anew"} == started
    assert {name for name, action in found.items() if action == "depends"} == depending
    assert f"{home}/{file}" in reason(chain, sorted(started)[0])


def test_a_stage_made_again_runs_those_after_it_only_if_it_came_out_otherwise(home: Path, chain: Path) -> None:
    pretend_all(chain)
    sft, _, grpo, *_ = graph(chain)
    shutil.rmtree(sft.directory)
    pretend(sft, "weights of sft")
    assert judge(grpo, home / "run", Digests(home / "run")).action == "finished"
    shutil.rmtree(sft.directory)
    pretend(sft, "other weights")
    verdict = judge(grpo, home / "run", Digests(home / "run"))
    assert verdict.action == "started anew"
    assert verdict.reason == "input {run_dir}/sft/checkpoints/latest (model.model_name_or_path) changed"


def test_what_was_deleted_is_made_again_only_where_it_is_needed(home: Path, chain: Path) -> None:
    pretend_all(chain)
    shutil.rmtree(home / "run" / "sft" / "checkpoints")  # to save room; what follows from it is done
    assert set(expectations(chain).values()) == {"finished"}
    (home / "reward.py").write_text("def score(completion, answer, **metadata):\n    return 0.0\n")
    found = expectations(chain)
    assert (found["sft"], found["grpo"], found["other"]) == ("started anew", "started anew", "finished")
    assert "was deleted and is needed" in reason(chain, "sft")
    shutil.rmtree(home / "run" / "eval_other" / "checkpoints")  # nothing follows from it: it is what was wanted
    assert expectations(chain)["eval_other"] == "started anew"


def test_a_stage_cut_short_goes_on_where_there_is_something_to_go_on_from(home: Path, chain: Path) -> None:
    pretend_all(chain)
    stages = {stage.name: stage for stage in graph(chain)}
    for name in ("sft", "grpo", "eval"):
        directory = stages[name].directory
        record = read_record(directory)
        assert record is not None
        replace(record, finished=False, outputs={}, links={}).write(directory)
        assert judge(stages[name], home / "run", Digests(home / "run")).action == "finished"  # its summary says so
        (directory / "summary.json").unlink()
    digests = Digests(home / "run")
    assert judge(stages["sft"], home / "run", digests).action == "resumed"
    assert judge(stages["eval"], home / "run", digests).action == "started"
    (stages["eval"].directory / "generations").mkdir()  # answers, which an evaluation refuses to ignore
    assert judge(stages["eval"], home / "run", digests).action == "resumed"
    shutil.rmtree(stages["grpo"].directory / "checkpoints")
    assert judge(stages["grpo"], home / "run", digests).action == "started"


def test_a_directory_without_a_record_counts_by_its_recipe(home: Path, chain: Path) -> None:
    pretend_all(chain)
    sft = graph(chain)[0]
    (sft.directory / "stage.json").unlink()
    assert judge(sft, home / "run", Digests(home / "run")).action == "finished"
    (sft.directory / "recipe.yaml").write_text("stage: sft\n")
    assert judge(sft, home / "run", Digests(home / "run")).action == "started anew"


def test_what_is_put_aside_is_kept_until_it_is_pruned(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "weights").write_text(str(number))
        assert put_aside(tmp_path / "sft") == tmp_path / f"sft.stale-{number}"
    (tmp_path / "sft.stale-notes").mkdir()
    assert (tmp_path / "sft.stale-1" / "weights").read_text() == "1"
    assert [path.name for path in prune(tmp_path)] == ["sft.stale-1", "sft.stale-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["sft.stale-notes"]
    with pytest.raises(ValueError, match="an earlier run put aside"):
        PipelineRecipe.model_validate({"stages": [{"name": "a.stale-1", "recipe": "x.yaml"}]})


def test_a_change_taken_back_takes_the_earlier_run_back(home: Path, chain: Path) -> None:
    pretend_all(chain)
    weight = "stages.2.overrides=['model.model_name_or_path={run_dir}/sft/checkpoints/latest', rewards.0.weight=0.5]"
    changed = graph(chain, weight)[2]
    aside = put_aside(changed.directory)
    pretend(changed, "weights by another reward")
    found = expectations(chain)
    assert (found["grpo"], found["eval"], found["sft"]) == ("taken back", "depends", "finished")
    verdict = judge(graph(chain)[2], home / "run", Digests(home / "run"))
    assert verdict.kept == aside and not verdict.runs
    take_back(changed.directory, aside)
    assert set(expectations(chain).values()) == {"finished"}
    assert expectations(chain, weight)["grpo"] == "taken back"
    (home / "run/grpo.stale-2/checkpoints/step-3/model.safetensors").unlink()
    assert expectations(chain, weight)["grpo"] == "started anew"


DISTILL = """
stage: distill
teacher: {recordings: {path: %s/chats.jsonl}}
datasets: [{task: chain_sum, size: 10}]
"""


def test_answers_that_were_paid_for_serve_a_recipe_that_judges_them_otherwise(home: Path) -> None:
    (home / "distill.yaml").write_text(DISTILL % home)
    dataset = "datasets=[{path: '{run_dir}/answers/dataset.parquet'}]"
    file = pipeline(home, ("answers", "distill", []), ("sft", "sft", [dataset]))
    answers, sft = graph(file)
    assert sft.needs == ("answers",) and [found.key for found in answers.inputs] == ["teacher.recordings.path"]

    journal = answers.directory / "journal" / "generations.jsonl"
    journal.parent.mkdir(parents=True)
    digests = Digests(home / "run")
    StageRecord(snapshot(answers, home / "run", digests), "distill", answers.section.recipe).write(answers.directory)
    assert judge(answers, home / "run", digests).action == "started"
    journal.write_text("paid for\n")
    assert judge(answers, home / "run", digests).action == "resumed"

    (stricter, _) = graph(file, "stages.0.overrides=['rejection.length={max_characters: 9}']")
    verdict = judge(stricter, home / "run", digests)
    assert (verdict.action, verdict.books, verdict.resumes) == ("started anew", "journal", True)
    (other, _) = graph(file, "stages.0.overrides=['rejection.length={max_characters: 9}', seed=1]")
    verdict = judge(other, home / "run", digests)
    assert (verdict.action, verdict.books, verdict.resumes) == ("started anew", None, False)

    aside = put_aside(answers.directory, "journal")
    with journal.open("a") as text:
        text.write("more\n")
    assert (aside / "journal" / "generations.jsonl").read_text() == "paid for\n"
    assert [path.name for path in answers.directory.iterdir()] == ["journal"]


def test_stages_are_chosen_by_name(chain: Path) -> None:
    stages = graph(chain)
    assert [stage.name for stage in selected(stages, only="grpo", until=None)] == ["grpo"]
    assert [stage.name for stage in selected(stages, only=None, until="grpo")] == ["sft", "other", "grpo"]
    with pytest.raises(RecipeError, match="--until grop: no such stage; did you mean 'grpo'"):
        selected(stages, only=None, until="grop")
    with pytest.raises(RecipeError, match="give one of them"):
        selected(stages, only="sft", until="sft")
    run_dir = stages[0].directory.parent
    with pytest.raises(RunStopped, match="--only grpo: it needs 'sft', which is to run first .started: not run yet"):
        require_settled([stages[2]], forecast(stages, run_dir, Digests(run_dir)))
    pretend_all(chain)
    require_settled([stages[2]], forecast(stages, run_dir, Digests(run_dir)))


# --- lineage and time left --------------------------------------------------------------------------------------------


def test_lineage_leads_back_to_what_was_given(home: Path, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_all(chain)
    stages, digests = graph(chain), Digests(home / "run")
    found = lineage(stages, digests)
    made = found["artefacts"]["grpo/checkpoints/step-3"]
    assert made["stage"] == "grpo" and made["names"] == ["grpo/checkpoints/latest"] and made["unchanged"]
    (model, own) = found["stages"]["grpo"]["inputs"]
    assert (model["stage"], model["artefact"]) == ("sft", "sft/checkpoints/step-3")
    assert model["sha256"] == found["artefacts"]["sft/checkpoints/step-3"]["sha256"]
    assert own["sha256"] == digests.of(home / "reward.py")
    assert model["current"] and own["current"]
    shutil.rmtree(stages[0].directory)
    pretend(stages[0], "other weights")
    assert not lineage(stages, digests)["stages"]["grpo"]["inputs"][0]["current"]
    (home / "run/sft/checkpoints/step-3/model.safetensors").write_text("by hand")
    assert not lineage(stages, digests)["artefacts"]["sft/checkpoints/step-3"]["unchanged"]
    show_lineage(stages, found)
    text = capsys.readouterr().out
    assert text.index("eval (eval") < text.index("grpo (grpo") < text.index("sft (sft") < text.index("eval_other (eval")
    assert f"from {home}/chats.jsonl (datasets.0.path)" in text


def test_time_left_comes_from_earlier_runs_or_steps_and_is_else_unknown(home: Path, chain: Path) -> None:
    sft, other, grpo, evaluation, _ = graph(chain)
    timings = Timings(home / "run")
    assert time_left([sft, grpo], timings, {}) == TimeLeft(0.0, ("sft", "grpo"))
    (home / "run").mkdir()
    timings.remember(sft, 30.0)
    timings.remember(evaluation, 5.0)
    longer = graph(chain, "stages.0.overrides=[training.max_steps=9]")[0]
    timings = Timings(home / "run")
    assert timings.expected(sft) == 30.0 and timings.expected(longer) == 90.0  # 3 steps took 30 s
    assert time_left([sft, grpo, evaluation], timings, {"sft": 12.0}) == TimeLeft(23.0, ("grpo",))
    grpo.directory.mkdir()
    (grpo.directory / "metrics.jsonl").write_text('{"step": 1, "seconds": 4.0}\n{"step": 2, "sec')
    assert time_left([grpo, other], timings, {"grpo": 20.0}) == TimeLeft(8.0, ("other",))  # 2 steps of 4 s
    assert str(TimeLeft(185.4, ("grpo",))) == "time left: about 3m05s, unknown for grpo"
    assert [clock(12.2), clock(7800)] == ["12s", "2h10m"]


# --- processes --------------------------------------------------------------------------------------------------------


def test_one_pipeline_at_a_time_works_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stage_process.LOCK_SECONDS", 0.1)
    with locked(tmp_path), pytest.raises(RunStopped, match="is at work in"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_stage_does_not_outlive_a_killed_pipeline(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "from pathlib import Path\nfrom posttrain.stage_process import locked, run_process\n"
        "with locked(Path('.')) as lock:\n    run_process('sleeper', [], lock, lambda seconds: None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    stage = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while psutil.pid_exists(stage) and psutil.Process(stage).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    with locked(tmp_path):  # the lock went with them
        pass
