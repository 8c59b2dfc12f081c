"""Stages as commands of their own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent

GRPO = """
stage: grpo
max_steps: 3
model: {model_name_or_path: %s}
datasets: [{task: letter_counting, levels: [1], size: 200}]
rewards:
  - {func: "rewards.format:score", name: format}
  - {func: "%s:score", name: accuracy}
rollout: {num_prompts: 4, num_generations: 4, max_completion_length: 16}
algorithm: {num_minibatches: 2}
optimizer: {learning_rate: 1.0e-3}
sampler: {max_model_len: 64, num_threads: 1}
parity: {canary_length: 32}
learner: {row_length: 64, max_tokens_per_microbatch: 512, num_threads: 1}
checkpoint: {save_steps: 1}
"""

# A policy with random weights is never right, so this reward gives the groups something to differ in.
REWARD = (
    "def score(completion, answer, **metadata):\n    return (len(completion) * 7 + completion.count('e')) % 5 / 5\n"
)


class Command:
    """A command in a process group of its own, with a mark by which its descendants are found."""

    def __init__(self, *words: str, cwd: Path = ROOT) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "POSTTRAIN_TEST_MARK": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def left_behind(self, within: float = 20) -> list[str]:
        """Descendants that still live after so many seconds."""
        end = time.monotonic() + within
        while True:
            found = [" ".join(p.cmdline())[:120] for p in psutil.process_iter() if is_marked(p, self.mark)]
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.5)


def is_marked(process: psutil.Process, mark: str) -> bool:
    """Whether a process that runs was started with this mark in its environment."""
    try:
        return process.environ().get("POSTTRAIN_TEST_MARK") == mark and process.status() != "zombie"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def run(*words: str) -> tuple[int, str]:
    return Command(*words).finish()


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(out: Path, process: subprocess.Popen[str], timeout: float = 200, after: int = 0) -> None:
    """Wait until the process has logged a step, beyond the `after` lines that are there."""
    end = time.monotonic() + timeout
    file = out / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) <= after:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.3)


def vllm_logprobs(checkpoint: Path, sequences: list[list[int]], max_model_len: int = 128) -> list[list[float]]:
    """What a vLLM engine in a process of its own says of given tokens: the logprob of each but the first."""
    code = """
import json, os, sys
from posttrain.sampler import Sampler, engine_environment
os.environ.update(engine_environment(2, 1))
path, length, sequences = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
sampler = Sampler(
    path, dtype="float32", max_model_len=length, max_num_seqs=8, gpu_memory_utilization=0.5, trust_remote_code=False, seed=0
)
print(json.dumps([logprobs for logprobs, _ in sampler.prompt_logprobs(sequences)]))
"""
    words = [sys.executable, "-c", code, str(checkpoint), str(max_model_len), json.dumps(sequences)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def transformers_logprobs(checkpoint: Path, sequences: list[list[int]]) -> list[list[float]]:
    """The same by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    for sequence in sequences:
        ids_T = torch.tensor(sequence)
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids_T[None], use_cache=False).logits[0], dim=-1)
        found.append(logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist())
    return found


def write_grpo_recipe(directory: Path, policy_path: Path) -> Path:
    """A recipe of three short steps with a reward of its own, in a directory. Returns the file."""
    (directory / "reward.py").write_text(REWARD)
    file = directory / "tiny.yaml"
    file.write_text(GRPO % (policy_path, directory / "reward.py"))
    return file
