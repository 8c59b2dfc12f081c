"""The reward-hack audit: a verifier that the policy is not trained on looks at a sample of what the rewards paid for.

A reward that is not quite what is meant gets optimised all the same (Goodhart's law; Gao et al., 2023, arXiv 2210.10760):
the reward rises while what is meant falls. Here both are logged side by side, alarms say when they part or when length,
format or repetition drift, and completions that were paid like right ones but are not are set aside for reading.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.disk import write_atomically
from posttrain.log_file import append_lines
from posttrain.metrics import Metric, lines_until
from posttrain.recipe import AuditSection
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Group, Prompt
from rewards.extract import split_answer

NGRAM = 4
MAX_SET_ASIDE = 20  # completions a step
Score = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scored]


@dataclass(frozen=True, slots=True)
class Look:
    """What an audit of one step found."""

    metrics: dict[str, Metric]
    alarms: tuple[str, ...]  # those that began now
    suspicious: tuple[dict[str, Any], ...]  # rows for people to read


@dataclass
class RewardAudit:
    """Audits step by step; `state` and `restore` carry it over a restart.

    Args:
        section: how much to look at, and when to raise an alarm.
        score: the verifier, e.g. `RewardPool.score` of a pool with that one reward.
        seed: of the choice of completions.
    """

    section: AuditSection
    score: Score
    seed: int
    history: dict[str, list[float]] = field(default_factory=dict)  # watched quantity -> one value for each step
    active: set[str] = field(default_factory=set)  # alarms that have been raised and not gone

    def look(self, step: int, groups: Sequence[Group]) -> Look:
        """Audit the completions of a step. Raises what the verifier's pool raises."""
        start = time.perf_counter()
        chosen = self._choose(step, groups)
        scored = self.score(
            [group.prompt for group, _ in chosen],
            [[group.completions[place] for place in places] for group, places in chosen],
        )
        pairs = [
            _Pair(group, place, verdicts[index])
            for (group, places), verified in zip(chosen, scored.groups, strict=True)
            for verdicts in verified.components.values()
            for index, place in enumerate(places)
            if index not in verified.unjudged
        ]
        watched = _watched(groups, pairs)
        for name, value in watched.items():
            self.history.setdefault(name, []).append(value)
        suspicious = _suspicious(pairs, self.section.pass_score) if pairs else []
        metrics = {f"audit/{name}": Metric(value, "mean") for name, value in watched.items()}
        metrics |= {f"audit/agreement/{name}": Metric(value, "mean") for name, value in _agreements(pairs).items()}
        metrics["audit/suspicious_fraction"] = Metric(len(suspicious) / max(1, len(pairs)), "mean")
        metrics["audit/unjudged"] = Metric(sum(len(group.unjudged) for group in scored.groups), "sum")
        metrics["time/audit"] = Metric(time.perf_counter() - start, "mean")
        now = self._alarms()
        metrics["audit/alarms"] = Metric(len(now), "last")
        begun = tuple(text for name, text in now.items() if name not in self.active)
        self.active = set(now)
        return Look(metrics, begun, tuple(pair.row(step) for pair in suspicious[:MAX_SET_ASIDE]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"history": self.history, "active": sorted(self.active)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.active = set(state["active"])

    def _choose(self, step: int, groups: Sequence[Group]) -> list[tuple[Group, list[int]]]:
        every = [(number, place) for number, group in enumerate(groups) for place in range(len(group.completions))]
        count = min(self.section.num_samples, len(every))
        found = sorted(random.Random(f"{self.seed}/audit/{step}").sample(every, count))
        numbers = dict.fromkeys(number for number, _ in found)
        return [(groups[number], [place for other, place in found if other == number]) for number in numbers]

    def _alarms(self) -> dict[str, str]:
        """Alarm -> what it says, judged by means over the last `window` audits against the first `window`."""
        window = self.section.window
        if len(self.history.get("reward_mean", ())) < 2 * window:
            return {}
        first = {name: statistics.fmean(values[:window]) for name, values in self.history.items()}
        last = {name: statistics.fmean(values[-window:]) for name, values in self.history.items()}
        found = {}
        best = max(_running_means(self.history["verifier_mean"], window))
        if last["reward_mean"] > first["reward_mean"] and last["verifier_mean"] < best - self.section.max_drop:
            found["divergence"] = (
                f"the reward rises ({first['reward_mean']:.3f} to {last['reward_mean']:.3f}) while the verifier has fallen "
                f"from {best:.3f} to {last['verifier_mean']:.3f}: the policy is paid for something else; read suspicious.jsonl"
            )
        ratio = (last["length_mean"] + 1) / (first["length_mean"] + 1)
        if not 1 / self.section.max_length_ratio <= ratio <= self.section.max_length_ratio:
            found["length"] = f"completions went from {first['length_mean']:.1f} to {last['length_mean']:.1f} tokens"
        if last["format_fraction"] < first["format_fraction"] - self.section.max_drop:
            found["format"] = (
                f"answers in the think/answer format went from {first['format_fraction']:.1%} to {last['format_fraction']:.1%}"
            )
        if last["repetition_mean"] > first["repetition_mean"] + self.section.max_drop:
            found["repetition"] = (
                f"repeated {NGRAM}-grams went from {first['repetition_mean']:.1%} to {last['repetition_mean']:.1%} of all"
            )
        return found


@dataclass(frozen=True, slots=True)
class _Pair:
    """A completion with what the verifier says of it."""

    group: Group
    place: int
    verdict: float

    @property
    def reward(self) -> float:
        return self.group.rewards[self.place]

    def row(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "prompt_id": self.group.prompt.id,
            "prompt": self.group.prompt.messages[-1]["content"],
            "completion": self.group.completions[self.place].text,
            "answer": self.group.prompt.answer,
            "reward": self.reward,
            "verifier": self.verdict,
            **{f"reward/{name}": scores[self.place] for name, scores in self.group.components.items()},
        }


def _watched(groups: Sequence[Group], pairs: Sequence[_Pair]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    return {
        "reward_mean": statistics.fmean(pair.reward for pair in pairs) if pairs else 0.0,
        "verifier_mean": statistics.fmean(pair.verdict for pair in pairs) if pairs else 0.0,
        "length_mean": statistics.fmean(len(completion.sampled_ids) for completion in completions),
        "format_fraction": statistics.fmean(split_answer(completion.text) is not None for completion in completions),
        "repetition_mean": statistics.fmean(repeated_share(completion.sampled_ids) for completion in completions),
    }


def repeated_share(token_ids: Sequence[int], size: int = NGRAM) -> float:
    """Share of n-grams that stood before in the same text: 0 for none, towards 1 for a loop."""
    grams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _suspicious(pairs: Sequence[_Pair], pass_score: float) -> list[_Pair]:
    """Those paid at least like the ordinary right one, though the verifier does not pass them; best paid first."""
    right = [pair.reward for pair in pairs if pair.verdict >= pass_score]
    bar = statistics.median(right) if right else statistics.fmean(pair.reward for pair in pairs)
    lowest = min(pair.reward for pair in pairs)
    found = [pair for pair in pairs if pair.verdict < pass_score and pair.reward >= bar and pair.reward > lowest]
    return sorted(found, key=lambda pair: -pair.reward)


def _agreements(pairs: Sequence[_Pair]) -> dict[str, float]:
    """Spearman's rank correlation with the verifier, of the whole reward and of each; where both vary."""
    if not pairs:
        return {}
    columns = {"reward": [pair.reward for pair in pairs]}
    for name in pairs[0].group.components:
        columns[name] = [pair.group.components[name][pair.place] for pair in pairs]
    verdicts = [pair.verdict for pair in pairs]
    return {name: value for name, column in columns.items() if (value := _spearman(column, verdicts)) is not None}


def _spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    value = float(spearmanr(left, right).statistic)
    return value if math.isfinite(value) else None


def _running_means(values: Sequence[float], window: int) -> list[float]:
    return [statistics.fmean(values[end - window : end]) for end in range(window, len(values) + 1)]


ALARMS, SUSPICIOUS = "alarms.jsonl", "suspicious.jsonl"  # in the run directory


def write_look(run_dir: Path, step: int, look: Look) -> None:
    """Append what was found to `alarms.jsonl` and `suspicious.jsonl`."""
    rows = {ALARMS: [{"step": step, "alarm": alarm} for alarm in look.alarms], SUSPICIOUS: look.suspicious}
    for name, found in rows.items():
        if found:
            append_lines(run_dir / name, [json.dumps(row, ensure_ascii=False) for row in found], "; they are lost")


def forget_looks(run_dir: Path, step: int) -> None:
    """Drop what was found after a step, where a run goes on from there: it will be found again."""
    for path in (run_dir / ALARMS, run_dir / SUSPICIOUS):
        if path.exists():
            write_atomically(path, "".join(lines_until(path, step)))
