"""Try a reward function out before a run depends on it.

    python -m rewards.check my_rewards.py:score [--answer 42] [--prompts problems.jsonl] [--set key=value ...] [--timeout 5]

Runs it over a battery of completions in a process of its own, and says: does it keep the contract, how fast is it, does it
say the same again, in another order and from several threads, and is it fooled by the tricks that policies find. Exits with
1 when something has to be mended.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from posttrain.types import RewardResult
from rewards.battery import Probe, probes, to_items
from rewards.errors import RewardError
from rewards.scoring import Item, RewardFunction
from rewards.warden import Limits, Report, Warden

METADATA = {"task": "chain_sum", "level": 1, "split": "train"}
MAX_PROBLEMS = 20
MAX_SHOWN = 5
THREADS, ROUNDS = 8, 4
TOLERANCE = 1e-9
JUDGES = 0.1  # a reward that tells right from wrong answers does so by more than this part of its range


@dataclass(frozen=True, slots=True)
class Problem:
    """What the completions of a battery answer."""

    answer: str | None
    prompt: str
    metadata: Mapping[str, Any]


@dataclass
class Findings:
    """What was found: `lines` for reading, `violations` of the contract and `weaknesses` against tricks to mend."""

    lines: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    weaknesses: list[str] = field(default_factory=list)


def check(function: RewardFunction, problems: Sequence[Problem], timeout_seconds: float = 5.0) -> Findings:
    """Try a reward on the battery of each problem.

    Args:
        function: the reward.
        problems: at least one.
        timeout_seconds: of one call.
    """
    findings = Findings()
    batteries = [probes(problem.answer or "", problem.prompt) for problem in problems]
    groups = [
        to_items(battery, problem.answer, problem.metadata)
        for battery, problem in zip(batteries, problems, strict=True)
    ]
    limits = Limits(timeout_seconds, retries=0)
    first, _ = _score(function, groups, limits)
    # What a first call imports is not to count as the time of a call: the second run takes a second look.
    again, seconds = _score(function, [group[::-1] for group in groups[::-1]], limits, rounds=2)
    again = [row[::-1] for row in again[::-1]]
    _table(findings, batteries[0], first[0])
    calls = 1 if function.form in ("batch", "group") else sum(map(len, groups))
    findings.lines.append(f"{seconds / calls * 1e6:.1f} microseconds a call, {calls} calls in a process of their own")
    for battery, row, second in zip(batteries, first, again, strict=True):
        _contract(findings, battery, row, timeout_seconds)
        _steady(findings, battery, row, second, function)
    if not findings.violations:
        _hands_off(findings, function, groups[0])
        _in_threads(findings, function, groups, first)
    for battery, row, problem in zip(batteries, first, problems, strict=True):
        _tricks(findings, battery, row, problem)
    findings.violations = _first_few(findings.violations)
    findings.weaknesses = _first_few(findings.weaknesses)
    return findings


def _score(
    function: RewardFunction, groups: Sequence[Sequence[Item]], limits: Limits, rounds: int = 1
) -> tuple[list[list[RewardResult]], float]:
    """The results of the last round, and the seconds it spent in the function. All rounds share a process."""
    with Warden(function, limits) as warden:
        report: Report = [warden.score(groups) for _ in range(rounds)][-1]
    flat = iter(report.results)
    return [[next(flat) for _ in group] for group in groups], report.seconds


def _table(findings: Findings, battery: Sequence[Probe], results: Sequence[RewardResult]) -> None:
    findings.lines.append(f"{'completion':<30}{'score':>10}  status and detail")
    for probe, result in zip(battery, results, strict=True):
        status = "" if result.status == "ok" else result.status
        note = " ".join(part for part in (status, result.detail.replace("\n", " ")[:80]) if part)
        findings.lines.append(f"{probe.name:<30}{result.score:>10.4g}  {note}".rstrip())


def _contract(
    findings: Findings, battery: Sequence[Probe], results: Sequence[RewardResult], timeout_seconds: float
) -> None:
    for probe, result in zip(battery, results, strict=True):
        own = "raised" in result.detail or "returned" in result.detail or "process" in result.detail
        if result.status == "timeout" and result.detail.startswith("no answer within"):
            findings.violations.append(
                f"{probe.name}: no answer within {timeout_seconds:g} s; bound the work, or give the reward a longer "
                f"timeout_seconds (here --timeout)"
            )
        elif result.status == "crash" and own:
            findings.violations.append(
                f"{probe.name}: {result.detail}; a reward must give a score to any text: handle this one"
            )
        elif result.status == "infrastructure":
            findings.violations.append(f"{probe.name}: it could not judge: {result.detail}; is its service running?")


def _steady(
    findings: Findings,
    battery: Sequence[Probe],
    first: Sequence[RewardResult],
    second: Sequence[RewardResult],
    function: RewardFunction,
) -> None:
    for probe, one, two in zip(battery, first, second, strict=True):
        if "timeout" not in (one.status, two.status) and abs(one.score - two.score) > TOLERANCE:
            neighbours = " and on no other completion of the batch" if function.form == "batch" else ""
            findings.violations.append(
                f"{probe.name}: {one.score:g} at first and {two.score:g} when everything came in another order; make the "
                f"score depend on its arguments alone: no random numbers, no state between calls{neighbours}"
            )
            return


def _in_threads(
    findings: Findings,
    function: RewardFunction,
    groups: Sequence[Sequence[Item]],
    expected: Sequence[Sequence[RewardResult]],
) -> None:
    """Call it from several threads at once, switching between them as often as can be."""
    whole = function.form in ("batch", "group")
    calls = [(list(group), list(row)) for group, row in zip(groups, expected, strict=True)]
    if not whole:
        calls = [([item], [result]) for group, row in calls for item, result in zip(group, row, strict=True)]
    calls = [(items, row) for items, row in calls if all(result.status == "ok" for result in row)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            pending = [(pool.submit(function.score, items), row) for _ in range(ROUNDS) for items, row in calls]
            for future, row in pending:
                scores = [result.score for result in future.result()]
                if any(abs(a - b.score) > TOLERANCE for a, b in zip(scores, row, strict=True)):
                    findings.violations.append(
                        f"from {THREADS} threads at once it gave {scores[0]:g} where it gave {row[0].score:g} before; keep "
                        f"what a call needs in local variables, or put a lock around shared state"
                    )
                    return
    except (RewardError, ValueError) as error:
        findings.violations.append(
            f"from {THREADS} threads at once: {error}; make it safe to be called by several threads"
        )
    finally:
        sys.setswitchinterval(interval)


def _hands_off(findings: Findings, function: RewardFunction, items: Sequence[Item]) -> None:
    """Metadata are shared by the rewards of a completion."""
    chosen = list(items) if function.form in ("batch", "group") else [items[0]]
    before = copy.deepcopy([dict(item.metadata) for item in chosen])
    function.score(chosen)
    if before != [dict(item.metadata) for item in chosen]:
        findings.violations.append("it changes the metadata it is given, which other rewards see; copy before changing")


def _tricks(findings: Findings, battery: Sequence[Probe], results: Sequence[RewardResult], problem: Problem) -> None:
    scores = {probe.name: result.score for probe, result in zip(battery, results, strict=True)}
    spread = max(scores.values()) - min(scores.values())
    if problem.answer is None or scores["right"] - scores["wrong"] <= JUDGES * spread + TOLERANCE:
        findings.lines.append(
            "right and wrong answers score about alike, so it is not asked whether tricks earn the full score"
        )
        return
    for probe, result in zip(battery, results, strict=True):
        if probe.kind in ("wrong", "hack") and result.score >= scores["right"] - TOLERANCE:
            findings.weaknesses.append(
                f"{probe.name} scores {result.score:g}, as much as the right answer: {_shown(probe.text)}; judge the one "
                f"final answer (rewards.extract) and nothing else"
            )


def _first_few(texts: Sequence[str]) -> list[str]:
    """Without repetitions, and not more than anybody reads."""
    different = list(dict.fromkeys(texts))
    more = len(different) - MAX_SHOWN
    return different[:MAX_SHOWN] + ([f"and {more} more of the kind"] if more > 0 else [])


def _shown(text: str, limit: int = 70) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def problems_of(path: str, metadata: Mapping[str, Any]) -> list[Problem]:
    """The first problems of a file of prompts.

    Raises:
        ValueError: no such file, or rows that are no problems.
    """
    from data.sources import file_records

    records = file_records(path, "train")[:MAX_PROBLEMS]
    return [
        Problem(r.answer, str(r.messages[-1]["content"]), {**r.metadata, **metadata, "messages": r.messages})
        for r in records
    ]


def _parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """["level=2", "task=products"] -> {"level": 2, "task": "products"}: JSON where it is JSON, else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {pair!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rewards.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("function", help="module:function, path/to/file.py:function or a published name")
    parser.add_argument("--answer", default="42", help="the reference answer (default: 42)")
    parser.add_argument("--prompts", metavar="FILE", help=f"problems to try it on instead; the first {MAX_PROBLEMS}")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="metadata of the record")
    parser.add_argument("--kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="options, as the recipe's kwargs")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds a call may take (default: 5)")
    options = parser.parse_args(arguments)
    try:
        metadata = _parse_pairs(options.set)
        function = RewardFunction("reward", options.function, kwargs=_parse_pairs(options.kwargs))
        if options.prompts:
            problems = problems_of(options.prompts, metadata)
        else:
            asked = "How much is 6 * 7?"
            messages = ({"role": "user", "content": asked},)
            problems = [Problem(options.answer, asked, {**METADATA, "messages": messages, **metadata})]
        findings = check(function, problems, options.timeout)
    except (ValueError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(findings.lines))
    for violation in findings.violations:
        print(f"VIOLATION {violation}")
    for weakness in findings.weaknesses:
        print(f"FOOLED {weakness}")
    if findings.violations or findings.weaknesses:
        print(f"{options.function}: to be mended")
        return 1
    print(f"{options.function} keeps the contract")
    return 0


if __name__ == "__main__":
    sys.exit(main())
