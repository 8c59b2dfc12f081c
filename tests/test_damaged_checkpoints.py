"""What a checkpoint says of its files, and what a run does about a damaged one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import checkpoint
from posttrain.errors import RunStopped
from posttrain.pipeline import require_inputs
from posttrain.saving import Saver
from posttrain.stage_inputs import Input


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3 of a run."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        checkpoint.save(directory, step, lambda path, step=step: write(path, step), {"cursor": step}, keep=3)
    return directory


def write(path: str, step: int) -> None:
    (Path(path) / "model.safetensors").write_bytes(bytes([step]) * 5000)
    (Path(path) / "critic").mkdir()
    (Path(path) / "critic" / "trainer_state.pt").write_bytes(b"state")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_is_in_the_manifest_with_its_sha256(checkpoints: Path) -> None:
    files = json.loads((checkpoints / "step-1" / "manifest.json").read_text())["files"]
    assert files.keys() == {"model.safetensors", "critic/trainer_state.pt", "progress.json"}
    wanted = hashlib.sha256(b"state").hexdigest()
    assert files["critic/trainer_state.pt"] == {"bytes": 5, "sha256": wanted}
    assert files["model.safetensors"] == {"bytes": 5000, "sha256": hashlib.sha256(b"\x01" * 5000).hexdigest()}
    assert checkpoint.problems(checkpoints / "step-3") == []
    (checkpoints / "step-3" / "notes.txt").write_text("of a user")
    assert checkpoint.problems(checkpoints / "step-3") == []


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: flip(path / "model.safetensors"), "model.safetensors has another content"),
    (
        lambda path: os.truncate(path / "model.safetensors", 4096),
        "model.safetensors has 4096 bytes and was written with",
    ),
    (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda path: shutil.rmtree(path / "critic"), "critic/trainer_state.pt is missing"),
    (lambda path: os.truncate(path / "progress.json", 7), "progress.json has 7 bytes"),
    (lambda path: os.truncate(path / "manifest.json", 40), "manifest.json cannot be read"),
    (lambda path: (path / "manifest.json").write_text('{"format": 1, "files": {"x": 3}}'), "its entry of x is damaged"),
    (lambda path: (path / "manifest.json").write_text("[]"), "not a manifest"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda path: [file.unlink() for file in path.glob("*.json")], "progress.json is missing"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_is_taken(
    checkpoints: Path, damage: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoints / "step-3")
    found = checkpoint.newest_sound(checkpoints)
    assert found == checkpoints / "step-2"
    said = capsys.readouterr().err
    assert words in said and "step-3.broken" in said and "going on from" in said and said.startswith("WARNING")
    assert (checkpoints / "latest").resolve().name == "step-2"
    assert (checkpoints / "step-3.broken").is_dir()
    assert checkpoint.newest_sound(checkpoints) == found and capsys.readouterr().err == ""
    # The run goes on, saves step 3 anew, and that one is damaged as well.
    checkpoint.save(checkpoints, 3, lambda path: write(path, 3), {}, keep=3)
    flip(checkpoints / "step-3" / "model.safetensors")
    assert checkpoint.newest_sound(checkpoints) == found
    assert (checkpoints / "step-3.broken").is_dir() and (checkpoints / "step-3.broken-2").is_dir()


def test_nothing_is_taken_where_all_are_damaged(checkpoints: Path) -> None:
    for step in (1, 2, 3):
        flip(checkpoints / f"step-{step}" / "model.safetensors")
    with pytest.raises(RunStopped, match=r"no whole checkpoint is left.*step-3.broken \(model.safetensors has another"):
        checkpoint.newest_sound(checkpoints)
    assert len(list(checkpoints.glob("step-*.broken"))) == 3
    assert checkpoint.newest_sound(checkpoints.parent / "elsewhere") is None


def test_a_checkpoint_from_before_there_were_manifests_is_taken_and_said_to_be_unverified(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints / "step-3" / "manifest.json").unlink()
    (checkpoints / "step-3" / "progress.json").write_text('{"step": 3, "cursor": 3}')
    assert checkpoint.newest_sound(checkpoints) == checkpoints / "step-3"
    assert "written without checksums" in capsys.readouterr().err


def test_a_crash_while_a_step_is_saved_again_leaves_the_old_one(checkpoints: Path) -> None:
    (checkpoints / "step-3").rename(checkpoints / "step-3.replaced")  # killed between the two renames
    assert checkpoint.newest_sound(checkpoints) == checkpoints / "step-3"
    (checkpoints / "step-3.replaced").mkdir()  # killed before the old one was deleted
    assert checkpoint.newest_sound(checkpoints) == checkpoints / "step-3"
    assert not (checkpoints / "step-3.replaced").exists()


def test_another_run_that_uses_a_damaged_checkpoint_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint.require_sound(checkpoints / "latest")
    checkpoint.require_sound("owner/name")
    checkpoint.require_sound(tmp_path)
    flip(checkpoints / "step-3" / "model.safetensors")
    with pytest.raises(RunStopped, match=r"step-3 is damaged: model.safetensors.*delete its manifest.json"):
        checkpoint.require_sound(checkpoints / "latest")


def test_what_is_saved_beside_the_run_is_whole_after_it_was_waited_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        assert saver.save(step, lambda path, step=step: write(path, step), {"cursor": step})
    saver.require()
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step-2", "step-3"]
    assert checkpoint.newest_sound(tmp_path) == tmp_path / "step-3"

    def fail(path: str) -> None:
        raise ValueError("no matter of the disk")

    with pytest.raises(ValueError, match="no matter of the disk"):
        saver.save(4, fail, {})


def test_a_pipeline_does_not_hand_on_a_damaged_checkpoint(checkpoints: Path) -> None:
    made = Input("model.model_name_or_path", "{run_dir}/sft/checkpoints/latest", checkpoints / "latest", "sft")
    stage: Any = SimpleNamespace(name="grpo", inputs=(made,))
    require_inputs(stage)
    flip(checkpoints / "step-3" / "critic" / "trainer_state.pt")
    with pytest.raises(RunStopped, match=r"step-3 is damaged: critic/trainer_state.pt"):
        require_inputs(stage)
