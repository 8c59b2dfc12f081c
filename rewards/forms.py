"""The forms a reward function can have: one completion a call (plain or async), a batch, or the group of one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Form = Literal["single", "async", "batch", "group"]
F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__reward_form__"


def batched(function: F) -> F:
    """Mark a reward that scores many completions at once, of whatever prompts.

    `function(completions, answers, metadata, **options)` gets three lists of one length (texts; reference answers or None;
    a dict of each record's metadata) and returns a list of that length of floats or `RewardResult`s.
    """
    setattr(function, _MARK, "batch")
    return function


def grouped(function: F) -> F:
    """Mark a reward that compares the completions of one prompt.

    `function(completions, answer, **metadata)` gets the G texts of a group; of the metadata, `finish_reason` and
    `completion_length` are lists of G. It returns a list of G floats or `RewardResult`s.
    """
    setattr(function, _MARK, "group")
    return function


def form_of(function: Callable[..., Any]) -> Form:
    """Which form a reward function has.

    Raises:
        ValueError: async and marked as batched or grouped, which is not supported.
    """
    marked: Form | None = getattr(function, _MARK, None)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
    if is_async and marked:
        raise ValueError(f"a {marked} reward cannot be async; make {function!r} a plain function")
    return marked or ("async" if is_async else "single")
