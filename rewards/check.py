"""Try a reward function out: python -m rewards.check my_rewards.py:score [--answer 42] [--set task=chain_sum ...]

Runs it over a small battery of completions, prints what it says and how long it takes, and exits with 1 when it breaks
the contract: cannot be resolved, raises, returns no finite number, or says two things of one completion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.types import RewardResult
from rewards.scoring import RewardError, RewardFunction

REPEATS = 5
METADATA = {"task": "chain_sum", "level": 1, "split": "train", "finish_reason": "stop", "completion_length": 20}


def battery(answer: str) -> dict[str, str]:
    """Completions that every reward must survive, by name. "right" is the only one that should get the full score."""

    def chat(text: str, thinking: str = "so it is") -> str:
        return f"<think>{thinking}</think><answer>{text}</answer>"

    return {
        "right": chat(answer),
        "wrong": chat(f"{answer}1"),
        "empty": "",
        "empty answer": chat(""),
        "answer twice": f"{chat(answer)}<answer>{answer}1</answer>",
        "several answers in one": chat(f"{answer} or {answer}1"),
        "text after the answer": f"{chat(answer)} I think",
        "never closed": f"<think>so it is</think><answer>{answer}",
        "tags only": "</answer><answer></think><think>",
        "very long": chat(f"{answer}1", thinking="a lot of text " * 10_000),
        "unicode": chat("４２ ∑ é \U0001f600 \x00"),
    }


def check(function: RewardFunction, answer: str, metadata: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(lines of the table, violations of the contract) of one reward function."""
    lines = [f"{'completion':<24}{'score':>10}{'microseconds':>14}  detail"]
    violations = []
    for name, completion in battery(answer).items():
        try:
            results, micros = _measure(function, completion, answer, metadata)
        except (RewardError, ValueError) as error:
            violations.append(f"{name}: {error}")
            lines.append(f"{name:<24}{'FAILED':>10}")
            continue
        first = results[0]
        note = " ".join(part for part in (first.status if first.status != "ok" else "", first.detail) if part)
        lines.append(f"{name:<24}{first.score:>10.4g}{micros:>14.1f}  {note}".rstrip())
        different = sorted({result.score for result in results})
        if len(different) > 1:
            violations.append(f"{name}: not deterministic, {len(results)} calls gave {different}")
    return lines, violations


def _measure(
    function: RewardFunction, completion: str, answer: str, metadata: Mapping[str, Any]
) -> tuple[list[RewardResult], float]:
    """The results of `REPEATS` calls and the median time of one, in microseconds."""
    results, seconds = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        results.append(function(completion, answer, metadata))
        seconds.append(time.perf_counter() - start)
    return results, statistics.median(seconds) * 1e6


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
    parser.add_argument("function", help="module:function or path/to/file.py:function")
    parser.add_argument("--answer", default="42", help="the reference answer (default: 42)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="metadata of the record")
    options = parser.parse_args(arguments)
    try:
        metadata = {**METADATA, **_parse_pairs(options.set)}
        function = RewardFunction("reward", options.function)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines, violations = check(function, options.answer, metadata)
    print("\n".join(lines))
    for violation in violations:
        print(f"VIOLATION {violation}")
    print("contract broken" if violations else f"{options.function} keeps the contract")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
