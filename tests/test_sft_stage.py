"""The SFT stage as a user runs it: killed and resumed, several ranks, streams, adapters, a prediction module."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_commands import ROOT, Command, metrics, run, transformers_logprobs, vllm_logprobs, wait_for_step

SFT = """
stage: sft
model: {build: {hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}}
datasets: [{task: letter_counting, levels: [1], size: 400, worked_fraction: 0.5}]
training: {max_length: 128, per_device_train_batch_size: 4, max_steps: 60, logging_steps: 1}
optimizer: {learning_rate: 2.0e-3, lr_scheduler_type: cosine, min_learning_rate: 1.0e-4}
router: {bias_update_speed: 0.001, sequence_balance_alpha: 0.001}
checkpoint: {save_steps: 5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "sft.yaml"
    file.write_text(SFT)
    return file


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "checkpoints" / "latest" / "model.safetensors")


def assert_same_to_the_bit(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_at_random_moments_the_weights_are_the_same_to_the_bit(
    recipe: Path, tmp_path: Path, streaming: bool
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["posttrain.sft", str(recipe), f"preparation.streaming={str(streaming).lower()}"]
    code, output = run(*words, f"output_dir={whole}")
    assert code == 0, output
    seed = time.time_ns()
    print(f"kill times drawn with seed {seed}")
    rng = random.Random(seed)
    kills = 0
    for _ in range(1 if streaming else 2):
        resume = ["--resume"] if any((broken / "checkpoints").glob("step-*[0-9]")) and kills else []
        command = Command(*words, f"output_dir={broken}", *resume)
        steps = len(metrics(broken)) if resume else 0
        wait_for_lines(broken, command.process, steps + rng.randint(6, 15))
        command.process.send_signal(signal.SIGKILL)
        kills += command.finish()[0] == -signal.SIGKILL
    assert kills
    assert not (broken / "summary.json").exists()
    code, output = run(*words, f"output_dir={broken}", "--resume")
    assert code == 0, output
    assert_same_to_the_bit(weights(broken), weights(whole))
    assert any(name.endswith("e_score_correction_bias") and bool(t.any()) for name, t in weights(whole).items())
    assert [line["step"] for line in metrics(broken)] == list(range(1, 61))
    assert [line["train/loss"] for line in metrics(broken)] == [line["train/loss"] for line in metrics(whole)]
    losses = [line["train/loss"] for line in metrics(whole)]
    assert losses[-1] < 0.8 * losses[0]


def wait_for_lines(out: Path, process: subprocess.Popen[str], count: int, timeout: float = 120) -> None:
    wait_for_step(out, process)
    end = time.monotonic() + timeout
    while len((out / "metrics.jsonl").read_text().splitlines()) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupt_saves_the_step_it_was_at(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = Command("posttrain.sft", str(recipe), f"output_dir={out}", "training.max_steps=5000")
    wait_for_lines(out, command.process, 3)
    os.killpg(command.process.pid, signal.SIGINT)
    code, output = command.finish()
    assert code == 130, output
    assert command.left_behind() == []
    last = int(metrics(out)[-1]["step"])
    assert (out / "checkpoints" / "latest").resolve().name == f"step-{last}"
    assert not json.loads((out / "summary.json").read_text())["finished"]


def test_two_ranks_train_what_one_does(recipe: Path, policy_path: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["training.max_steps=6", "mtp={init: new}", "validation={fraction: 0.2, eval_steps: 3}"]
    words.append(f"teacher={{model_name_or_path: {policy_path}, weight: 0.4, temperature: 1.5, top_k: 8}}")
    code, output = run("posttrain.sft", str(recipe), f"output_dir={one}", *words)
    assert code == 0, output
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29713"]
    stage = ["-m", "posttrain.sft", str(recipe), f"output_dir={two}", "training.per_device_train_batch_size=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*ranks, *stage], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=5e-5, rtol=1e-4)
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        keys = ["train/nll", "train/balance_loss", "train/mtp_loss", "router/max_violation", "train/grad_norm"]
        for key in [*keys, "distillation/divergence", "distillation/teacher_mass"]:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    assert metrics(two)[-1]["validation/loss"] == pytest.approx(metrics(one)[-1]["validation/loss"], rel=1e-4)


def test_a_prediction_module_is_trained_saved_and_resumed(recipe: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    words = ["posttrain.sft", str(recipe), "mtp={init: new}", "training.max_steps=10"]
    code, output = run(*words, f"output_dir={whole}")
    assert code == 0, output
    losses = [line["train/mtp_loss"] for line in metrics(whole)]
    assert losses[-1] < losses[0]
    latest = whole / "checkpoints" / "latest"
    assert json.loads((latest / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert any(name.startswith("model.layers.2.eh_proj") for name in all_tensors(latest))
    # As if the machine had died after step 5.
    code, output = run(*words, f"output_dir={halves}")
    assert code == 0, output
    remove_checkpoint(halves, 10)
    code, output = run(*words, f"output_dir={halves}", "--resume")
    assert code == 0, output
    assert_same_to_the_bit(all_tensors(halves / "checkpoints" / "latest"), all_tensors(latest))
    # What the next stage does not train it carries along.
    carried = tmp_path / "carried"
    more = [f"model={{model_name_or_path: {latest}}}", "training.max_steps=2", f"output_dir={carried}"]
    code, output = run("posttrain.sft", str(recipe), *more)
    assert code == 0, output
    found = all_tensors(carried / "checkpoints" / "latest")
    assert torch.equal(found["model.layers.2.eh_proj.weight"], all_tensors(latest)["model.layers.2.eh_proj.weight"])


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def remove_checkpoint(directory: Path, step: int) -> None:
    import shutil

    shutil.rmtree(directory / "checkpoints" / f"step-{step}")


def test_adapters_are_trained_merged_and_resumed(recipe: Path, policy_path: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    words: list[Any] = ["posttrain.sft", str(recipe), "lora={r: 4, alpha: 8}", "training.max_steps=10"]
    words += [f"model={{model_name_or_path: {policy_path}}}", "router={}"]
    code, output = run(*words, f"output_dir={whole}")
    assert code == 0, output
    base, merged = load_file(policy_path / "model.safetensors"), weights(whole)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any(".experts." in name for name in changed) and any("self_attn" in name for name in changed)
    assert not any("mlp.gate." in name or "embed" in name or "norm" in name for name in changed)
    assert (whole / "checkpoints" / "latest" / "adapter" / "adapter_model.safetensors").exists()
    code, output = run(*words, f"output_dir={halves}")
    assert code == 0, output
    remove_checkpoint(halves, 10)
    code, output = run(*words, f"output_dir={halves}", "--resume")
    assert code == 0, output
    assert_same_to_the_bit(weights(halves), merged)
    latest = whole / "checkpoints" / "latest"
    sequences = [[1, 4, *range(11, 40), 5, 20, 21], [1, 4, 30, 12, 5, 17]]
    expected = transformers_logprobs(latest, sequences)
    for found, wanted in zip(vllm_logprobs(latest, sequences), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_preflight_alone_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = run("posttrain.sft", str(recipe), f"output_dir={out}", "--preflight")
    assert code == 0, output
    facts = json.loads((out / "preflight.json").read_text())
    assert facts
    assert not (out / "metrics.jsonl").exists() and not (out / "summary.json").exists()


def test_a_run_whose_end_of_turn_is_never_trained_does_not_start(recipe: Path, tmp_path: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{{ eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    words = [f"output_dir={tmp_path / 'run'}", f"training.chat_template={template}"]
    code, output = run("posttrain.sft", str(recipe), *words)
    assert code == 3, output
    assert "stopped:" in output and "<eos>" in output and "Traceback" not in output
