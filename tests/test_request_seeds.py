"""A run whose completions have seeds of their own is repeated by one that was resumed, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_commands import metrics, run, write_grpo_recipe


@pytest.fixture
def recipe(tmp_path: Path, policy_path: Path) -> Path:
    return write_grpo_recipe(tmp_path, policy_path)


def test_a_resumed_run_draws_what_an_unbroken_one_draws(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seeds = "rollout={num_prompts: 4, num_generations: 4, max_completion_length: 16, request_seeds: true}"
    for out, *keys in ((whole, "max_steps=4"), (broken, "max_steps=2"), (broken, "max_steps=4", "--resume")):
        code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", seeds, *keys)
        assert code == 0, output
    names = ("reward/mean", "completion/length_mean", "policy/loss", "optim/grad_norm")
    assert [[line[name] for name in names] for line in metrics(broken)] == [
        pytest.approx([line[name] for name in names], rel=1e-4) for line in metrics(whole)
    ]
