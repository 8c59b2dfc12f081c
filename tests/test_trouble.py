"""What a run leaves when it ends badly: log, flight record, the logs of Ray's processes, crash bundles and their replay."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stage_commands import ROOT

from posttrain import process_logs, replay
from posttrain.bundles import GRAD_NORM, LOSS, BundleKeeper, read_bundle
from posttrain.cli import run_stage
from posttrain.errors import RunStopped
from posttrain.flight_recorder import FlightRecorder, record, recording
from posttrain.learner import Learner
from posttrain.metrics import Metric
from posttrain.packing import pack
from posttrain.recipe import GrpoRecipe
from posttrain.types import Completion, Group, Prompt, Sample

SFT = (
    "stage: sft\nmodel: {build: {}}\ndatasets: [{task: chain_sum, size: 9}]\ntraining: {max_steps: 1}\noutput_dir: %s\n"
)

# --- flight recorder ----------------------------------------------------------------------------------------------------


def test_the_last_events_are_kept() -> None:
    recorder = FlightRecorder(size=3)
    for step in range(5):
        recorder.record("step", step=step)
    assert [event["step"] for event in recorder.events()] == [2, 3, 4]
    assert all(event["event"] == "step" and event["time"] > 0 for event in recorder.events())


def test_a_stage_that_fails_leaves_log_and_flight_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-key-123")
    out, file = tmp_path / "run", tmp_path / "r.yaml"
    file.write_text(SFT % out)

    def stage(recipe: Any, **_: Any) -> int:
        out.mkdir()
        record("step", step=1, metrics={"loss": math.nan, "odd": {1, 2}})
        logging.getLogger("some.library").warning("careful with %s", "planted-key-123")
        raise RunStopped("the key planted-key-123 does not work")

    assert run_stage("sft", stage, [str(file)]) == 3
    said = capsys.readouterr().err
    (path,) = (out / "crash").glob("sft-*.json")
    assert f"flight record: {path}" in said and "stopped: the key *** does not work" in said
    kept = json.loads(path.read_text())
    assert kept["error"] == "RunStopped" and "in stage" in kept["traceback"]
    assert [event["event"] for event in kept["events"][-3:]] == ["start", "step", "end"]
    log = (out / "logs" / "sft.log").read_text()
    assert "step" in log and "careful with ***" in log and "RunStopped" in log
    assert "planted-key-123" not in said + log + path.read_text()


def test_a_stage_that_ends_well_or_never_starts_leaves_no_record(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with recording("sft", out):
        record("step", step=1)
    assert not (out / "crash").exists() and [path.name for path in (out / "logs").iterdir()] == ["sft.log"]
    with pytest.raises(KeyboardInterrupt), recording("sft", out):
        raise KeyboardInterrupt
    assert not (out / "crash").exists()  # somebody's wish
    with pytest.raises(ValueError), recording("sft", tmp_path / "not made"):
        raise ValueError
    assert not (tmp_path / "not made").exists()


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(RunStopped, match="the real one"), recording("sft", out):
        monkeypatch.setattr(Path, "open", refuse)
        raise RunStopped("the real one")


def test_an_interpreter_that_dies_says_where(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import faulthandler, sys; from pathlib import Path; from posttrain.flight_recorder import record, recording\n"
        f"out = Path({str(out)!r})\n"
        "def deep(): faulthandler._sigsegv()\n"
        "with recording('sft', out):\n    out.mkdir(); record('step', step=1); deep()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -11
    said = (out / "logs" / "sft.fatal").read_text()
    assert "Segmentation fault" in said and "in deep" in said


# --- logs of other processes --------------------------------------------------------------------------------------------


def test_logs_of_this_run_and_no_other_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-key-123")
    ray, target = tmp_path / "ray", tmp_path / "logs"
    ray.mkdir()
    head = ":job_id:01000000\n:actor_name:_SamplerActor\n"
    (ray / f"worker-{'a' * 56}-01000000-77.out").write_text(f"{head}hello planted-key-123\n")
    (ray / f"worker-{'a' * 56}-01000000-77.err").write_text(f"{head}{'x' * process_logs.LONGEST}the end\n")
    (ray / f"worker-{'b' * 56}-02000000-78.out").write_text(f"{head}of another run\n")
    (ray / f"worker-{'c' * 56}-01000000-79.out").write_text("idle\n")
    (ray / "raylet.out").write_bytes(b"\xff raylet\n")
    process_logs.point_to(ray, target)
    process_logs.gather(ray, target, "01000000")
    assert sorted(path.name for path in target.iterdir()) == ["raylet.log", "sampler-77.log", "where.txt"]
    text = (target / "sampler-77.log").read_text()
    assert "hello ***\n" in text and "the end\n" in text and ":job_id" not in text
    assert len(text) < 1.1 * process_logs.LONGEST and (target / "where.txt").read_text() == f"{ray}\n"


# --- bundles and replay -------------------------------------------------------------------------------------------------


class LocalLearner:
    """A learner in this process behind the calls of a group."""

    def __init__(self, recipe: GrpoRecipe) -> None:
        torch.set_num_threads(1)
        self.world_size, self._recipe = 1, recipe
        self._learner = Learner(
            recipe.model,
            recipe.optimizer,
            recipe.learner,
            reference_path=None,
            router_section=recipe.router,
            temperature=1.0,
            max_completion_length=16,
            total_steps=9,
            seed=0,
        )
        self.gradients, self.save, self.optim_step = (
            self._learner.gradients,
            self._learner.save,
            self._learner.optim_step,
        )

    def forward_backward(self, samples: Sequence[Sample], algorithm: Any) -> Any:
        section = self._recipe.learner
        (batch,) = pack(
            samples,
            world_size=1,
            max_tokens_per_microbatch=section.max_tokens_per_microbatch,
            row_length=section.row_length,
            pad_token_id=0,
            with_experts=self._recipe.router.replay,
        )
        return self._learner.forward_backward(batch, algorithm)


def samples(count: int = 6) -> list[Sample]:
    """With routes, per-token advantages, and tokens of an environment, so that every field is there."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        prompt, answer = int(rng.integers(3, 8)), int(rng.integers(4, 12))
        logprobs = tuple(float(value) for value in -rng.random(answer))
        experts = np.stack([rng.permutation(8)[:2] for _ in range(prompt + answer - 1)])[:, None].astype(np.int16)
        found.append(
            Sample(
                tuple(int(token) for token in rng.integers(11, 100, prompt)),
                tuple(int(token) for token in rng.integers(11, 100, answer)),
                logprobs,
                0.1 * number - 0.2 if number % 2 else tuple(float(value) for value in rng.normal(size=answer)),
                experts,
                old_logprobs=tuple(value + 0.01 for value in logprobs),
                trained=None if number % 3 else (True, False, *(True,) * (answer - 2)),
                stale_tokens=number,
                place=(0, number),
            )
        )
    return found


@pytest.fixture
def job(policy_path: Path) -> Any:
    recipe = GrpoRecipe.model_validate(
        {
            "stage": "grpo",
            "max_steps": 9,
            "model": {"model_name_or_path": str(policy_path)},
            "datasets": [{"task": "chain_sum", "size": 9}],
            "rewards": [{"func": "rewards.format:score"}],
            "learner": {"row_length": 64, "max_tokens_per_microbatch": 128, "num_threads": 1},
            "router": {"replay": True},
            "sampler": {"max_model_len": 64},
            "parity": {"canary_length": 32},
            "rollout": {"max_completion_length": 16, "num_prompts": 2, "num_generations": 4},
        }
    )
    return SimpleNamespace(recipe=recipe, step=11, learner=LocalLearner(recipe), publisher=SimpleNamespace(receipts=[]))


def batch_of(minibatch: Sequence[Sample]) -> Any:
    prompt = Prompt("chain_sum/1", ({"role": "user", "content": "1+1="},), (1,), "2")
    completions = tuple(
        Completion(s.completion_ids, s.sampler_logprobs, "stop", f"text {s.place}", 11) for s in minibatch
    )
    rewards = tuple(float(number) for number, _ in enumerate(minibatch))
    return SimpleNamespace(groups=[Group(prompt, completions, rewards, {"format": rewards})])


def keep(job: Any, directory: Path, minibatch: Sequence[Sample], error: Exception | None) -> dict[str, float]:
    """A step that goes wrong after its backward pass, or that ends with what it computed. Returns that."""
    keeper = BundleKeeper(directory)
    keeper.begin(batch_of(minibatch))
    found: dict[str, float] = {}
    try:
        with keeper.watch(job, minibatch, job.recipe.algorithm) as seen:
            seen.update(job.learner.forward_backward(minibatch, job.recipe.algorithm))
            found[LOSS] = seen[LOSS].value
            if error is not None:
                raise error
            seen.update(job.learner.optim_step())
    except RunStopped:
        assert error is not None
    return found


def test_a_bad_step_is_computed_again_bit_for_bit(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-key-123")
    minibatch = samples()
    found = keep(job, tmp_path, minibatch, RunStopped("something is wrong with planted-key-123"))
    (path,) = (tmp_path / "crash").iterdir()
    assert path.name == "step-12-minibatch-0"
    bundle = read_bundle(path)
    assert bundle.expected[LOSS] == found[LOSS] != 0 and bundle.expected[GRAD_NORM] > 0
    for before, after in zip(minibatch, bundle.samples, strict=True):
        assert np.array_equal(before.experts_TLK, after.experts_TLK)  # type: ignore[arg-type]
        assert replace(before, experts_TLK=None) == replace(after, experts_TLK=None)
    told = bundle.contents["completions"][2]
    assert told["reward"] == 2.0 and told["text"] == "text (0, 2)" and told["components"] == {"format": 2.0}
    assert bundle.contents["policy_version"] == 11 and bundle.contents["packages"]["torch"] == torch.__version__
    assert {file.suffix for file in path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert "planted-key-123" not in (path / "bundle.json").read_text()

    assert replay.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("the same") == 2 and "DIFFERENT" not in said
    assert replay.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True

    # And a bundle with one other token is not the same.
    with safe_open(path / "samples.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["0.completion_ids"][0] = (tensors["0.completion_ids"][0] + 1) % 100
    from safetensors.torch import save_file

    save_file(tensors, path / "samples.safetensors")
    assert replay.main([str(path)]) == 1 and "DIFFERENT" in capsys.readouterr().out


def test_a_step_that_is_not_finite_is_kept_and_a_good_one_is_not(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    minibatch = samples()
    keep(job, tmp_path, minibatch, None)
    assert not (tmp_path / "crash").exists()
    broken = [replace(minibatch[0], advantage=math.nan), *minibatch[1:]]
    keep(job, tmp_path, broken, RunStopped("the gradient norm is nan"))
    (path,) = (tmp_path / "crash").iterdir()
    assert math.isnan(read_bundle(path).expected[LOSS]) and math.isnan(read_bundle(path).expected[GRAD_NORM])
    assert replay.main([str(path)]) == 0 and "the same" in capsys.readouterr().out


def test_a_step_that_the_learner_skips_is_kept(job: Any, tmp_path: Path) -> None:
    minibatch, keeper = samples(2), BundleKeeper(tmp_path)
    keeper.begin(batch_of(minibatch))
    with keeper.watch(job, minibatch, job.recipe.algorithm) as seen:
        seen.update(job.learner.forward_backward(minibatch, job.recipe.algorithm))
        norm = replay_norm(job)
        job.learner._learner.drop_gradients()
        seen.update({"optim/skipped": Metric(1.0, "sum"), "optim/skipped_grad_norm": Metric(norm, "last")})
    (path,) = (tmp_path / "crash").iterdir()
    assert (
        read_bundle(path).expected[GRAD_NORM] == norm and "optim/skipped is 1.0" in read_bundle(path).contents["reason"]
    )
    assert replay.main([str(path)]) == 0


def test_weights_that_give_nan_are_replayed_all_the_same(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parameter in job.learner._learner._model.parameters():
        parameter.data.fill_(math.inf)  # as one step with a far too large learning rate does
    keep(job, tmp_path, samples(2), RunStopped("the gradient norm is nan"))
    (path,) = (tmp_path / "crash").iterdir()
    assert replay.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("the same") == 2 and "gives NaN whatever it reads" in said


def replay_norm(job: Any) -> float:
    from posttrain.bundles import norm

    return norm(job.learner.gradients())


def test_a_learner_that_is_gone_leaves_the_samples(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.publisher.receipts = [SimpleNamespace(num_bytes=2**50)]  # a policy too large to be written beside it
    keep(job, tmp_path, samples(), RunStopped("x"))
    (path,) = (tmp_path / "crash").iterdir()
    capsys.readouterr()
    assert replay.main([str(path)]) == 2 and "the policy is not in it" in capsys.readouterr().err


def test_a_bundle_from_elsewhere_runs_no_code(tmp_path: Path, job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    keep(job, tmp_path, samples(2), RunStopped("x"))
    (path,) = (tmp_path / "crash").iterdir()
    contents = json.loads((path / "bundle.json").read_text())
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef loss(*a, **k): pass\n")
    for change in (
        {"algorithm": {**contents["algorithm"], "policy_loss": f"{evil}:loss"}},
        {"recipe": trusting(contents)},
    ):
        (path / "bundle.json").write_text(json.dumps({**contents, **change}))
        capsys.readouterr()
        assert replay.main([str(path)]) == 2 and "--trust-code" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def trusting(contents: Any) -> Any:
    return {**contents["recipe"], "model": {**contents["recipe"]["model"], "trust_remote_code": True}}


def test_what_is_no_bundle_is_refused_in_one_line(tmp_path: Path, job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(tmp_path)]) == 2
    keep(job, tmp_path, samples(2), RunStopped("x"))
    (path,) = (tmp_path / "crash").iterdir()
    whole = (path / "bundle.json").read_bytes()
    for wrong in (b"", b"[]", whole[:-40], whole.replace(b'"format": 1', b'"format": 9'), b"[" * 100_000):
        (path / "bundle.json").write_bytes(wrong)
        capsys.readouterr()
        assert replay.main([str(path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "no whole crash bundle" in said and said.count("\n") == 1
    (path / "bundle.json").write_bytes(whole)
    (path / "samples.safetensors").write_bytes(b"\x00" * 20)
    assert replay.main([str(path)]) == 2
