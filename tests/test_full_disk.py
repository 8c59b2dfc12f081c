"""A disk without room, for real: a small tmpfs. Nothing is torn, the run goes on, and what waited is written later."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_trainers import build_trainer, write_chats
from transformers import TrainerCallback

from posttrain import checkpoint, disk
from posttrain.errors import RunStopped
from posttrain.metrics import Metric, MetricsLog
from posttrain.run_dir import RunDir
from posttrain.saving import Saver

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Take all room but for `leave` bytes."""
    ballast = place / "ballast"
    with ballast.open("wb") as file:
        room = os.statvfs(place)
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - leave))
    return ballast


def test_lines_wait_and_come_in_their_order(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(small)
    log.log(1, {"x": Metric(1.0, "mean")})
    ballast = fill(small)
    wide = {f"metric/{number}": Metric(1.0, "mean") for number in range(400)}  # more than what is left of a page
    for step in (2, 3):
        log.log(step, wide)
    assert [line["step"] for line in lines(small)] == [1]
    assert "metrics.jsonl: No space left on device" in capsys.readouterr().err
    ballast.unlink()
    log.log(4, wide)
    log.close()
    assert [line["step"] for line in lines(small)] == [1, 2, 3, 4]


def lines(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_samples_wait_in_memory(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(small / "run")
    ballast = fill(small)
    rows = [{"text": os.urandom(4000).hex()}]
    for step in (1, 2):
        run_dir.write_rows(f"step-{step:06d}", rows)
    assert not list((small / "run").rglob("*.p*")) and "2 files of samples wait" in capsys.readouterr().err
    ballast.unlink()
    run_dir.write_rows("step-000003", rows)
    assert len(list((small / "run" / "samples").glob("*.parquet"))) == 3
    run_dir.forget_samples(1)
    assert [path.name for path in (small / "run" / "samples").iterdir()] == ["step-000001.parquet"]


def test_errors_of_torch_and_safetensors_are_known_and_others_are_not(small: Path) -> None:
    from safetensors.torch import save_file

    fill(small, leave=8192)
    tensor = torch.zeros(100_000)
    for write in (lambda path: torch.save({"x": tensor}, path), lambda path: save_file({"x": tensor}, path)):
        with pytest.raises(Exception) as found:  # its type is the library's own
            write(small / "file")
        assert disk.is_full(found.value), repr(found.value)
        (small / "file").unlink(missing_ok=True)
    assert not disk.is_full(ValueError("a wrong value")) and not disk.is_full(PermissionError(13, "denied"))


def test_a_checkpoint_without_room_leaves_the_one_before_and_the_next_save_tries_again(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: str) -> None:
        torch.save({"x": torch.zeros(200_000)}, Path(path) / "state.pt")

    saver = Saver(small / "checkpoints", keep=2)
    saver.save(1, write, {})
    saver.require()
    ballast = fill(small, leave=300_000)
    assert not saver.save(2, write, {})
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err
    with pytest.raises(RunStopped, match="is full"):
        saver.require()
    assert [path.name for path in (small / "checkpoints").iterdir() if path.name != "latest"] == ["step-1"]
    assert checkpoint.newest_sound(small / "checkpoints") == small / "checkpoints" / "step-1"
    ballast.unlink()
    assert saver.save(3, write, {}) and saver.settle()
    assert (small / "checkpoints" / "latest").resolve().name == "step-3"


def test_a_trainer_goes_on_while_the_disk_is_full(
    policy_path: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for two checkpoints; then for none at steps 2 and 3; then again."""

    class FillTheDisk(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                trainer._saver.settle()
                fill(small, leave=400_000)
            if state.global_step == 3:
                (small / "ballast").unlink()

    write_chats(tmp_path / "chats.jsonl")
    trainer = build_trainer(
        policy_path,
        tmp_path / "chats.jsonl",
        small / "run",
        training={"max_steps": 4, "optim": "sgd"},
        checkpoint={"save_steps": 1, "save_total_limit": 1},
    )
    trainer.add_callback(FillTheDisk())
    trainer.train()
    saved = trainer.save_last(finished=True)
    assert trainer.state.global_step == 4 and saved.name == "step-4"
    said = capsys.readouterr().err
    assert "checkpoint of step 2 could not" in said and "checkpoint of step 3 could not" in said
    assert "checkpoint of step 4" not in said
    assert [path.name for path in checkpoint.whole(saved.parent)] == ["step-4"] and not checkpoint.problems(saved)
    assert not list((small / "run" / "trainer").glob("checkpoint-*"))
