"""Completions to scores: the grader in processes of its own, and a count of everything that went wrong."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

from posttrain.errors import RunStopped
from posttrain.recipe import RewardSection
from posttrain.reward_setup import build_limits, build_reward
from posttrain.types import Completion, Prompt, RewardResult
from rewards import Item, to_item
from rewards.warden import Warden

AT_ONCE = 256  # verdicts that a crash may cost
NO_ANSWER = RewardResult(0.0, "infrastructure", "the model gave no answer")


@dataclass(frozen=True, slots=True)
class Graded:
    """What the grader said."""

    results_PN: tuple[tuple[RewardResult, ...], ...]
    counts: dict[str, int]  # see `count`

    @property
    def scores_PN(self) -> list[list[float]]:
        """The scores alone."""
        return [[result.score for result in row] for row in self.results_PN]


def has_failed(completion: Completion) -> bool:
    """Whether there is no answer: the engine or the endpoint gave up."""
    return completion.finish_reason == "abort"


def grade(
    reward: RewardSection,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    *,
    baselines: Sequence[str] | None = None,
    max_failed_fraction: float = 0.0,
    known: MutableMapping[str, RewardResult] | None = None,
) -> Graded:
    """Judge the completions [P][N] of the prompts.

    Args:
        reward: the grader; `num_workers` of it work side by side.
        prompts: [P].
        groups: [P][N].
        baselines: [P] answers that each completion is compared with, for a grouped grader.
        max_failed_fraction: of the completions, that may lack an answer or a verdict. Those count as wrong.
        known: verdicts that are not asked for again, by `key_of`; new ones are put in as they come, since judges cost.

    Raises:
        RunStopped: more than that, so that the figures would say nothing.
    """
    places = [
        (row, column)
        for row, group in enumerate(groups)
        for column, completion in enumerate(group)
        if not has_failed(completion)
    ]
    items: list[list[Item]] = []
    for row, column in places:
        item = to_item(prompts[row], groups[row][column])
        items.append([item, Item(baselines[row], item.answer, item.metadata)] if baselines is not None else [item])
    results, complaint = _judge(reward, items) if known is None else _judge_rest(reward, items, known)
    found = dict(zip(places, results, strict=True))
    results_PN = tuple(
        tuple(found.get((row, column), NO_ANSWER) for column in range(len(group))) for row, group in enumerate(groups)
    )
    counts = count(groups, results_PN)
    lost = counts["no_answer"] + counts["no_verdict"]
    if lost > max_failed_fraction * counts["completions"]:
        raise RunStopped(
            f"the evaluation's figures would say little: of {counts['completions']} completions {counts['no_answer']} have "
            f"no answer and {counts['no_verdict']} no verdict ({complaint}); more than eval.max_failed_fraction="
            f"{max_failed_fraction:g}; mend the cause and go on with --resume, or raise it: those count as wrong"
        )
    return Graded(results_PN, counts)


def key_of(reward: RewardSection, call: Sequence[Item]) -> str:
    """What a verdict depends on."""
    shown = [[item.completion, item.answer, item.metadata.get("messages")] for item in call]
    text = json.dumps([reward.func, dict(reward.kwargs), shown], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _judge_rest(
    reward: RewardSection, items: Sequence[Sequence[Item]], known: MutableMapping[str, RewardResult]
) -> tuple[list[RewardResult], str]:
    """`_judge` of what is not known yet, in parts, so that a crash costs the verdicts of one part."""
    keys = [key_of(reward, call) for call in items]
    fresh: dict[str, RewardResult] = {}
    complaint = ""
    rest = [place for place, key in enumerate(keys) if key not in known]
    for start in range(0, len(rest), AT_ONCE):
        part = rest[start : start + AT_ONCE]
        results, why = _judge(reward, [items[place] for place in part])
        complaint = complaint or why
        for place, result in zip(part, results, strict=True):
            fresh[keys[place]] = result
            if result.status == "ok":
                known[keys[place]] = result
    return [fresh.get(key) or known[key] for key in keys], complaint


def _judge(reward: RewardSection, items: Sequence[Sequence[Item]]) -> tuple[list[RewardResult], str]:
    """The first result of each call, and why one has no verdict; `reward.num_workers` graders share the calls.

    A grader of its own for each thread: one that runs programs, or asks a judge about one pair at a time, mostly waits.
    """
    grader = build_reward(reward)
    workers = max(1, min(reward.num_workers, len(items)))

    def judge(start: int) -> tuple[list[RewardResult], str]:
        part = items[start::workers]
        with Warden(grader, build_limits(reward, grader.form)) as warden:
            report = warden.score(part)
        starts = accumulate((len(call) for call in part[:-1]), initial=0)
        return [report.results[start] for start in starts] if part else [], report.complaint

    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(judge, range(workers)))
    found = [parts[place % workers][0][place // workers] for place in range(len(items))]
    whys = [*(complaint for _, complaint in parts), *(r.detail for r in found if r.status == "infrastructure")]
    return found, next(filter(None, whys), "the model gave no answer")


def count(groups: Sequence[Sequence[Completion]], results_PN: Sequence[Sequence[RewardResult]]) -> dict[str, int]:
    """How many completions there are, and how many of them are not plainly right or wrong.

    Returns:
        completions; truncated (at the longest length, graded as they are); no_answer; no_verdict (the grader could not
        judge); grader_timeout and grader_crash (the text brought the grader down, which counts as wrong).
    """
    pairs = [
        (completion, result)
        for group, results in zip(groups, results_PN, strict=True)
        for completion, result in zip(group, results, strict=True)
    ]
    statuses = Counter(result.status for completion, result in pairs if not has_failed(completion))
    return {
        "completions": len(pairs),
        "truncated": sum(completion.finish_reason == "length" for completion, _ in pairs),
        "no_answer": sum(has_failed(completion) for completion, _ in pairs),
        "no_verdict": statuses["infrastructure"],
        "grader_timeout": statuses["timeout"],
        "grader_crash": statuses["crash"],
    }
