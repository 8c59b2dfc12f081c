"""A stage that is started again when what it stood on is gone: `--max-restarts N`.

The stage runs in a process of its own. When that is killed, or ends saying that --resume has a chance, it is started again
from where it stood; what is wrong with a recipe, a reward or the policy is not tried twice.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from posttrain import checkpoint
from posttrain.errors import EXIT_TRY_AGAIN
from posttrain.fault_log import FaultLog
from posttrain.recipe import Recipe
from posttrain.recipe_file import module_of
from posttrain.stage_process import locked, run_process

# Killed by the kernel or a supervisor, or by a fault in native code. SIGTERM and SIGINT are somebody's wish to end it.
_KILLED = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS))
_LONGEST_WAIT = 60.0


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
        for restart in range(max_restarts + 1):
            words = list(arguments)
            if restart and "--resume" not in words and can_resume(recipe):
                words.append("--resume")
            start = time.monotonic()
            code = run_process(module_of(recipe.stage), words, lock, lambda _seconds: None)
            if code not in (EXIT_TRY_AGAIN, *_KILLED) or restart == max_restarts:
                return code
            # At once after hours of work, later and later when it does not get far.
            wait = max(0.0, min(2.0**restart, _LONGEST_WAIT) - (time.monotonic() - start))
            log(
                "stage_restarted",
                f"{recipe.stage} ended with exit code {code}; started again ({restart + 1} of {max_restarts})",
                exit_code=code,
            )
            time.sleep(wait)
    raise AssertionError("the last round returns")


def can_resume(recipe: Recipe) -> bool:
    """Whether there is something to go on from: a checkpoint of a step, or answers that were paid for."""
    kept = ("journal", "generations")
    return checkpoint.newest_trained(recipe.run_dir / "checkpoints") is not None or any(
        (recipe.run_dir / name).is_dir() for name in kept
    )
