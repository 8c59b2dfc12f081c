"""What can go wrong with a reward, other than a bad completion."""

from __future__ import annotations


class RewardError(RuntimeError):
    """A reward function raised, or could not judge because of its infrastructure; names the function."""


class Unavailable(RuntimeError):
    """For reward functions to raise when a service that they need does not answer.

    Nothing is known about the completion then: it is tried again, and left out of training if that does not help. Raised
    connection errors (`ConnectionError`) count as the same.
    """
