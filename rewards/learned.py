"""The score of a reward model that `python -m posttrain.reward_model` has trained.

    rewards:
      - {func: "rewards.learned:score", name: learned, kwargs: {model: runs/my/checkpoints/latest}}

The model is loaded once per process. What `encode` and `raw_scores` do here is also what the stage trains and measures.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.types import Message
from rewards.forms import batched

NORMALIZATION = "reward_normalization.json"  # beside the weights: mean and std of the scores of held-out answers
_lock = threading.Lock()  # rewards may be called from several threads; the model is loaded by one of them


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A loaded reward model."""

    model: Any  # a sequence classifier with one output
    tokenizer: Any
    mean: float | None  # of its scores on held-out answers; None where they were not measured
    std: float | None


@batched
def score(
    completions: Sequence[str],
    answers: Sequence[str | None],
    metadata: Sequence[Mapping[str, Any]],
    model: str,
    normalize: bool = True,
    batch_size: int = 32,
    experts_implementation: str = "grouped_mm",
) -> list[float]:
    """The reward model's score of each completion, as the assistant's answer to the record's `messages`.

    A completion that was cut off is scored as if it had ended there.

    Args:
        completions: the model's texts.
        answers: not used; a reward model judges without a reference.
        metadata: each with `messages`, the prompt.
        model: the reward model's checkpoint. It is loaded when it is first named: a `latest` that moves on later is not.
        normalize: subtract the mean and divide by the standard deviation of its scores on held-out answers.
        batch_size: completions in one forward pass; it does not change a score.
        experts_implementation: eager, grouped_mm or batched_mm.

    Raises:
        ValueError: no `messages`, a model that is not a reward model, `normalize` for one without normalisation, a chat
            longer than the model's context, or a batch size below 1.
    """
    loaded = load(model, experts_implementation)
    chats = []
    for text, record in zip(completions, metadata, strict=True):
        if not record.get("messages"):
            raise ValueError("rewards.learned needs the prompt as metadata `messages`, and a record has none")
        chats.append([*record["messages"], {"role": "assistant", "content": text}])
    sequences = [encode(loaded.tokenizer, chat) for chat in chats]
    scores = raw_scores(loaded.model, sequences, batch_size)
    if not normalize:
        return scores
    if loaded.mean is None or loaded.std is None:
        raise ValueError(
            f"{model!r} has no {NORMALIZATION}: it is a checkpoint from the middle of a run; take the one at the end, or set "
            f"normalize: false"
        )
    return [(value - loaded.mean) / loaded.std for value in scores]


def warm_up(**_: Any) -> None:
    """Import what loading and scoring need; the model itself is loaded by the worker, which may have a GPU."""
    import torch  # noqa: F401
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401


score.warm_up = warm_up  # type: ignore[attr-defined]


def load(path: str, experts_implementation: str = "grouped_mm") -> RewardModel:
    """`read_reward_model`, once per process and checkpoint."""
    with _lock:
        return _read_once(path, experts_implementation)


def read_reward_model(path: str, experts_implementation: str) -> RewardModel:
    """The reward model of a checkpoint, ready to score: float32, on the GPU if there is one.

    Raises:
        ValueError: not a reward model's checkpoint.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import cached_file

    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    # transformers fills what a checkpoint lacks with random numbers.
    if info["missing_keys"] or model.config.num_labels != 1:
        lacking = ", ".join(sorted(info["missing_keys"])[:3]) or "a head with one output"
        raise ValueError(
            f"{path!r} is no reward model: it lacks {lacking}; give the checkpoints/latest of a reward_model run"
        )
    if hasattr(model, "set_experts_implementation") and getattr(model.config, "num_experts_per_tok", None):
        model.set_experts_implementation(experts_implementation)
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    file = cached_file(path, NORMALIZATION, _raise_exceptions_for_missing_entries=False)
    normalization = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    tokenizer = AutoTokenizer.from_pretrained(path)
    return RewardModel(model, tokenizer, normalization.get("mean"), normalization.get("std"))


_read_once = cache(read_reward_model)


def encode(tokenizer: Any, chat: Sequence[Message]) -> list[int]:
    """Token ids [T] of a finished chat, by the tokenizer's chat template."""
    text = tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def raw_scores(model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """What the model says of each sequence, in their order.

    Sequences of like length go together, padded on the right; the model attends to no padding and reads its score at the
    last real token.

    Raises:
        ValueError: a sequence longer than the model's context, or a batch size below 1.
    """
    import torch

    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    longest = max(map(len, sequences), default=0)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"prompt and completion have {longest} tokens, more than the reward model's {context}; lower "
            f"rollout.max_completion_length, or train a reward model with a longer context"
        )
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    scores = [0.0] * len(sequences)
    pad = model.config.get_text_config().pad_token_id
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(sequences[place]) for place in places)
        ids_BT = torch.full((len(places), width), pad, device=model.device)
        mask_BT = torch.zeros_like(ids_BT)
        for row, place in enumerate(places):
            length = len(sequences[place])
            ids_BT[row, :length] = torch.tensor(sequences[place])
            mask_BT[row, :length] = 1
        with torch.no_grad():
            values_B = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, 0]
        for place, value in zip(places, values_B.float().tolist(), strict=True):
            scores[place] = value
    return scores
