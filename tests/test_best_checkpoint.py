"""The best checkpoint is kept beside the newest, also over a resume and after a crash between two writes."""

from __future__ import annotations

from pathlib import Path

from posttrain import checkpoint
from posttrain.best import BestCheckpoint


def save(directory: Path, step: int, best: BestCheckpoint) -> None:
    checkpoint.save(directory, step, lambda path: None, {"best": best.state()}, keep=1, best=best.step)


def steps(directory: Path) -> list[str]:
    return [path.name for path in checkpoint.whole(directory)]


def test_the_best_is_kept_and_linked(tmp_path: Path) -> None:
    best = BestCheckpoint()
    for step, value in enumerate((0.2, 0.5, 0.5, 0.4), start=1):
        assert best.take(step, value) == (step in (1, 2))
        save(tmp_path, step, best)
    assert steps(tmp_path) == ["step-2", "step-4"]
    assert (tmp_path / "best").resolve().name == "step-2" and (tmp_path / "latest").resolve().name == "step-4"

    resumed = BestCheckpoint()
    resumed.restore(checkpoint.load_progress(tmp_path / "latest")["best"])
    assert not resumed.take(5, 0.5)
    save(tmp_path, 5, resumed)
    assert steps(tmp_path) == ["step-2", "step-5"]
    assert resumed.take(6, 0.6)
    save(tmp_path, 6, resumed)
    assert steps(tmp_path) == ["step-5", "step-6"]  # one beside the best
    assert (tmp_path / "best").resolve().name == "step-6"


def test_a_link_that_a_crash_left_behind_is_mended(tmp_path: Path) -> None:
    best = BestCheckpoint()
    best.take(1, 0.5)
    save(tmp_path, 1, best)
    (tmp_path / "best").unlink()
    save(tmp_path, 2, best)
    assert (tmp_path / "best").resolve().name == "step-1"


def test_nothing_measured_yet_is_restored_as_such() -> None:
    best = BestCheckpoint()
    best.restore(BestCheckpoint().state())
    assert best.step is None and best.take(1, 0.0)
