"""1.0 when the one final answer is right by the scorer of the task the problem came from.

Training reward and evaluation use this same function. It imports `data.tasks` for the scorers.
"""

from __future__ import annotations

from typing import Any

from data.tasks import get_task, task_names
from rewards.extract import final_answer


def score(completion: str, answer: str, task: str, **metadata: Any) -> float:
    """1.0 or 0.0: no partial credit, and none for no answer, several answers, or text outside the tags.

    Args:
        completion: the model's text, `<think>..</think><answer>..</answer>` or the answer block alone.
        answer: the reference.
        task: the family's name, from the record's metadata.
        metadata: not used.

    Raises:
        ValueError: unknown task.
    """
    family = get_task(task)
    text = final_answer(completion)
    return float(text is not None and family.score(text, answer) == 1.0)


def warm_up(**_: Any) -> None:
    """Import what scorers import when they are first used."""
    for name in task_names():
        get_task(name).score("", "")


score.warm_up = warm_up  # type: ignore[attr-defined]
