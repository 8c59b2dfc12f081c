"""The contract of a reward, for the tests of each."""

from __future__ import annotations

from typing import Any

from rewards import RewardFunction
from rewards.battery import Probe, probes
from rewards.check import METADATA, Problem, check

PROMPT = "How much is 6 * 7?"


def tried(spec: str, answer: str = "42", **kwargs: Any) -> list[tuple[Probe, float]]:
    """The score of each completion of the battery, after the reward was found to keep the contract and to resist tricks."""
    reward = RewardFunction("r", spec, kwargs=kwargs)
    metadata = {**METADATA, "messages": ({"role": "user", "content": PROMPT},)}
    findings = check(reward, [Problem(answer, PROMPT, metadata)])
    assert (findings.violations, findings.weaknesses) == ([], [])
    given = {**metadata, "finish_reason": "stop"}
    return [
        (probe, reward(probe.text, answer, {**given, "completion_length": len(probe.text)}).score)
        for probe in probes(answer, PROMPT)
    ]
