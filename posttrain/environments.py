"""Environments: what answers the policy's messages over several turns, and how a recipe names one.

An environment is a class; each episode has an instance of its own, in a process of its own:

    from posttrain.types import Prompt, Step

    class Game:
        def __init__(self, limit: int = 10) -> None: ...            # the recipe's `kwargs`
        def reset(self, prompt: Prompt) -> None: ...                # the record: messages, answer, metadata
        def step(self, text: str) -> Step: ...                      # a message of the policy

`text` is what the policy wrote, special tokens left out. A `Step` holds the messages that the policy sees next, the step's
reward, and whether the episode is over. What the policy sees first is the record's own prompt.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.recipe import EnvironmentSection
from posttrain.types import Prompt, Step
from rewards.resolve import anchored, find

__all__ = ["Environment", "EnvironmentLimits", "EnvironmentSpec", "Prompt", "Step", "build_environment", "checked_step"]


class Environment(Protocol):
    """What an environment looks like; see above."""

    def reset(self, prompt: Prompt, /) -> None:
        """Begin the episode."""

    def step(self, text: str, /) -> Step:
        """Answer a message of the policy."""


@dataclass(frozen=True, slots=True)
class EnvironmentLimits:
    """What one episode's environment may use."""

    timeout_seconds: float = 10.0  # of the start with `reset`, and of each `step`
    max_memory_gib: float | None = 4.0  # of its process, beyond what importing takes; None is no limit
    max_concurrency: int = 16  # episodes that are stepped at the same time


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """An environment of a recipe. Building it finds the class, so a wrong name fails before anything is sampled.

    Raises:
        ValueError: nothing of that name, no class with `reset` and `step`, or options that it does not take.
    """

    func: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "func", anchored(self.func))
        found = self.load()
        if not inspect.isclass(found):
            raise ValueError(f"environment {self.func!r} is a {type(found).__name__}, not a class with reset and step")
        for name, given in (("reset", "prompt"), ("step", "text")):
            method = getattr(found, name, None)
            if not callable(method):
                raise ValueError(f"environment {self.func!r} has no method {name}(self, {given}); add it")
            if inspect.iscoroutinefunction(method):
                raise ValueError(f"environment {self.func!r}: {name} is async; make it a plain method")
            try:
                inspect.signature(method).bind(None, None)
            except TypeError as error:
                raise ValueError(
                    f"environment {self.func!r}: {name}{inspect.signature(method)} must take (self, {given}): {error}"
                ) from None
        try:
            inspect.signature(found).bind(**self.kwargs)
        except TypeError as error:
            raise ValueError(
                f"environment {self.func!r} is made with {inspect.signature(found)}, and kwargs={dict(self.kwargs)} do not "
                f"fit: {error}"
            ) from None

    def load(self) -> Any:
        """The class; imports its module."""
        return find(self.func, "environment", "Class")


def build_environment(section: EnvironmentSection) -> tuple[EnvironmentSpec, EnvironmentLimits]:
    """What a recipe's section names. Raises what `EnvironmentSpec` raises."""
    return EnvironmentSpec(section.func, dict(section.kwargs)), EnvironmentLimits(
        section.timeout_seconds, section.max_memory_gib, section.max_concurrency
    )


def checked_step(value: Any) -> dict[str, Any]:
    """What a `step` returned, as JSON-able parts.

    Raises:
        ValueError: no `Step`, a reward that is no finite number, messages that are none or the policy's own, or none although
            the episode goes on.
    """
    if not isinstance(value, Step):
        raise ValueError(f"step returned {_short(value)}; it must return posttrain.types.Step(messages, reward, done)")
    if not isinstance(value.reward, numbers.Real) or not math.isfinite(value.reward):
        raise ValueError(f"step returned the reward {value.reward!r}; it must be a finite number")
    if isinstance(value.messages, str | Mapping):
        raise ValueError(f"step returned messages={_short(value.messages)}; it must be a list of messages")
    messages = [dict(message) if isinstance(message, Mapping) else message for message in value.messages]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(f"step returned the message {_short(message)}; write {{'role': 'user', 'content': '...'}}")
        if message["role"] == "assistant":
            raise ValueError("step returned a message of the assistant, which is the policy; use the role user or tool")
    if not messages and not value.done:
        raise ValueError("step returned neither a message nor done=True, so the policy would have nothing to answer")
    return {"messages": messages, "reward": float(value.reward), "done": bool(value.done)}


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
