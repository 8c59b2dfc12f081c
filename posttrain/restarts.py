"""A stage that is started again when what it stood on is gone: `--max-restarts N`.

The stage runs in a process of its own. When that is killed, or ends saying that --resume has a chance, it is started again
from where it stood; what is wrong with a recipe, a reward or the policy is not tried twice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from posttrain import checkpoint
from posttrain.errors import EXIT_TRY_AGAIN
from posttrain.fault_log import FaultLog
from posttrain.recipe import Recipe
from posttrain.recipe_file import module_of
from posttrain.stage_process import locked, run_process

# Killed by the kernel or a supervisor, or by a fault in native code. SIGTERM and SIGINT are somebody's wish to end it.
_KILLED = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS))
_LONGEST_WAIT = 60.0
_ANSWERS = ("journal", "generations")  # directories of what distillation and evaluation have got so far
_RUNNING = "POSTTRAIN_RUNNING"  # environment variable: the file that says that a stage has not come to its end


@contextmanager
def running() -> Iterator[None]:
    """Around what a stage does: however Python ends it, the file that the one who started it looks for is gone.

    Where Ray's native code finds the raylet dead before we do, it ends the process with exit code 1 and without a word; a
    stage that fails by itself has the same code, and nothing to go on for.
    """
    place = os.environ.pop(_RUNNING, None)
    if place is None:
        yield
        return
    Path(place).touch()
    try:
        yield
    finally:
        Path(place).unlink(missing_ok=True)


def _run_once(recipe: Recipe, words: Sequence[str], lock: int) -> int:
    """The exit code of the stage's command; EXIT_TRY_AGAIN where native code ended it."""
    mark = recipe.run_dir / ".running"
    mark.unlink(missing_ok=True)
    os.environ[_RUNNING] = str(mark.resolve())
    try:
        code = run_process(module_of(recipe.stage), words, lock, lambda _seconds: None)
    finally:
        del os.environ[_RUNNING]
    ended_by_itself = not mark.exists()
    mark.unlink(missing_ok=True)
    return code if code != 1 or ended_by_itself else EXIT_TRY_AGAIN


def run(recipe: Recipe, arguments: Sequence[str], max_restarts: int) -> int:
    """Run the stage's own command, again and again if need be. Returns the last exit code.

    Args:
        recipe: of the stage.
        arguments: of the command line, without --max-restarts.
        max_restarts: how often it may be started again.

    Raises:
        RunStopped: somebody else does the same in this run directory.
    """
    log = FaultLog(recipe.run_dir)
    with locked(recipe.run_dir) as lock:
        idle = 0  # tries in a row that brought nothing
        for restart in range(max_restarts + 1):
            words, before = list(arguments), _kept(recipe)
            if restart and "--resume" not in words and can_resume(recipe):
                words.append("--resume")
            start = time.monotonic()
            code = _run_once(recipe, words, lock)
            if code not in (EXIT_TRY_AGAIN, *_KILLED) or restart == max_restarts:
                return code
            # At once after some work, later and later when it does not get on.
            idle = 0 if _kept(recipe) != before else idle + 1
            wait = max(0.0, min(2.0**idle, _LONGEST_WAIT) - (time.monotonic() - start)) if idle else 0.0
            log(
                "stage_restarted",
                f"{recipe.stage} ended with exit code {code}; started again ({restart + 1} of {max_restarts})",
                exit_code=code,
            )
            time.sleep(wait)
    raise AssertionError("the last round returns")


def can_resume(recipe: Recipe) -> bool:
    """Whether there is something to go on from: a checkpoint of a step, or answers that were paid for."""
    return checkpoint.newest_trained(recipe.run_dir / "checkpoints") is not None or any(
        (recipe.run_dir / name).is_dir() for name in _ANSWERS
    )


def _kept(recipe: Recipe) -> tuple[Path | None, int]:
    """What a run has got to: its newest checkpoint, and the bytes of its answers."""
    files = (path for name in _ANSWERS for path in (recipe.run_dir / name).rglob("*") if path.is_file())
    return checkpoint.newest_trained(recipe.run_dir / "checkpoints"), sum(path.stat().st_size for path in files)
