"""PPO with a critic, on-policy distillation and adapters as a user runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_commands import metrics, run, write_grpo_recipe

from posttrain.model.checkpoint_files import CheckpointFiles


@pytest.fixture
def recipe(tmp_path: Path, policy_path: Path) -> Path:
    return write_grpo_recipe(tmp_path, policy_path)


def test_ppo_warms_its_critic_up_and_resumes_with_it_and_the_best_checkpoint(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keys = (
        "rollout={num_prompts: 8, num_generations: 1, max_completion_length: 16}",
        "algorithm={preset: ppo, num_minibatches: 2}",
        "critic={warmup_steps: 1, optimizer: {learning_rate: 1.0e-3, lr_scheduler_type: linear, warmup_steps: 100}}",
        "eval={datasets: [{task: letter_counting, levels: [1], size: 4}], max_completion_length: 16, greedy: false, "
        "eval_steps: 1}",
        "checkpoint={save_steps: 1, save_total_limit: 1, keep_best: true}",
        "curriculum={order: level, max_pass_rate: 0.5}",
    )
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys, "max_steps=2")
    assert code == 0, output
    # The critic's schedule depends on the length of the run.
    going_on = ("--resume", "--allow-change", "max_steps")
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys, "max_steps=3", *going_on)
    assert code == 0, output
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "policy/loss" not in lines[0] and "policy/loss" in lines[1]
    for line in lines:
        assert line["critic/value_loss"] > 0 and line["critic/explained_variance"] <= 1
        assert {"critic/clip_fraction", "critic/value_mean", "critic/grad_norm"} <= line.keys()
    # Prompts are measured in every step, and what was measured before resuming still counts.
    assert [line["curriculum/measured"] for line in lines] == [8, 16, 24]
    # The critic's schedule goes on where it was: its sixth step is taken in the third step of the run.
    assert [line["critic/learning_rate"] for line in lines] == pytest.approx([1e-5, 3e-5, 5e-5])
    # A policy with random weights is never right: the first checkpoint that was measured stays the best.
    assert (out / "checkpoints" / "best").resolve().name == "step-1"
    assert (out / "checkpoints" / "latest").resolve().name == "step-3"
    assert (out / "checkpoints" / "latest" / "critic" / "model.safetensors").exists()


def test_distillation_measures_how_far_the_teacher_is(recipe: Path, tmp_path: Path, policy_path: Path) -> None:
    """The policy is its own teacher, until the reward beside it has moved it."""
    out = tmp_path / "run"
    keys = ("algorithm={preset: on_policy_distillation, num_minibatches: 1}", "max_steps=2")
    code, output = run(
        "posttrain.grpo", str(recipe), f"output_dir={out}", *keys, f"teacher={{model_name_or_path: {policy_path}}}"
    )
    assert code == 0, output
    distances = [abs(line["policy/kl_teacher"]) for line in metrics(out)]
    assert distances[0] < 1e-6 < distances[1]


def test_adapters_are_published_merged_and_a_resumed_run_repeats_an_unbroken_one(recipe: Path, tmp_path: Path) -> None:
    settings = [
        "lora={r: 4, targets: [attention, routed_experts]}",
        "rollout.request_seeds=true",
        "algorithm.beta=0.05",
        "checkpoint={save_steps: 1, save_total_limit: 3}",
        "max_steps=3",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={whole}", *settings)
    assert code == 0, output
    # As if it had been killed in its third step.
    shutil.copytree(whole, broken, symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-3")
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={broken}", *settings, "--resume")
    assert code == 0, output
    lines = metrics(whole)
    assert len(lines) == 3
    names = ("reward/mean", "completion/length_mean", "policy/loss", "optim/grad_norm")
    assert [[line[name] for name in names] for line in metrics(broken)] == [
        [line[name] for name in names] for line in lines
    ]
    for line in lines:
        # Samplers hold merged weights, the learner computes with adapters beside them.
        assert line["publish/canary_gap_max"] < 1e-4 and line["parity/logprob_abs_max"] < 1e-4
    assert lines[0]["policy/kl_ref"] < lines[-1]["policy/kl_ref"]
    assert (whole / "checkpoints" / "latest" / "adapter" / "adapter_config.json").exists()
    expected, found = (load_file(out / "checkpoints" / "latest" / "model.safetensors") for out in (whole, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_experts_and_rows_divided_over_two_ranks_are_published_and_make_the_run_of_one(
    recipe: Path, tmp_path: Path
) -> None:
    settings = ["rollout.request_seeds=true", "algorithm.beta=0.05", "router.bias_update_speed=0.001", "max_steps=2"]
    divided = (
        "learner.num_workers=2", "learner.parallel=fsdp", "learner.expert_parallel_size=2", "learner.context_parallel_size=2",
        "learner.num_threads=1",
    )  # fmt: skip
    alone, both = tmp_path / "alone", tmp_path / "both"
    for out, words in ((alone, ()), (both, divided)):
        code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *settings, *words)
        assert code == 0, output
    expected, found = metrics(alone), metrics(both)
    for line in found:
        # What each rank gathered and sent is what the sampler uses, and what the learner computes.
        assert line["publish/canary_gap_max"] < 1e-4 and line["parity/logprob_abs_max"] < 1e-4
        assert line["publish/megabytes"] == expected[0]["publish/megabytes"]
    for name in ("reward/mean", "completion/length_mean", "policy/loss", "policy/entropy", "policy/kl_ref"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-4, abs=1e-6), name
    assert found[0]["optim/grad_norm"] == pytest.approx(expected[0]["optim/grad_norm"], rel=1e-4)
    assert [line["router/max_violation"] for line in found] == pytest.approx(
        [line["router/max_violation"] for line in expected], rel=1e-4
    )
    one, many = (CheckpointFiles(out / "checkpoints" / "latest") for out in (alone, both))
    assert one.tensors.keys() == many.tensors.keys() and len([*many.directory.glob("model-*.safetensors")]) > 2
    assert all(float((one.read(name) - many.read(name)).abs().max()) < 1e-4 for name in one.tensors)
    # What two ranks wrote, one goes on from.
    code, output = run(
        "posttrain.grpo",
        str(recipe),
        f"output_dir={both}",
        *settings,
        "max_steps=3",
        "--resume",
        "--allow-change",
        "max_steps",
    )
    assert code == 0, output
    assert [line["step"] for line in metrics(both)] == [1, 2, 3]
