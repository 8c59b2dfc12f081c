"""Errors that end a run with one line for its user instead of a traceback."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class ParityError(RunStopped):
    """Sampler and learner are not the same policy; the message says by how much and where."""
