"""Whether a sampler is well: it answers, it moves on while it has work, and it is not far slower than the others.

The judgement alone, on what samplers say of themselves; `posttrain.fleet` asks them and acts on it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_SECONDS = 10.0  # over which the speed of a sampler that may be too slow is taken
_REFERENCE_SECONDS = 1.0  # at least, of the others


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a sampler says of itself. Counts go up from its start."""

    busy: bool  # it has something to generate or to load
    progress: int  # steps of the engine, and what it has loaded of weights
    steps: int  # of the engine
    tokens: int  # prompt tokens taken in, and one for each running sequence and step


class Health:
    """Of one sampler.

    Args:
        timeout: seconds without an answer, or without progress while busy, after which it counts as hung.
        now: seconds on a clock that only goes forward; so in all calls.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self.asked = False  # a pulse is asked for and has not come
        self._timeout = timeout
        self._heard = self._moved = now
        self._last: Pulse | None = None
        self._window: deque[tuple[float, Pulse]] = deque()  # without a break in its work
        self._speed: tuple[float, float] | None = None

    def hear(self, pulse: Pulse, now: float) -> None:
        """Take an answer."""
        self.asked = False
        self._heard = now
        if not pulse.busy or self._last is None or pulse.progress != self._last.progress:
            self._moved = now
        self._last = pulse
        if not pulse.busy:
            self._window.clear()
            return
        self._window.append((now, pulse))
        while now - self._window[0][0] > WINDOW_SECONDS:
            self._window.popleft()
        if self._span >= _REFERENCE_SECONDS:
            first = self._window[0][1]
            self._speed = ((pulse.steps - first.steps) / self._span, (pulse.tokens - first.tokens) / self._span)

    def forgive(self, seconds: float) -> None:
        """Time in which nobody could listen: it does not count."""
        self._heard += seconds
        self._moved += seconds
        self._window.clear()

    def fault(self, now: float) -> str:
        """Why it counts as hung; empty if it does not."""
        if now - self._heard > self._timeout:
            return f"it has not answered for {now - self._heard:.0f} s (sampler.timeout_seconds={self._timeout:g})"
        if now - self._moved > self._timeout:
            return (
                f"its engine has made no step for {now - self._moved:.0f} s (sampler.timeout_seconds={self._timeout:g})"
            )
        return ""

    @property
    def speed(self) -> tuple[float, float] | None:
        """Steps and tokens per second, when it last worked; None if it has not worked for long enough to say."""
        return self._speed

    @property
    def is_measured(self) -> bool:
        """Whether it works, and has for long enough to be called slow."""
        return self._span >= 0.8 * WINDOW_SECONDS

    @property
    def _span(self) -> float:
        return self._window[-1][0] - self._window[0][0] if self._window else 0.0


def slow_samplers(healths: Mapping[int, Health], factor: float) -> dict[int, str]:
    """Those that make fewer than 1 / `factor` of the steps, and of the tokens, that the others make at the median, and why.

    Both, because a step of few sequences is short and one of many brings more tokens. A single sampler has nothing to be
    compared with. A factor of 0 finds none.
    """
    found: dict[int, str] = {}
    for number, health in healths.items():
        others = [other.speed for name, other in healths.items() if name != number and other.speed is not None]
        if not factor or not health.is_measured or health.speed is None or not others:
            continue
        steps, tokens = (statistics.median(speeds) for speeds in zip(*others, strict=True))
        if health.speed[0] * factor < steps and health.speed[1] * factor < tokens:
            found[number] = (
                f"it makes {health.speed[0]:.1f} steps/s where others make {steps:.1f} (sampler.slow_factor={factor:g})"
            )
    return found
