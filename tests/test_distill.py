"""Distillation as a user runs it: recordings, a checkpoint on vLLM workers, kills, and what SFT reads in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from stage_commands import REWARD, Command

from data.pairs import file_pairs
from posttrain.distill import main
from posttrain.recipe import DatasetSection, RecipeError
from posttrain.recipe_file import load_recipe
from posttrain.records import load_chats
from posttrain.sampler import request_seed

RECORDED = """
stage: distill
teacher: {recordings: {path: %(home)s/recorded.jsonl, columns: {completion: response}}}
datasets: [{path: %(home)s/prompts.jsonl}]
rejection: {format: think_answer}
selection: {pick: all, decontamination: {datasets: [{path: %(home)s/test.jsonl}]}}
output: {kinds: [original, response, system_response], system_prompt: Reflect and verify., format: jsonl}
"""
PLANTED = (2, 5, 11)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Prompts of which three are evaluation problems, and three answers to each: two different good ones, one cut off."""
    problems = [
        {
            "id": f"p{n}",
            "prompt": f"A train leaves station {n} with {n} people and {n + 1} join. How many are on it now?",
        }
        for n in range(12)
    ]
    write(tmp_path / "prompts.jsonl", [{**row, "answer": str(2 * n + 1)} for n, row in enumerate(problems)])
    write(tmp_path / "test.jsonl", [{"prompt": "x" if n else "y"} | problems[n] for n in PLANTED])
    answers = []
    for n, row in enumerate(problems):
        texts = [
            f"<think>{n}+{n + 1}</think><answer>{2 * n + 1}</answer>",
            f"<think>a</think><answer>{n}</answer>",
            "<think>",
        ]
        # Half of the rows say what they answer by id, the others by text.
        named = {"prompt_id": row["id"]} if n % 2 else {"prompt": row["prompt"]}
        answers += [{**named, "response": text, "finish_reason": "stop", "teacher": "r1", "seed": 9} for text in texts]
    write(tmp_path / "recorded.jsonl", answers)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECORDED % {"home": tmp_path})
    return recipe


def test_recordings_become_a_dataset_that_sft_reads(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([str(recorded), f"output_dir={out}"]) == 0
    card = json.loads((out / "data_card.json").read_text())

    # What was planted is gone before it is answered, and every one of it is named.
    gone = rows_of(out / "contaminated.jsonl")
    assert {row["id"] for row in gone} == {f"p{n}" for n in PLANTED} == {row["problem"] for row in gone}
    assert card["prompts"] == {
        "loaded": 12, "duplicates": 0, "contaminated": 3, "too_long": 0, "asked": 9, "with_a_correct_answer": 9,
        "with_a_kept_answer": 9,
    }  # fmt: skip
    text = (out / "data_card.md").read_text()
    assert "| contaminated | 3 |" in text and all(f"| p{n} |" in text for n in PLANTED)

    rows = rows_of(out / "dataset.jsonl")
    assert not {row["prompt_id"] for row in rows} & {f"p{n}" for n in PLANTED}
    assert (
        card["rows"] == {"original": 9, "response": 18, "system_response": 18}
        and card["file"]["rows"] == len(rows) == 45
    )
    assert card["funnel"]["reasons"] == {"format": {"first": 9, "any": 9}}
    user = {"role": "user", "content": "A train leaves station 0 with 0 people and 1 join. How many are on it now?"}
    system = {"role": "system", "content": "Reflect and verify."}
    original, *kept = [row for row in rows if row["prompt_id"] == "p0"]
    assert original["messages"] == [user, {"role": "assistant", "content": "<think></think><answer>1</answer>"}]
    good = {"role": "assistant", "content": "<think>0+1</think><answer>1</answer>"}
    assert [row["messages"] for row in kept[:2]] == [[user, good], [system, user, good]]
    assert [row["row_kind"] for row in kept] == ["response", "system_response"] * 2

    chats = load_chats([DatasetSection(path=str(out / "dataset.jsonl"))], seed=0).records
    assert sorted((chat.id, chat.messages) for chat in chats) == sorted((r["id"], tuple(r["messages"])) for r in rows)


def test_one_kept_sample_is_traced_back(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([str(recorded), f"output_dir={out}", "output.format=parquet"]) == 0
    row = next(r for r in rows_of(out / "dataset.parquet") if r["row_kind"] == "response")
    (found,) = pq.read_table(
        out / "samples/generations.parquet", filters=[("sample_id", "=", row["sample_id"])]
    ).to_pylist()
    assert found["completion"] == row["messages"][-1]["content"] and found["kept"] and found["reason"] is None
    assert (found["teacher"], found["seed"], found["prompt_id"]) == ("r1", 9, row["prompt_id"])
    assert found["teacher_version"].startswith("sha256:") and found["prompt"] == row["messages"][-2]["content"]
    rejected = [r for r in rows_of(out / "samples/generations.parquet") if not r["kept"]]
    assert {r["reason"] for r in rejected} == {"format"} and len(rejected) == 9


def test_a_finished_run_is_decided_again_without_being_asked_again(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = [str(recorded), f"output_dir={out}"]
    assert main(words) == 0
    first, journal = (out / "dataset.jsonl").read_bytes(), (out / "journal/generations.jsonl").read_bytes()
    assert main(words) == 3  # not without --resume
    assert main([*words, "--resume"]) == 0
    assert (out / "dataset.jsonl").read_bytes() == first
    assert main([*words, "--resume", "selection.pick=shortest", "output.format=parquet"]) == 0
    assert (out / "journal/generations.jsonl").read_bytes() == journal
    assert json.loads((out / "data_card.json").read_text())["rows"]["response"] == 9
    assert not (out / "dataset.jsonl").exists()
    assert main([*words, "--resume", "seed=1"]) == 3
    write(tmp_path / "prompts.jsonl", [{"id": "p1", "prompt": "Another question?", "answer": "1"}])
    assert main([*words, "--resume"]) == 3
    assert "p1#0 answers another prompt than p1 is now" in capsys.readouterr().err


def test_nothing_kept_is_no_dataset(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([str(recorded), f"output_dir={out}", "rejection.length={min_characters: 999}"]) == 3
    assert "not one of 27 answers is kept" in capsys.readouterr().err
    assert json.loads((out / "data_card.json").read_text())["funnel"]["reasons"]["length"]["any"] == 27
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher.endpoint={model: m, base_url: x}", "exactly one of model"),
        ("teacher={endpoint: {model: m}}", "add api_key_env"),
        ("teacher={endpoint: {model: m, base_url: x, max_cost: 1}}", "without prices"),
        ("teacher={model: {build: {}}}", "needs a checkpoint"),
        ("generation.temperature=0.5", "made already"),
        ("rejection.correctness={accuracy: 1}", "'accuracy' is none of the rewards"),
        ("rejection.length={}", "without a bound"),
        ("rejection.length={min_tokens: 5, max_tokens: 4}", "min_tokens=5 exceeds"),
        ("selection.pick=best", "none has a weight"),
        ("selection.pick=diverse", "per_prompt of 2 or more"),
        ("selection.per_prompt=2", "with pick: all"),
        ("output.kinds=[response, response]", "'response'"),
        ("output.system_prompt=null", "system_response needs a text"),
        ("output.pairs_per_prompt=2", "which answers are wrong"),
        ("sampler.num_workers=2", "remove the section"),
        ("datasets.0.worked_fraction=0.5", "has no meaning here"),
        ("selection.pik=all", "did you mean 'selection.pick'"),
    ],
)
def test_recipes_that_cannot_be_run(recorded: Path, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recorded, [change], stage="distill")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("teacher={endpoint: {model: m, api_key_env: POSTTRAIN_NO_KEY}}", 2, "POSTTRAIN_NO_KEY is not set"),
        ("teacher={recordings: {path: nowhere.jsonl}}", 2, "does not exist"),
        ("rejection.language={language: xx}", 2, "unknown language 'xx'"),
        ("selection.decontamination.datasets=[{path: %(home)s/prompts.jsonl}]", 3, "no prompt is left"),
        ("datasets.0.columns={prompt: id}", 3, "holds no answer to any of the 12 prompts"),
        ("rewards=[{func: 'rewards.nothing:score'}]", 2, "rewards.0.func"),
    ],
)
def test_what_is_refused_before_work(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, code: int, words: str
) -> None:
    out = tmp_path / "run"
    assert main([str(recorded), f"output_dir={out}", change.replace("%(home)s", str(tmp_path))]) == code
    assert words in capsys.readouterr().err
    assert not (out / "journal").exists()


OUTAGE = """
from pathlib import Path
from rewards import Unavailable, grouped

home = Path(__file__).parent

def score(completion, answer, **metadata):
    with (home / "calls.txt").open("a") as file:
        file.write(completion + "\\n")
    if "<think>a" in completion and not (home / "mended").exists():
        raise Unavailable("the judge is away")
    return float(f"<answer>{answer}</answer>" in completion)

@grouped
def shortest(completions, answer, **metadata):
    assert metadata["finish_reason"] == ["stop"] * 3
    return [float(len(text) == min(map(len, completions))) for text in completions]
"""


@pytest.mark.slow
def test_what_could_not_be_judged_is_not_wrong_and_is_judged_again(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "outage.py").write_text(OUTAGE)
    out, calls = tmp_path / "run", tmp_path / "calls.txt"
    judge = f"{{func: '{tmp_path}/outage.py:score', name: right, retries: 0, max_failed_fraction: 0.4}}"
    other = f"{{func: '{tmp_path}/outage.py:shortest', name: short, weight: 0}}"
    words = [str(recorded), f"output_dir={out}", "rejection={correctness: {right: 1}}", f"rewards=[{judge}]"]
    assert main([*words, "output.pairs_per_prompt=3"]) == 0
    pairs = file_pairs(str(out / "pairs.jsonl"), "train")
    assert len(pairs) == 9 and all(pair.chosen[-1]["content"].endswith("</answer>") for pair in pairs)
    assert {pair.rejected[-1]["content"] for pair in pairs} == {"<think>"}  # not those that nobody could judge
    assert json.loads((out / "data_card.json").read_text())["pairs"]["rows"] == 9
    rows = rows_of(out / "samples/generations.parquet")
    away = [row for row in rows if row["reason"] == "unjudged"]
    assert len(away) == 9 and {row["status/right"] for row in away} == {"infrastructure"}
    assert all(row["reasons"] == ["unjudged"] and "the judge is away" in row["reason_details"][0] for row in away)
    assert [row["kept"] for row in rows[:3]] == [True, False, False]
    assert len(calls.read_text().splitlines()) == 27

    (tmp_path / "mended").touch()
    assert main([*words, "--resume"]) == 0
    assert len(calls.read_text().splitlines()) == 27 + 9  # only what was open
    assert not (out / "pairs.jsonl").exists()
    reasons = json.loads((out / "data_card.json").read_text())["funnel"]["reasons"]
    assert reasons["correctness"] == {"first": 18, "any": 18} and "unjudged" not in reasons

    assert main([*words[:3], f"rewards=[{judge.replace('right,', 'right, weight: 2,')}]", "--resume"]) == 0
    assert rows_of(out / "samples/generations.parquet")[0]["reward"] == 2.0
    assert len(calls.read_text().splitlines()) == 27 + 9  # a weight judges nothing

    assert main([*words[:3], f"rewards=[{judge}, {other}]", "--resume"]) == 0
    rows = rows_of(out / "samples/generations.parquet")
    assert [row["reward/short"] for row in rows[:3]] == [
        0.0,
        0.0,
        1.0,
    ]  # a prompt's answers are compared with each other


# --- a checkpoint on vLLM workers -------------------------------------------------------------------------------------

LOCAL = """
stage: distill
teacher: {model: {model_name_or_path: %s}}
datasets: [{task: letter_counting, levels: [1, 2], size: 40}]
generation: {num_generations: 4, max_completion_length: 24}
rewards: [{func: "%s:score", name: accuracy}]
rejection: {correctness: {accuracy: 0.6}, truncated: false}
selection: {pick: best, per_prompt: 2}
sampler: {max_model_len: 64, max_num_seqs: 4, num_threads: 1}
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_dataset(policy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    recipe = tmp_path / "local.yaml"
    recipe.write_text(LOCAL % (policy_path, tmp_path / "reward.py"))
    unbroken = Command("posttrain.distill", str(recipe), f"output_dir={tmp_path}/unbroken")
    code, output = unbroken.finish()
    assert code == 0, output
    rows = rows_of(tmp_path / "unbroken/dataset.parquet")
    samples = rows_of(tmp_path / "unbroken/samples/generations.parquet")
    card = json.loads((tmp_path / "unbroken/data_card.json").read_text())
    assert len(samples) == card["funnel"]["steps"][0]["left"] == 160 and rows
    for row in samples:
        expected = (len(row["completion"]) * 7 + row["completion"].count("e")) % 5 / 5
        assert row["reward/accuracy"] == row["reward"] == expected and row["status/accuracy"] == "ok"
        assert row["seed"] == request_seed(0, row["sample_id"], 0, 0)
        assert row["kept"] == (row["reason"] is None) and ("correctness" in row["reasons"]) == (expected < 0.6)
    assert len({row["completion"] for row in samples}) > 100  # seeds differ, so answers do

    out = tmp_path / "killed"
    command = Command("posttrain.distill", str(recipe), f"output_dir={out}")
    wanted = random.Random(os.getpid()).randint(2, 120)
    journal, end = out / "journal/generations.jsonl", time.monotonic() + 200
    while not journal.exists() or journal.read_bytes().count(b"\n") <= wanted:
        assert command.process.poll() is None and time.monotonic() < end, command.process.communicate()[0]
        time.sleep(0.02)
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    paid = journal.read_bytes()
    assert wanted < paid.count(b"\n") < 161, "the run was over before it was killed"
    assert command.left_behind() == []

    code, output = Command("posttrain.distill", str(recipe), f"output_dir={out}", "--resume").finish()
    assert code == 0, output
    assert journal.read_bytes().startswith(paid[: paid.rindex(b"\n") + 1])  # not one was made again
    assert journal.read_bytes().count(b"\n") == 161
    assert rows_of(out / "dataset.parquet") == rows
    assert rows_of(out / "samples/generations.parquet") == samples
