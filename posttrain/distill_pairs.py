"""Preference pairs of a policy's own answers: a right one over a wrong one to the same prompt, for a reward model.

A reward model that judges a policy has to tell that policy's own answers apart (InstructGPT, section 3.4, has people rank
them; DeepSeek-V3, section 5.2.1, trains its reward model from SFT checkpoints). Here a threshold of a reward decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.distill_data import Problem
from posttrain.distill_output import chat_type
from posttrain.selection import Answer

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "sampled"  # what reports of a reward model count such pairs under
PASSED_OVER = {"duplicate", "not_picked"}  # reasons that say nothing against an answer


def pairs_schema() -> pa.Schema:
    """Columns of a pair, as `data.pairs` reads them, and where it comes from."""
    import pyarrow as pa

    text = pa.string()
    chat = chat_type()
    names = ("kind", "answer", "problem_kind", "prompt_id", "chosen_id", "rejected_id", "teacher", "teacher_version")
    return pa.schema([("id", text), ("chosen", chat), ("rejected", chat), *((name, text) for name in names)])


def pair_rows(problem: Problem, answers: Sequence[Answer], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` pairs of one prompt, no two of the same texts.

    Args:
        problem: the prompt.
        answers: decided. The better one of a pair breaks no rule; the worse one is below a threshold of `correctness`.
        limit: how many at most. The k-th pair has the k-th right and the k-th wrong answer, beginning anew where there are
            fewer of one kind.

    Returns:
        Rows for `pairs_schema`; none where all answers are right, or all wrong.
    """
    right = _distinct([a for a in answers if {reason for reason, _ in a.reasons} <= PASSED_OVER])
    wrong = _distinct([a for a in answers if _is_wrong(a)])
    if not right or not wrong:
        return []
    count = min(limit, max(len(right), len(wrong)))
    return [_row(problem, right[k % len(right)], wrong[k % len(wrong)], k) for k in range(count)]


def _is_wrong(answer: Answer) -> bool:
    """Whether it was judged, and not good enough."""
    return not answer.judgement.is_unjudged and any(reason == "correctness" for reason, _ in answer.reasons)


def _distinct(answers: Sequence[Answer]) -> list[Answer]:
    """The first of each text."""
    return list({answer.generation.completion: answer for answer in reversed(answers)}.values())[::-1]


def _row(problem: Problem, right: Answer, wrong: Answer, number: int) -> dict[str, Any]:
    def chat(answer: Answer) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": answer.generation.completion}
        return [*(dict(message) for message in problem.record.messages), said]

    return {
        "id": f"{problem.record.id}/{KIND}/{number}",
        "chosen": chat(right),
        "rejected": chat(wrong),
        "kind": KIND,
        "answer": problem.record.answer,
        "problem_kind": problem.kind,
        "prompt_id": problem.record.id,
        "chosen_id": right.generation.sample_id,
        "rejected_id": wrong.generation.sample_id,
        "teacher": right.generation.teacher,
        "teacher_version": right.generation.teacher_version,
    }
