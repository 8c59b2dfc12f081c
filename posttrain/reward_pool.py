"""Rewards in Ray actors, apart from the loop: completions in, groups with rewards out.

    RewardPool -> one or more actors for each reward -> rewards.warden.Warden -> the function in a process of its own

The warden deals with what a function does; here what can happen to the actors themselves is dealt with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.recipe import RewardSection
from posttrain.reward_setup import build_limits, build_rewards
from posttrain.types import Completion, Group, Prompt, RewardResult
from rewards.scoring import Item, RewardFunction, check_together, to_group, to_item
from rewards.warden import EVENTS, Limits, Report

if TYPE_CHECKING:
    from posttrain.cluster import RewardActors


@dataclass(frozen=True, slots=True)
class Scored:
    """The groups of one step, and how the rewards fared."""

    groups: tuple[Group, ...]  # [P]
    metrics: dict[str, Metric]
    complaints: tuple[str, ...] = ()  # for people: of rewards that failed somewhere, the last failure


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rewards said of some items, and how they fared."""

    results: list[list[list[RewardResult]]]  # [F][P][G]
    metrics: dict[str, Metric]
    complaints: dict[str, str]  # reward -> its last failure, of those that failed somewhere


class RewardPool:
    """The rewards of a recipe.

    Args:
        sections: one for each reward; Ray must be connected.

    Raises:
        ValueError: rewards that cannot be put together.
    """

    def __init__(self, sections: Sequence[RewardSection]) -> None:
        from posttrain.cluster import RewardActors

        self.functions = build_rewards(sections)
        check_together(self.functions)
        self._sections = tuple(sections)
        self._limits = [build_limits(s, f.form) for s, f in zip(sections, self.functions, strict=True)]
        self._actors = [
            RewardActors(function, limits, section.num_workers, section.num_cpus, section.num_gpus)
            for section, function, limits in zip(sections, self.functions, self._limits, strict=True)
        ]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scored:
        """Judge every completion by every reward, all rewards at the same time.

        Args:
            prompts: [P].
            completions: [P][G].

        Raises:
            RunStopped: a reward failed on more completions than its `max_failed_fraction` allows.
            RewardError: a reward's process does not start.
        """
        groups = [
            [to_item(prompt, completion) for completion in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]
        judged = self.judge(groups)
        for section, function, results in zip(self._sections, self.functions, judged.results, strict=True):
            _require_working(section, function, results, judged.complaints.get(function.name, ""))
        scored = tuple(
            to_group(self.functions, prompt, group, [column[place] for column in judged.results])
            for place, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        )
        metrics = {**judged.metrics, "reward/unjudged": Metric(sum(len(group.unjudged) for group in scored), "sum")}
        return Scored(scored, metrics, tuple(judged.complaints.values()))

    def judge(self, groups: Sequence[Sequence[Item]]) -> Judged:
        """What every reward says of every item, all rewards at the same time. Failures are results like others.

        Args:
            groups: items, those of one prompt together (only a grouped reward cares).

        Raises:
            RewardError: a reward's process does not start.
        """
        start = time.perf_counter()
        pending = [actors.submit(groups) for actors in self._actors]
        metrics: dict[str, Metric] = {}
        columns: list[list[list[RewardResult]]] = []
        complaints: dict[str, str] = {}
        for function, limits, actors, parts in zip(self.functions, self._limits, self._actors, pending, strict=True):
            results, counts, seconds, complaint = _gather(actors, parts, groups, limits)
            metrics |= _metrics(function, results, counts, seconds)
            columns.append(results)
            if complaint:
                complaints[function.name] = complaint
        metrics["time/reward"] = Metric(time.perf_counter() - start, "mean")
        return Judged(columns, metrics, complaints)

    def stop(self) -> None:
        """End the actors and the processes of the rewards."""
        for actors in self._actors:
            actors.stop()


def _gather(
    actors: RewardActors, parts: Sequence[tuple[list[int], object]], groups: Sequence[Sequence[Item]], limits: Limits
) -> tuple[list[list[RewardResult]], Counter[str], float, str]:
    """One reward's results [P][G] from its actors. An actor that was lost is asked again, as often as `retries` says."""
    results: list[list[RewardResult]] = [[] for _ in groups]
    counts: Counter[str] = Counter()
    seconds, complaint = 0.0, ""
    for places, call in parts:
        report: Report | None = None
        for attempt in range(limits.retries + 1):
            report, lost = actors.wait(call)
            if report is not None:
                break
            counts["restarts"] += 1
            complaint = lost
            if attempt < limits.retries:
                actors.wait_for_next()
                counts["retried"] += 1
                call = actors.submit_to_any([groups[place] for place in places])
        if report is None:
            outage = RewardResult(0.0, "infrastructure", complaint)
            for place in places:
                results[place] = [outage] * len(groups[place])
                counts["infrastructure"] += len(groups[place])
            continue
        counts.update(report.counts)
        seconds += report.seconds
        complaint = report.complaint or complaint
        flat = iter(report.results)
        for place in places:
            results[place] = [next(flat) for _ in groups[place]]
    return results, counts, seconds, complaint


def _metrics(
    function: RewardFunction, results: Sequence[Sequence[RewardResult]], counts: Counter[str], seconds: float
) -> dict[str, Metric]:
    name = f"reward/{function.name}"
    scores = [result.score for group in results for result in group if result.status != "infrastructure"]
    metrics = {f"{name}/{event}": Metric(counts[event], "sum") for event in EVENTS}
    metrics[f"{name}/seconds"] = Metric(seconds, "sum")
    if scores:
        metrics[f"{name}/mean"] = Metric(sum(scores) / len(scores), "mean")
    return metrics


def _require_working(
    section: RewardSection, function: RewardFunction, results: Sequence[Sequence[RewardResult]], complaint: str
) -> None:
    """A reward that fails on most completions is broken, and training on what is left would be training on nothing."""
    statuses = [result.status for group in results for result in group]
    failed = sum(status in ("crash", "infrastructure") for status in statuses)
    if failed > section.max_failed_fraction * len(statuses):
        raise RunStopped(
            f"reward {function.name!r} failed on {failed} of {len(statuses)} completions, more than "
            f"max_failed_fraction={section.max_failed_fraction:g} allows; the last time: {complaint}; mend it (python -m "
            f"rewards.check {section.func}), or raise rewards.*.max_failed_fraction"
        )
