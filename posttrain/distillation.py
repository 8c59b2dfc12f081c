"""On-policy distillation: a teacher says of each token that the student sampled how likely it would have been.

Reverse KL on the student's own samples (MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649; Qwen3, arXiv 2505.09388): the
advantage of a token is the teacher's logprob less the policy's, with nothing of what follows (discount 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.advantages import Advantage, of_tokens, only
from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.types import Sample


def with_teacher(
    advantage: Advantage, logprobs: Sequence[float], teacher_logprobs: Sequence[float], coef: float
) -> tuple[float, ...]:
    """An advantage with coef (teacher's logprob - policy's) at each token.

    Its mean over samples of the policy is - coef times the reverse KL of a token, and its policy gradient is that of the
    reverse KL at each place, the places held fixed.

    Args:
        advantage: of the completion, or [T] of its tokens; 0 where only the teacher counts.
        logprobs: [T], of the sampled tokens under the policy, nats.
        teacher_logprobs: [T].
        coef: weight.

    Returns:
        [T].
    """
    rows = zip(of_tokens(advantage, len(logprobs)), logprobs, teacher_logprobs, strict=True)
    return tuple(own + coef * (teacher - logprob) for own, logprob, teacher in rows)


def metrics(samples: Sequence[Sample]) -> dict[str, Metric]:
    """`policy/kl_teacher`: nats per token from policy to teacher, by the sampled tokens (k1); nothing without a teacher."""
    gaps = [
        own - teacher
        for sample in samples
        if sample.teacher_logprobs is not None and sample.old_logprobs is not None
        for own, teacher in zip(
            only(sample.old_logprobs, sample.trained), only(sample.teacher_logprobs, sample.trained), strict=True
        )
    ]
    return {"policy/kl_teacher": Metric(math.fsum(gaps) / len(gaps), "mean")} if gaps else {}


def require_same_vocabulary(tokenizer: Any, teacher_tokenizer: Any, teacher: str) -> None:
    """Refuse a teacher that reads other tokens: its logprobs would be of other texts.

    Args:
        tokenizer: the policy's.
        teacher_tokenizer: the teacher's.
        teacher: its checkpoint, for the message.

    Raises:
        RunStopped: the two vocabularies differ.
    """
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, theirs.get(token)),
    )
    first = differing[0]
    raise RunStopped(
        f"teacher.model_name_or_path: {teacher!r} has another vocabulary than the policy ({len(theirs)} tokens and "
        f"{len(ours)}; {len(differing)} differ, first {first!r}: {theirs.get(first)} and {ours.get(first)}); take a teacher "
        f"with the policy's tokenizer, or distil text: python -m posttrain.distill samples the teacher's answers and SFT "
        f"trains on them"
    )
