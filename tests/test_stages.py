"""The stages as a user runs them: commands, run directories, interrupts, resuming, a Ray job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet
import pytest
from stage_commands import ROOT, Command, is_marked, metrics, run, wait_for_step, write_grpo_recipe

CONTRACT = [
    "reward/mean",
    "reward/accuracy/mean",
    "reward/std",
    "completion/length_mean",
    "completion/truncated_fraction",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/kl_ref",
    "parity/logprob_abs_max",
    "parity/logprob_abs_mean",
    "parity/kl_sampler_learner",
    "parity/routing_agreement",
    "parity/flipped_tokens",
    "router/max_violation",
    "lag/max",
    "time/rollout",
    "time/reward",
    "time/learn",
    "time/publish",
    "time/step",
    "throughput/samples_per_second",
    "throughput/tokens_per_second",
]


@pytest.fixture
def recipe(tmp_path: Path, policy_path: Path) -> Path:
    return write_grpo_recipe(tmp_path, policy_path)


def test_grpo_leaves_everything_the_contract_names(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluation = "eval={datasets: [{task: letter_counting, levels: [1], size: 12}], max_completion_length: 16}"
    audit = "audit={verifier: {func: 'rewards.task_answer:score'}, num_samples: 8, window: 1, max_length_ratio: 1.0001}"
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", evaluation, audit)
    assert code == 0, output
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(CONTRACT) <= line.keys()
        assert line["parity/logprob_abs_max"] < 1e-4 and line["parity/routing_agreement"] >= 0.9999
        assert line["lag/max"] == 0 and line["publish/canary_gap_max"] < 1e-4
        assert line["audit/verifier_mean"] == 0.0 and "audit/reward_mean" in line
    assert "audit, step" in output and (out / "alarms.jsonl").exists()  # a ratio that any change of length exceeds
    for name in ("recipe.yaml", "environment.json", "summary.json", "report.html"):
        assert (out / name).exists(), name
    assert len(list((out / "samples").glob("step-*.parquet"))) == 3
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["stage"], summary["steps"], summary["finished"]) == ("grpo", 3, True)
    assert summary["eval"]["before"]["pass_at_1"]["n"] == summary["eval"]["after"]["pass_at_1"]["n"] == 12
    assert (out / "checkpoints" / "latest" / "config.json").exists()


# By the number of the call in its process, which a new process starts again.
MISBEHAVING = """
import itertools, os, subprocess, sys, time

calls = itertools.count()
hoard = []

def score(completion, answer, **metadata):
    number = next(calls)
    hoard.append(bytearray(b"x" * 2**20))
    if number % 5 == 1:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(200)"], start_new_session=True)
    if number == 7:
        raise KeyError("crash")
    if number == 11:
        time.sleep(200)
    return (len(completion) * 7 + completion.count("e")) % 5 / 5
"""


def test_a_reward_that_hangs_crashes_leaks_and_forks_does_not_stop_the_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "wild.py").write_text(MISBEHAVING)
    out = tmp_path / "run"
    wild = f"rewards=[{{func: '{tmp_path}/wild.py:score', name: wild, timeout_seconds: 0.3, on_timeout: -1}}]"
    command = Command("posttrain.grpo", str(recipe), f"output_dir={out}", wild)
    code, output = command.finish()
    assert code == 0, output
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for step, line in enumerate(lines, start=1):
        rows = parquet.read_table(out / "samples" / f"step-{step:06d}.parquet").to_pylist()
        assert len(rows) == 16  # no sample is lost
        for status, score in (("timeout", -1.0), ("crash", 0.0)):
            scores = [row["reward/wild"] for row in rows if row["status/wild"] == status]
            assert scores == [score] * int(line[f"reward/wild/{status}"])
        assert line["reward/wild/timeout"] >= 1 and line["reward/wild/restarts"] >= 1
    assert sum(line["reward/wild/crash"] for line in lines) >= 1
    assert "reward 'wild'" in output
    assert command.left_behind() == []


def test_a_reward_that_only_fails_stops_the_run_and_says_why(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def score(completion, answer, **metadata):\n    return metadata['nothing']\n")
    out = tmp_path / "run"
    broken = f"rewards=[{{func: '{tmp_path}/broken.py:score'}}]"
    command = Command("posttrain.grpo", str(recipe), f"output_dir={out}", broken)
    code, output = command.finish()
    assert code == 3, output
    assert "reward 'broken' failed on 16 of 16 completions" in output and "KeyError: 'nothing'" in output
    assert "Traceback" not in output
    assert command.left_behind() == []


def test_a_renewed_reference_is_kept_for_a_resumed_run(recipe: Path, tmp_path: Path) -> None:
    """Right after a renewal the policy is its own reference, also for a run that resumes there; before, it has moved. What
    was measured before the first step is not measured again of a later policy.
    """
    out = tmp_path / "run"
    keys = ["algorithm={preset: r1, beta: 0.05, reference_refresh_steps: 2, num_minibatches: 1}"]
    keys.append("eval={datasets: [{task: letter_counting, levels: [1], size: 12}], max_completion_length: 16}")
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys, "max_steps=2")
    assert code == 0, output
    assert {path.name for path in (out / "references").glob("step-*")} == {"step-2"}
    first = json.loads((out / "summary.json").read_text())["eval"]
    rows = parquet.read_table(out / "samples" / "eval-before.parquet")
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys, "max_steps=4", "--resume")
    assert code == 0, output
    assert json.loads((out / "summary.json").read_text())["eval"]["before"] == first["before"]
    assert parquet.read_table(out / "samples" / "eval-before.parquet").equals(rows)
    # One minibatch: the loss is taken before its step.
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert [line["policy/kl_ref"] < 1e-6 for line in metrics(out)] == [True, False, True, False]


def test_dynamic_sampling_of_groups_that_are_carried(recipe: Path, tmp_path: Path) -> None:
    """A reward that tells only some prompts apart, more groups than are waited for, and parity measured in training itself."""
    (tmp_path / "some.py").write_text(
        "def score(completion, answer, messages, **metadata):\n"
        "    told_apart = sum(map(ord, messages[-1]['content'])) % 3 == 0\n"
        "    return (len(completion) + completion.count('e')) % 5 / 5 if told_apart else 0.5\n"
    )
    out = tmp_path / "run"
    rewards = f"rewards=[{{func: '{tmp_path}/some.py:score'}}]"
    algorithm = "algorithm={preset: dapo, num_minibatches: 2, old_policy: sampler}"
    keys = [f"output_dir={out}", rewards, algorithm, "parity.measured_on=first_minibatch"]
    keys += ["rollout.oversampling=1.5", "sampler.max_num_seqs=6", "learner.share_prompts=true", "max_steps=4"]
    code, output = run("posttrain.grpo", str(recipe), *keys)
    assert code == 0, output
    lines = metrics(out)
    assert all(line["groups/sampled"] >= 4 for line in lines) and max(line["groups/sampled"] for line in lines) > 4
    assert all(line["rollout/carried"] > 0 and line["lag/max"] <= 1 for line in lines)
    assert lines[0]["lag/max"] == 0 < max(line["mismatch/kl_staleness"] for line in lines)
    unused = json.loads((out / "checkpoints/latest/progress.json").read_text())["prompts"]["unused"]
    assert len(unused) == lines[-1]["rollout/carried"]
    assert all(line["optim/steps"] >= 1 for line in lines)
    assert all(
        0 < line["parity/logprob_abs_max"] < 1e-4 and line["parity/routing_agreement"] > 0.9999 for line in lines
    )


def test_samples_ahead_of_the_learner_by_another_type_and_truncated(recipe: Path, tmp_path: Path) -> None:
    """Lag, in-flight updates, a bfloat16 sampler, replayed experts, top-k and top-p in one run; then it is resumed."""
    out = tmp_path / "run"
    keys = [
        "rollout={num_prompts: 4, num_generations: 4, max_completion_length: 16, max_lag: 1, in_flight_updates: true, "
        "top_p: 0.9, top_k: 20}",
        "algorithm={num_minibatches: 1, importance: truncate}",
        "router.replay=true",
        "sampler.dtype=bfloat16",
        "parity.max_logprob_gap=1",
        "parity.min_routing_agreement=0",
    ]
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys)
    assert code == 0, output
    lines = metrics(out)
    assert [line["lag/max"] for line in lines] == [0, 1, 1]
    assert lines[0]["parity/routing_agreement"] == 1.0  # later samples are an earlier version's
    assert 0 < lines[0]["mismatch/kl_precision"] + lines[0]["mismatch/kl_routing"] < 1e-2
    assert lines[0]["mismatch/kl_staleness"] == 0 < lines[1]["mismatch/kl_staleness"]
    assert 0.1 < lines[1]["mismatch/effective_sample_size"] < 1 and "policy/truncated_fraction" in lines[1]
    assert "router/layer_00/flip_rate" in lines[0]

    def cursor() -> int:
        return int(json.loads((out / "checkpoints/latest/progress.json").read_text())["prompts"]["position"])

    assert cursor() == 3 * 4  # of what was trained on, whatever was sampled ahead
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", *keys, "max_steps=5", "--resume")
    assert code == 0, output
    assert [line["lag/max"] for line in metrics(out)] == [0, 1, 1, 0, 1] and cursor() == 5 * 4


def test_a_breaker_masks_drops_and_rolls_back(recipe: Path, tmp_path: Path) -> None:
    """Samplers with a perturbed router for three versions; the run heals by itself."""
    out = tmp_path / "run"
    code, output = run(
        "posttrain.grpo",
        str(recipe),
        f"output_dir={out}",
        "max_steps=7",
        "faults={router_noise: 1.0, noisy_versions: [2, 3, 4]}",
        "parity.max_logprob_gap=1000",
        "parity.min_routing_agreement=0",
        "algorithm.num_minibatches=1",
        "breaker={max_kl: 1.0e-6, actions: [mask, publish, rollback, stop], healthy_steps: 2}",
    )
    assert code == 0, output
    lines = metrics(out)
    assert [line["breaker/tripped"] for line in lines] == [0, 0, 1, 1, 1, 0, 0]
    assert lines[2]["mismatch/kl_routing"] > 1e-6 and lines[2]["parity/routing_agreement"] < 1
    assert "policy/masked_fraction" in lines[2] and "policy/loss" not in lines[3]
    for step, action in ((3, "mask"), (4, "publish"), (5, "rollback")):
        assert f"breaker, step {step}: {action}" in output


def test_a_skipped_publication_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = Command("posttrain.grpo", str(recipe), f"output_dir={out}", "faults.skip_publication=2")
    code, output = command.finish()
    assert code == 3, output
    assert "publication of version 2 failed" in output and "version 2 was never loaded" in output
    assert "Traceback" not in output
    assert [line["step"] for line in metrics(out)] == [1]
    assert (out / "checkpoints" / "latest").resolve().name == "step-1"
    assert command.left_behind() == []


def test_an_interrupt_saves_cleans_up_and_can_be_resumed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = Command("posttrain.grpo", str(recipe), f"output_dir={out}", "max_steps=500", "checkpoint.save_steps=0")
    wait_for_step(out, command.process)
    os.killpg(command.process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
    code, output = command.finish()
    assert code == 130, output
    assert command.left_behind() == []
    stopped = metrics(out)[-1]["step"]
    assert (out / "checkpoints" / "latest").resolve().name == f"step-{int(stopped)}"
    assert not json.loads((out / "summary.json").read_text())["finished"]

    last = int(stopped) + 2
    code, output = run("posttrain.grpo", str(recipe), f"output_dir={out}", f"max_steps={last}", "--resume")
    assert code == 0, output
    assert [line["step"] for line in metrics(out)] == list(range(1, last + 1))


SFT = """
stage: sft
model: {build: {hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}}
datasets: [{task: letter_counting, levels: [1], size: 400, worked_fraction: 0.5}]
training: {max_length: 128, per_device_train_batch_size: 4, max_steps: %d, logging_steps: 1}
optimizer: {learning_rate: 2.0e-3, lr_scheduler_type: cosine, min_learning_rate: 1.0e-4}
router: {bias_update_speed: 0.001}
checkpoint: {save_steps: 4}
"""


def test_a_pipeline_runs_its_stages_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(SFT % 4)
    file = tmp_path / "both.yaml"
    file.write_text(
        "stage: pipeline\nstages:\n"
        f"  - {{name: sft, recipe: {tmp_path / 'sft.yaml'}}}\n"
        f"  - {{name: grpo, recipe: {recipe}, "
        "overrides: ['model.model_name_or_path={run_dir}/sft/checkpoints/latest', max_steps=2]}\n"
    )
    out = tmp_path / "both"
    code, output = run("posttrain.pipeline", str(file), f"output_dir={out}")
    assert code == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["stages"]) == ["sft", "grpo"]
    assert all(stage["finished"] and stage["seconds"] > 0 for stage in summary["stages"].values())
    assert (out / "report.html").exists()
    code, output = run("posttrain.pipeline", str(file), f"output_dir={out}")
    assert code == 0 and "sft: finished" in output and "grpo: finished" in output

    model = "model.model_name_or_path={run_dir}/sft/checkpoints/latest"
    changed = f"stages.1.overrides=['{model}', max_steps=2, rewards.0.weight=0.5]"
    earlier = (out / "grpo" / "stage.json").read_text()
    code, output = run("posttrain.pipeline", str(file), f"output_dir={out}", changed)
    assert code == 0 and "sft: finished" in output, output
    assert "grpo: started anew (rewards.0.weight 1.0 -> 0.5)" in output
    assert (out / "grpo.stale-1" / "stage.json").read_text() == earlier
    assert len(metrics(out / "grpo")) == 2 and "weight: 0.5" in (out / "grpo" / "recipe.yaml").read_text()
    code, output = run("posttrain.pipeline", str(file), f"output_dir={out}", "--prune")
    assert code == 0 and not (out / "grpo.stale-1").exists() and (out / "grpo").exists()


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray head of its own, with a dashboard on loopback that accepts jobs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("POSTTRAIN_TEST_MARK", uuid.uuid4().hex)
    ray = str(Path(sys.executable).parent / "ray")
    words = [ray, "start", "--head", "--block", "--port=6399", "--num-cpus=3"]
    words += ["--dashboard-host=127.0.0.1", "--dashboard-port=8299"]
    head = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    yield "http://127.0.0.1:8299"
    # Not `ray stop`: that would end every Ray of this machine.
    head.terminate()
    head.wait(timeout=60)


def test_a_ray_job_runs_the_stage_and_stopping_it_leaves_a_whole_checkpoint(
    recipe: Path, tmp_path: Path, dashboard: str
) -> None:
    from ray.job_submission import JobStatus

    client = wait_for_dashboard(dashboard)
    python = f"{sys.executable} -m posttrain.grpo {recipe}"
    done = submit(client, f"{python} output_dir={tmp_path / 'done'} max_steps=2")
    status = wait_for_end(client, done)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(done)
    assert json.loads((tmp_path / "done" / "summary.json").read_text())["finished"]

    out = tmp_path / "stopped"
    stopped = submit(client, f"{python} output_dir={out} max_steps=500")
    end = time.monotonic() + 200
    while not (out / "checkpoints" / "latest").exists():
        assert time.monotonic() < end, client.get_job_logs(stopped)
        time.sleep(0.3)
    client.stop_job(stopped)
    assert wait_for_end(client, stopped) in (JobStatus.STOPPED, JobStatus.FAILED)
    assert (out / "checkpoints" / "latest" / "progress.json").exists()
    end = time.monotonic() + 30
    while stage_processes():
        assert time.monotonic() < end, stage_processes()
        time.sleep(0.5)


def wait_for_dashboard(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    end = time.monotonic() + 60
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError:
            assert time.monotonic() < end
            time.sleep(1)


def submit(client: Any, entrypoint: str) -> Any:
    """The dashboard answers before the agent that starts jobs is there."""
    end = time.monotonic() + 120
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)})
        except RuntimeError as error:
            assert "No available agent" in str(error) and time.monotonic() < end, error
            time.sleep(1)


def wait_for_end(client: Any, job: str) -> Any:
    end = time.monotonic() + 300
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < end, client.get_job_logs(job)
        time.sleep(0.5)
    return client.get_job_status(job)


def stage_processes() -> list[str]:
    """Drivers, learners and samplers of this test's cluster that are alive."""
    names = ("posttrain.grpo", "ray::_SamplerActor", "ray::_LearnerActor")
    lines = (" ".join(p.cmdline()) for p in psutil.process_iter() if is_marked(p, os.environ["POSTTRAIN_TEST_MARK"]))
    return [line[:120] for line in lines if any(name in line for name in names)]
