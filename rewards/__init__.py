"""Rewards: functions that score one completion, and the door they come through.

A reward is a function

    def score(completion: str, answer: str | None, **metadata) -> float | RewardResult

named in a recipe as `rewards.task_answer:score` (a module) or `my_rewards/short.py:score` (a file). `completion` is the
decoded text without special tokens, `answer` the reference, `metadata` what the record carries (task, level, ...) plus
`finish_reason` ("stop", "length", "abort") and `completion_length` (tokens), plus the recipe's `kwargs`, which win. A
reward says 0..1 by convention; anything finite is allowed. `@batched` and `@grouped` mark functions that score many
completions at once (see `rewards.forms`).

Shipped: task_answer, math_answer, multiple_choice, reasoning_gym, instruction_following, exact, drop_f1, format,
language_consistency, length, repetition, learned, code_tests, program_tests. `python -m rewards.check my_file.py:score`
tries a function out.
How one runs: `warden` (judging, time limits, who is to blame) over `crew` (processes), `zygote` (forks them), `worker` (makes
the calls). From the project this package imports `posttrain.types`, and `data.tasks` for the scorers of generated tasks.
"""

from __future__ import annotations

from rewards.errors import RewardError, Unavailable
from rewards.forms import batched, form_of, grouped
from rewards.resolve import resolve
from rewards.scoring import Item, Reward, RewardFunction, combine, score_completion, score_group, to_group, to_item

__all__ = [
    "Item",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Unavailable",
    "batched",
    "combine",
    "form_of",
    "grouped",
    "resolve",
    "score_completion",
    "score_group",
    "to_group",
    "to_item",
]
