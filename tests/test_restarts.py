"""--max-restarts: which ends are tried again, and how the command line of the next try looks."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli, restarts
from posttrain.checkpoint import save
from posttrain.errors import EXIT_TRY_AGAIN, RunInterrupted, RunStopped
from posttrain.recipe import Recipe

RECIPE = """
stage: sft
model: {build: {hidden_size: 64}}
datasets: [{task: letter_counting, size: 100}]
training: {max_steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def ends(monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[list[str]]:
    """Runs that end with these codes. Returns what their command lines will be."""
    seen: list[list[str]] = []
    left = list(codes)

    def run_process(module: str, arguments: list[str], lock: int, beat: Any) -> int:
        assert module == "posttrain.sft"
        seen.append(arguments)
        return left.pop(0)

    monkeypatch.setattr(restarts, "run_process", run_process)
    monkeypatch.setattr(restarts, "_LONGEST_WAIT", 0.0)
    return seen


def main(file: Path, *words: str) -> int:
    def never(recipe: Recipe, **_: Any) -> int:
        raise AssertionError("the stage must run in a process of its own")

    return cli.run_stage("sft", never, [str(file), f"output_dir={file.parent / 'run'}", *words])


def test_what_was_killed_goes_on_from_its_checkpoint_and_before_that_begins_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ends(monkeypatch, EXIT_TRY_AGAIN, 137, 0)
    scripted = restarts.run_process

    def run_process(*arguments: Any) -> int:
        if len(seen) == 1:  # the second try gets as far as a checkpoint
            save(file.parent / "run" / "checkpoints", 2, lambda path: None, {}, keep=1)
        return scripted(*arguments)

    monkeypatch.setattr(restarts, "run_process", run_process)
    assert main(file, "--max-restarts", "5", "seed=3") == 0
    first = [str(file), f"output_dir={file.parent / 'run'}", "seed=3"]
    assert seen == [first, first, [*first, "--resume"]]


def test_what_gets_on_is_started_at_once_and_what_does_not_later_and_later(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ends(monkeypatch, *[137] * 7, 0)
    monkeypatch.setattr(restarts, "_LONGEST_WAIT", 5.0)
    scripted, waits = restarts.run_process, []
    monkeypatch.setattr(restarts.time, "sleep", lambda seconds: waits.append(round(seconds)))

    def run_process(*arguments: Any) -> int:
        if len(seen) in (0, 4, 5):  # the first, the fifth and the sixth try save something
            save(file.parent / "run" / "checkpoints", len(seen) + 1, lambda path: None, {}, keep=1)
        return scripted(*arguments)

    monkeypatch.setattr(restarts, "run_process", run_process)
    assert main(file, "--max-restarts", "7") == 0
    assert waits == [0, 2, 4, 5, 0, 0, 2]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143])
def test_what_somebody_has_to_mend_or_has_wished_is_not_tried_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seen = ends(monkeypatch, code)
    assert main(file, "--max-restarts=3") == code and len(seen) == 1


def test_what_native_code_ended_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ends(monkeypatch, 1, 0)
    scripted = restarts.run_process

    def run_process(*arguments: Any) -> int:
        if not seen:  # the stage has begun, and Python has not ended it
            Path(os.environ[restarts._RUNNING]).touch()
        return scripted(*arguments)

    monkeypatch.setattr(restarts, "run_process", run_process)
    assert main(file, "--max-restarts", "2") == 0 and len(seen) == 2


@pytest.mark.parametrize("error", [RunStopped("full"), ZeroDivisionError(), KeyboardInterrupt()])
def test_a_stage_that_python_ends_says_so(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv(restarts._RUNNING, str(mark))

    def run(recipe: Recipe, **_: Any) -> int:
        assert mark.exists() and restarts._RUNNING not in os.environ
        raise error

    with suppress(ZeroDivisionError):
        cli.run_stage("sft", run, [str(file)])
    assert not mark.exists()


def test_the_last_code_is_that_of_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ends(monkeypatch, 137, EXIT_TRY_AGAIN, 139)
    assert main(file, "--max-restarts", "2") == 139 and len(seen) == 3


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("sft", ["--max-restarts", "soon"], "how often?"),
        ("sft", ["--max-restarts"], "how often?"),
        ("pipeline", ["--max-restarts", "2"], "goes on by itself where it stopped"),
        ("upcycle", ["--max-restarts=2"], "has nothing to go on from"),
    ],
)
def test_what_cannot_be_restarted_is_refused(
    file: Path, stage: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_stage(stage, lambda recipe: 0, [str(file), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(RunInterrupted, EXIT_TRY_AGAIN), (RunStopped, 3)])
def test_the_exit_code_tells_a_supervisor_whether_to_try_again(
    file: Path, error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(recipe: Recipe, **_: Any) -> int:
        raise error("gone")

    assert cli.run_stage("sft", run, [str(file)]) == code
    assert capsys.readouterr().err == "stopped: gone\n"


def test_a_ray_that_a_busy_machine_does_not_start_in_time_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.cluster import connection

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection.ray, "init", init)
    with pytest.raises(RunInterrupted, match="within 30 seconds.*--max-restarts"), connection.session(None, 1):
        pass


@pytest.mark.parametrize(("busy", "starts"), [(2, 3), (9, 3)])
def test_a_machine_that_is_too_busy_for_ray_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], busy: int, starts: int
) -> None:
    from posttrain.cluster import connection

    tries: list[int] = []

    def init(**_: object) -> None:
        tries.append(1)
        if len(tries) <= busy:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(connection.ray, "init", init)
    if busy < starts:
        connection._start(1.0)
    else:
        with pytest.raises(RunInterrupted, match="3 times: the machine is very busy.*--max-restarts"):
            connection._start(1.0)
    assert len(tries) == starts and "start 3 of 3" in capsys.readouterr().err
