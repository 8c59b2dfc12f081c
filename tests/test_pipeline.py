"""A pipeline of real stages: killed at random moments, run again, changed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from stage_commands import Command, metrics, run

SFT = """
stage: sft
model: {build: {hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}}
datasets: [{task: letter_counting, levels: [1], size: 400, worked_fraction: 0.5}]
training: {max_length: 128, per_device_train_batch_size: 4, max_steps: 8, logging_steps: 1}
optimizer: {learning_rate: 2.0e-3, lr_scheduler_type: cosine, min_learning_rate: 1.0e-4}
router: {bias_update_speed: 0.001}
checkpoint: {save_steps: 2}
"""
STEPS = 8


@pytest.fixture
def two_stages(tmp_path: Path) -> Path:
    (tmp_path / "sft.yaml").write_text(SFT)
    file = tmp_path / "two.yaml"
    file.write_text(
        "stage: pipeline\nstages:\n"
        f"  - {{name: first, recipe: {tmp_path}/sft.yaml}}\n"
        f"  - name: second\n    recipe: {tmp_path}/sft.yaml\n"
        "    overrides: ['model={model_name_or_path: \"{run_dir}/first/checkpoints/latest\"}', seed=1]\n"
    )
    return file


def wait_for(directory: Path, step: int, command: Command) -> None:
    """Until a stage has logged a step."""
    end = time.monotonic() + 200
    while True:
        file = directory / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        assert command.process.poll() is None and time.monotonic() < end, command.process.communicate()[0]
        time.sleep(0.02)


def outputs(out: Path, stage: str) -> dict[str, str]:
    record = json.loads((out / stage / "stage.json").read_text())
    assert record["finished"]
    found: dict[str, str] = record["outputs"]
    return found


def times(out: Path) -> dict[str, int]:
    """Of every file that a run must leave alone when there is nothing to do."""
    caches = ("digests.json", ".lock", "lineage.json")
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name not in caches}


@pytest.mark.slow
def test_killed_at_random_moments_it_makes_the_same_and_then_has_nothing_to_do(
    two_stages: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    code, output = run("posttrain.pipeline", str(two_stages), f"output_dir={whole}")
    assert code == 0, output

    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails
    # In the first stage after its first checkpoint; wherever it may be by then; in the second stage.
    for number, (stage, step) in enumerate((("first", rng.randint(2, 6)), (None, 0), ("second", rng.randint(1, 6)))):
        command = Command("posttrain.pipeline", str(two_stages), f"output_dir={out}")
        if stage is not None:
            wait_for(out / stage, step, command)
        time.sleep(rng.uniform(0.0, 0.5) if stage is not None else rng.uniform(0.5, 6.0))
        command.process.kill()
        assert command.left_behind() == [], (seed, number)
        command.finish()
    code, output = run("posttrain.pipeline", str(two_stages), f"output_dir={out}")
    assert code == 0, (seed, output)
    for stage in ("first", "second"):
        assert f"checkpoints/step-{STEPS}/model.safetensors" in outputs(whole, stage)
        assert outputs(out, stage) == outputs(whole, stage), seed  # every file bit for bit
        assert [line["step"] for line in metrics(out / stage)] == list(range(1, STEPS + 1)), seed
    assert not list(out.glob("*.stale-*"))

    before, start = times(out), time.monotonic()
    code, output = run("posttrain.pipeline", str(two_stages), f"output_dir={out}")
    assert code == 0 and time.monotonic() - start < 10
    assert "first: finished (unchanged)" in output and "second: finished (unchanged)" in output
    assert times(out) == before

    tree = json.loads((out / "lineage.json").read_text())
    (model,) = tree["stages"]["second"]["inputs"]
    assert model["artefact"] == f"first/checkpoints/step-{STEPS}" and model["sha256"]
    code, output = run("posttrain.pipeline", str(two_stages), f"output_dir={out}", "--lineage")
    assert code == 0 and f"made second/checkpoints/step-{STEPS} = second/checkpoints/latest" in output
