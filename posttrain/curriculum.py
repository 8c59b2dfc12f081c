"""How often the policy solves each problem, and which problems are worth sampling from because of it.

A group is measured by what it was sampled for: the share of its completions that pass. Old groups count half with each new
one, because the policy that they were sampled by is gone. The numbers go into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.grpo_sections import CurriculumSection
from posttrain.metrics import Metric
from posttrain.types import Group

_DECAY = 0.5  # weight of a prompt's earlier completions when a new group comes


class PassRates:
    """Pass rates by prompt id, and the decision that the recipe draws from them.

    Args:
        section: of the recipe.
    """

    def __init__(self, section: CurriculumSection) -> None:
        self._section = section
        self._counts: dict[str, tuple[float, float, int, int]] = {}  # id -> passes, tries, completions, step
        self._step = 0

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Count the judged completions of the groups that were sampled for a step.

        Raises:
            ValueError: the section names a reward that the groups do not have.
        """
        self._step = step
        for group in groups:
            scores = self._scores(group)
            if not scores:
                continue
            passes, tries, completions, _ = self._counts.get(group.prompt.id, (0.0, 0.0, 0, 0))
            passed = sum(score >= self._section.pass_score for score in scores)
            self._counts[group.prompt.id] = (
                _DECAY * passes + passed,
                _DECAY * tries + len(scores),
                completions + len(scores),
                step,
            )

    def rate(self, prompt_id: str) -> float | None:
        """0 to 1; None before the first measurement."""
        found = self._counts.get(prompt_id)
        return None if found is None else found[0] / found[1]

    def is_wanted(self, prompt_id: str) -> bool:
        """Whether the prompt is worth another group: not measured enough, within the limits, or due for another look."""
        rate = self.rate(prompt_id)
        if rate is None:
            return True
        _, _, completions, step = self._counts[prompt_id]
        section = self._section
        due = bool(section.retry_steps) and self._step - step >= section.retry_steps
        return due or completions < section.min_completions or section.min_pass_rate <= rate <= section.max_pass_rate

    def metrics(self) -> dict[str, Metric]:
        """How many prompts were measured, their mean rate, and the share of them that is wanted."""
        rates = [rate for rate in map(self.rate, self._counts) if rate is not None]
        if not rates:
            return {}
        wanted = sum(map(self.is_wanted, self._counts))
        return {
            "curriculum/measured": Metric(len(rates), "last"),
            "curriculum/pass_rate": Metric(sum(rates) / len(rates), "last"),
            "curriculum/wanted_fraction": Metric(wanted / len(rates), "last"),
        }

    def state(self) -> dict[str, Any]:
        """JSON-able, see `restore`."""
        return {"step": self._step, "counts": {name: list(counts) for name, counts in self._counts.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._step = int(state["step"])
        self._counts = {
            name: (float(passes), float(tries), int(completions), int(step))
            for name, (passes, tries, completions, step) in state["counts"].items()
        }

    def _scores(self, group: Group) -> list[float]:
        name = self._section.reward
        if name is not None and name not in group.components:
            raise ValueError(
                f"curriculum.reward: {name!r} is none of the rewards; choose one of {', '.join(group.components)}"
            )
        scores = group.rewards if name is None else group.components[name]
        return [score for index, score in enumerate(scores) if index not in group.unjudged]
