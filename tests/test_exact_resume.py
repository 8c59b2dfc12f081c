"""Going on exactly, as a user does it: damaged checkpoints, changed recipes, skipped steps, a patience that is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sft_trainers import build_recipe, write_chats
from stage_commands import metrics, run, write_grpo_recipe

from posttrain import checkpoint, sft_parts
from posttrain.audit import forget_looks
from posttrain.ranks import join_ranks
from posttrain.run_dir import RunDir
from posttrain.sft import main
from posttrain.sft_trainer import PolicyTrainer

SFT = """
stage: sft
model: {build: {hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}}
datasets: [{task: letter_counting, levels: [1], size: 200, worked_fraction: 0.5}]
training: {max_length: 128, per_device_train_batch_size: 4, max_steps: 10, logging_steps: 1}
optimizer: {learning_rate: 2.0e-3, lr_scheduler_type: cosine, min_learning_rate: 1.0e-4}
router: {bias_update_speed: 0.001}
checkpoint: {save_steps: 4}
"""


@pytest.mark.slow
def test_sft_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "sft.yaml", tmp_path / "run"
    file.write_text(SFT)
    words = ["posttrain.sft", str(file), f"output_dir={out}"]
    code, output = run(*words)
    assert code == 0, output
    latest = out / "checkpoints" / "latest"
    # Copied: what is loaded is mapped into memory, and the file is about to be cut.
    weights = {name: tensor.clone() for name, tensor in load_file(latest / "model.safetensors").items()}
    lines = metrics(out)
    os.truncate(latest / "model.safetensors", (latest / "model.safetensors").stat().st_size // 2)

    assert main([*words[1:], "--resume", "optimizer.learning_rate=1.0e-3", "training.logging_steps=2"]) == 3
    said = capsys.readouterr().err
    assert "optimizer.learning_rate 0.002 -> 0.001" in said and "logging_steps" not in said
    assert said.endswith("--allow-change optimizer.learning_rate\n")
    assert "step-10 is damaged: model.safetensors has" in said and (out / "checkpoints/step-10.broken").is_dir()

    code, output = run(*words, "--resume")
    assert code == 0, output
    assert [line["step"] for line in metrics(out)] == list(range(1, 11))
    assert [line["train/loss"] for line in metrics(out)] == [line["train/loss"] for line in lines]
    found = load_file(latest / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_grpo_goes_back_when_no_step_can_be_taken(tmp_path: Path, policy_path: Path) -> None:
    recipe, out = write_grpo_recipe(tmp_path, policy_path), tmp_path / "run"
    words = ["posttrain.grpo", str(recipe), f"output_dir={out}"]
    code, output = run(*words, "max_steps=2")
    assert code == 0, output
    state = out / "checkpoints" / "step-2" / "trainer_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)

    impossible = ["optimizer.skip_grad_norm=1.0e-12", "optimizer.max_skipped_steps=2", "max_steps=9", "--resume"]
    allowed = "optimizer.skip_grad_norm,optimizer.max_skipped_steps"
    code, output = run(*words, *impossible, "--allow-change", allowed)
    assert code == 3, output
    assert "step-2 is damaged: trainer_state.pt has another content" in output and "step-2.broken" in output
    assert "optimizer.skip_grad_norm null -> 1e-12" in output
    # Two minibatches are not taken: back to step 1. The same in the next step: there is nothing else to try.
    assert "weights and optimizer are those of step-1 again" in output
    assert "at step 3 optimizer.max_skipped_steps steps in a row were not taken" in output and "Traceback" not in output
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2] and [line["optim/skipped"] for line in lines] == [0, 2]
    assert sorted(path.stem for path in (out / "samples").glob("*.parquet")) == ["step-000001", "step-000002"]
    first, now = (load_file(out / "checkpoints" / name / "model.safetensors") for name in ("step-1", "latest"))
    assert all(torch.equal(first[name], now[name]) for name in first)
    progress = checkpoint.load_progress(out / "checkpoints" / "latest")
    assert (progress["step"], progress["reference_step"]) == (2, None)
    assert progress["made_with"]["recipe"]["max_steps"] == 9


@pytest.fixture
def sft(policy_path: Path, tmp_path: Path) -> Callable[..., PolicyTrainer]:
    """A trainer of one recipe, at its start or at a checkpoint of its run."""
    write_chats(tmp_path / "chats.jsonl")

    def make(name: str, last: Path | None = None) -> PolicyTrainer:
        recipe = build_recipe(
            policy_path,
            tmp_path / "chats.jsonl",
            tmp_path / name,
            training={"max_steps": 30},
            optimizer={"learning_rate": 0.05},  # so high that the loss goes up again
            validation={"fraction": 0.3, "eval_steps": 1, "early_stopping_patience": 3},
            checkpoint={"save_steps": 1, "save_total_limit": 30},
        )
        job = sft_parts.load_job(recipe, policy_path, last, join_ranks())
        return sft_parts.build_trainer(recipe, RunDir(recipe.run_dir), job)

    return make


def test_early_stopping_counts_on_over_a_resume(sft: Callable[..., PolicyTrainer]) -> None:
    whole = sft("run")
    whole.train()
    whole.save_last(finished=True)
    stopped = whole.state.global_step
    assert 3 < stopped < 30
    last = whole._checkpoints / f"step-{stopped - 1}"  # after two of three evaluations without a better loss
    resumed = sft("run", last)
    resumed.train(resume_from_checkpoint=str(last))
    resumed.save_last(finished=True)
    assert resumed.state.global_step == stopped
    # Killed after it had stopped: there is nothing left to do.
    ended = sft("run", last.with_name(f"step-{stopped}"))
    ended.train(resume_from_checkpoint=str(last.with_name(f"step-{stopped}")))
    assert ended.state.global_step == stopped


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(policy_path: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")

    def trainer(last: Path | None) -> PolicyTrainer:
        recipe = build_recipe(
            policy_path, chats, tmp_path / "run", training={"max_steps": 3}, checkpoint={"save_steps": 1}
        )
        return sft_parts.build_trainer(
            recipe, RunDir(recipe.run_dir), sft_parts.load_job(recipe, policy_path, last, join_ranks())
        )

    whole = trainer(None)
    whole.train()
    last = whole.save_last(finished=True)
    before = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    resumed = trainer(last)
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.state.global_step == 3 and resumed.save_last(finished=True) == last
    assert all(torch.equal(weight, before[name]) for name, weight in resumed.model.state_dict().items())


def test_what_was_logged_after_the_checkpoint_is_dropped_everywhere(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for step in (1, 2, 3):
        run_dir.write_rows(f"step-{step:06d}", [{"x": step}])
    run_dir.write_rows("eval-before", [{"x": 0}])
    rows: list[dict[str, Any]] = [{"step": step, "alarm": "é"} for step in (1, 2, 3)]
    for name in ("alarms.jsonl", "suspicious.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.forget_samples(2)
    forget_looks(tmp_path, 2)
    names = sorted(path.stem for path in (tmp_path / "samples").iterdir())
    assert names == ["eval-before", "step-000001", "step-000002"]
    for name in ("alarms.jsonl", "suspicious.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]
