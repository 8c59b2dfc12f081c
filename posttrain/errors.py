"""Errors that end a run with one line for its user instead of a traceback."""

from __future__ import annotations

EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume has a chance


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class RunInterrupted(RunStopped):
    """What the run stood on is gone, not the run: the same command with --resume goes on."""


class ParityError(RunStopped):
    """Sampler and learner are not the same policy; the message says by how much and where."""
