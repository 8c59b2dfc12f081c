"""A circuit breaker for the policy that samples and the policy that trains: what to do when they come apart.

Each step that breaks a limit goes one further along `breaker.actions`; after `breaker.healthy_steps` steps within limits it
begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.grpo_recipe import BreakerAction, BreakerSection
from posttrain.metrics import Metric
from posttrain.parity import Mismatch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the breaker says of a step."""

    action: BreakerAction | None  # None: within the limits
    reason: str = ""  # for people
    first_bad_version: int = 0  # of the policy, since the limits hold no more

    def metrics(self) -> dict[str, Metric]:
        return {"breaker/tripped": Metric(float(self.action is not None), "sum")}


class Breaker:
    """Looks at the mismatch of each step.

    Args:
        section: limits and actions.
    """

    def __init__(self, section: BreakerSection) -> None:
        self._section = section
        self._level = 0  # how many actions were taken
        self._healthy = 0  # steps within the limits since the last that was not
        self._first_bad = 0

    def look(self, apart: Mismatch, version: int) -> Verdict:
        """What to do about a step's samples before anything is learnt from them.

        Args:
            apart: of the step's samples.
            version: of the policy that would train on them.
        """
        reasons = self._broken(apart)
        if not reasons:
            self._healthy += 1
            if self._healthy >= self._section.healthy_steps:
                self._level = 0
            return Verdict(None)
        if self._level == 0:
            self._first_bad = version
        self._healthy = 0
        actions = self._section.actions
        action = actions[min(self._level, len(actions) - 1)]
        self._level += 1
        return Verdict(action, "; ".join(reasons), self._first_bad)

    @property
    def is_tripped(self) -> bool:
        """Whether the last step broke a limit."""
        return self._level > 0 and self._healthy == 0

    def state(self) -> dict[str, Any]:
        """JSON-able, for `restore`."""
        return {"level": self._level, "healthy": self._healthy, "first_bad": self._first_bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._level, self._healthy, self._first_bad = state["level"], state["healthy"], state["first_bad"]

    def _broken(self, apart: Mismatch) -> list[str]:
        limits, found = self._section, []
        if limits.max_kl is not None and not apart.kl <= limits.max_kl:
            metrics = apart.metrics()
            parts = ", ".join(
                f"{cause} {metrics[f'mismatch/kl_{cause}'].value:.1e}"
                for cause in ("precision", "routing", "staleness")
            )
            found.append(f"mismatch/kl is {apart.kl:.1e} (limit breaker.max_kl={limits.max_kl:g}; {parts})")
        least = limits.min_effective_sample_size
        if not apart.effective_sample_size >= least:
            found.append(
                f"mismatch/effective_sample_size is {apart.effective_sample_size:.3f} (limit "
                f"breaker.min_effective_sample_size={least:g})"
            )
        return found
