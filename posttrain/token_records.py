"""Token by token: what samples/ keeps of some completions of a step, for people who look at where a policy was unsure.

The columns are lists, one entry for each token of the completion; they are null for completions that are not chosen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.decoding import token_texts
from posttrain.types import Completion, Group, Prompt, Sample


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One completion, [T_completion] each. Natural logarithms, the temperature applied."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # what each adds to the text; empty for special tokens
    logprobs: tuple[float, ...]  # of the sampler
    learner_logprobs: tuple[float, ...] | None  # before the step; None where the sample was not scored
    ref_logprobs: tuple[float, ...] | None  # of the reference
    advantages: tuple[float, ...] | None  # where they differ between tokens; otherwise the row's own holds for all


def token_records(
    groups: Sequence[Group], samples: Sequence[Sample], tokenizer: Any, *, limit: int | Literal["all"], seed: str
) -> dict[tuple[int, int], TokenRecord]:
    """Records of whole groups, as long as no more than `limit` completions come together; those trained on come first.

    Args:
        groups: of the step.
        samples: what was trained on, with `place`.
        tokenizer: of the policy.
        limit: completions.
        seed: of the choice of groups.

    Returns:
        (which group, which of its completions) -> record.
    """
    found = {sample.place: sample for sample in samples if sample.place is not None}
    trained = {place[0] for place in found}
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda number: number not in trained)
    records: dict[tuple[int, int], TokenRecord] = {}
    for number in order:
        group = groups[number]
        if limit != "all" and len(records) + len(group.completions) > limit:
            break
        for index, completion in enumerate(group.completions):
            sample = found.get((number, index))
            records[number, index] = _record(group.prompt, completion, sample, tokenizer)
    return records


def token_columns(records: Mapping[tuple[int, int], TokenRecord], places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Arrow columns for rows in the order of `places`: `token_ids`, `token_texts`, `token_logprobs` and so on."""
    import pyarrow as pa

    types = {
        "ids": pa.int32(),
        "texts": pa.string(),
        "logprobs": pa.float32(),
        "learner_logprobs": pa.float32(),
        "ref_logprobs": pa.float32(),
        "advantages": pa.float32(),
    }
    rows = [records.get(place) for place in places]
    return {
        f"token_{name}": pa.array([getattr(row, name) if row else None for row in rows], type=pa.list_(kind))
        for name, kind in types.items()
    }


def _record(prompt: Prompt, completion: Completion, sample: Sample | None, tokenizer: Any) -> TokenRecord:
    per_token = sample is not None and not isinstance(sample.advantage, float | int)
    return TokenRecord(
        completion.token_ids,
        tuple(token_texts(tokenizer, prompt.token_ids, completion.token_ids)),
        completion.logprobs,
        sample.old_logprobs if sample else None,
        sample.ref_logprobs if sample else None,
        tuple(sample.advantage) if sample and per_token else None,  # type: ignore[arg-type]
    )
