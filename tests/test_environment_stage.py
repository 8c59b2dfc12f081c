"""GRPO over several turns as a user runs it: real Ray, vLLM, learner and environments, some of which fail."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from stage_commands import Command, metrics

RECIPE = """
stage: grpo
max_steps: 2
model: {model_name_or_path: %s}
datasets: [{task: letter_counting, levels: [1], size: 200}]
environment:
  {func: "%s:Moody", kwargs: {hangs: true}, max_turns: 3, max_turn_length: 6, timeout_seconds: 1, max_failed_fraction: 0.9}
rollout: {num_prompts: 4, num_generations: 4, max_completion_length: 40}
algorithm: {num_minibatches: 2, beta: 0.01}
optimizer: {learning_rate: 1.0e-3}
sampler: {max_model_len: 64, num_threads: 1}
parity: {canary_length: 32}
learner: {row_length: 64, max_tokens_per_microbatch: 512, num_threads: 1}
eval: {datasets: [{task: letter_counting, levels: [1], size: 6}], max_completion_length: 40, greedy: false}
"""

# A policy with random weights writes nothing that means anything, so every turn counts for its length.
MOODY = """
import time
from posttrain.types import Step

class Moody:
    def __init__(self, hangs=False):
        self.hangs = hangs

    def reset(self, prompt):
        self.turn = 0

    def step(self, text):
        self.turn += 1
        if self.hangs and len(text) == 4:
            time.sleep(60)
        if len(text) == 3:
            raise KeyError("three")
        return Step([{"role": "user", "content": "go on " + str(self.turn)}], reward=len(text) / 10)
"""


@pytest.fixture
def recipe(tmp_path: Path, policy_path: Path) -> Path:
    (tmp_path / "moody.py").write_text(MOODY)
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE % (ends_turns(policy_path, tmp_path / "policy"), tmp_path / "moody.py"))
    return file


def ends_turns(policy_path: Path, path: Path) -> Path:
    """The same policy with another head: its turns are short, so that there are several."""
    import torch

    from posttrain.model.load import load_policy, load_tokenizer, save_policy

    tokenizer = load_tokenizer(str(policy_path))
    policy = load_policy(
        str(policy_path),
        dtype="float32",
        attn_implementation="sdpa",
        experts_implementation="eager",
        trust_remote_code=False,
    )
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(0.02)  # all tokens about equally likely ...
    ends = [tokenizer.eos_token_id, *range(60, 100)]  # ... and two in five of them end a turn
    policy.config.eos_token_id = policy.generation_config.eos_token_id = ends
    path.mkdir()
    save_policy(policy, tokenizer, path)
    return path


def test_grpo_with_an_environment(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = Command("posttrain.grpo", str(recipe), f"output_dir={out}")
    code, output = command.finish()
    assert code == 0, output
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2]
    for step, line in enumerate(lines, start=1):
        assert line["parity/logprob_abs_max"] < 1e-4 and line["parity/routing_agreement"] >= 0.9999
        assert line["episode/turns_mean"] > 1
        rows = parquet.read_table(out / "samples" / f"step-{step:06d}.parquet").to_pylist()
        assert len(rows) == 16
        for status in ("crash", "timeout"):
            assert line[f"reward/environment/{status}"] == sum(row["status/environment"] == status for row in rows)
        judged = [row for row in rows if row["status/environment"] == "ok"]
        assert line["reward/unjudged"] == 16 - len(judged)
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in judged) / len(judged))
        several = [row for row in rows if "[user] go on 1" in row["episode"]]
        assert several and all(row["episode"].count("[assistant]") > 1 for row in several)
    assert sum(line["reward/unjudged"] for line in lines) > 0 and "environment: " in output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["eval"]["before"]["pass_at_1"]["n"] == 6
    assert command.left_behind() == []
