"""open-r1/OpenR1-Math-220k: `problem`, `answer`, R1's `generations`, and for each of them whether it is right and whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A chat with the first generation that is whole and that math-verify found right; a row without one is left out.

    For RL or distillation, which need the problem alone, map the columns instead: {prompt: problem, answer: answer}.
    """
    problem, generations = column(row, "problem"), column(row, "generations", list)
    whole, right = column(row, "is_reasoning_complete", list), column(row, "correctness_math_verify", list)
    if not len(generations) == len(whole) == len(right):
        raise ValueError(
            f"columns generations, is_reasoning_complete and correctness_math_verify have {len(generations)}, {len(whole)} "
            f"and {len(right)} entries; they must have one for each generation"
        )
    for text, is_whole, is_right in zip(generations, whole, right, strict=True):
        if is_whole and is_right:
            if not isinstance(text, str):
                raise ValueError(f"column generations must hold texts, not {text!r:.80}")
            named = {"id": row["uuid"]} if isinstance(row.get("uuid"), str) else {}
            answer = {"answer": column(row, "answer")}
            return {"prompt": problem, "completion": text, **answer, **named, **metadata(row, "source", "problem_type")}
    return None
