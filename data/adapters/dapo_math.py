"""BytedTsinghua-SIA/DAPO-Math-17k: messages in `prompt`, the integer in `reward_model.ground_truth`.

The problem stands between two instructions that ask for a line "Answer: ...". They are cut off: how an answer is to be
written is said by the recipe's chat template or system prompt, and `rewards.math_answer` reads boxes and answer tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata

BEFORE = "Solve the following math problem step by step."  # begins the first paragraph
AFTER = 'Remember to put your answer on its own line after "Answer:".'


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem without the instructions around it, and its answer."""
    messages = column(row, "prompt", list)
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") != "user":
        raise ValueError(f"column prompt must be one user message, not {messages!r:.80}")
    text = column(messages[0], "content").strip()
    if text.startswith(BEFORE):
        text = text.partition("\n\n")[2]
    text = text.removesuffix(AFTER).strip()
    if not text:
        raise ValueError("column prompt holds no problem between its instructions")
    answer = column(row, "reward_model.ground_truth")
    index = row["extra_info"].get("index") if isinstance(row.get("extra_info"), Mapping) else None
    named = {} if index is None else {"id": str(index)}
    return {"prompt": text, "answer": answer, **named, **metadata(row, "data_source", "ability")}
