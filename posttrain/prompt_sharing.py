"""A prompt that several samples of a microbatch have in common, computed once for all of them (`learner.share_prompts`).

The completions of a group answer one prompt. Its tokens come before theirs and see none of them, so what the model computes of
them is the same for each completion, and so is the sum of the gradients that come back. A row then holds a prompt once and its
completions behind it, each of which sees the prompt and itself:

    prompt | completion 1 | completion 2 | completion 3        positions: 0 1 2 | 3 4 5 6 | 3 4 | 3 4 5

Only the model sees such rows. All that is said of tokens (logprobs, advantages, masks, experts) stays in rows of whole
samples, where each has its prompt; `places_N` leads from the one to the other. Shapes: Q rows of X tokens that are computed,
R rows of W tokens of whole samples, N = R x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from posttrain.types import Sample

PADDING = -1


@dataclass(frozen=True, slots=True)
class SharedRows:
    """What the model computes of a microbatch."""

    input_ids_QX: torch.Tensor  # int64
    position_ids_QX: torch.Tensor  # int64; a completion's go on from its prompt's
    families_QX: torch.Tensor  # int64: which prompt of the row, -1 for padding
    completions_QX: torch.Tensor  # int64: which completion of that prompt, -1 for the prompt itself
    places_N: torch.Tensor  # int64: where each token of whole samples is among the Q x X; 0 for padding
    experts_NLK: torch.Tensor | None = None  # int16 [Q x X, L, K], as `Microbatch.experts_NLK`

    def to(self, device: torch.device) -> SharedRows:
        """These rows with their tensors there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in values.items()}
        return SharedRows(**moved)

    def attention_mask(self, *, additive: bool) -> torch.Tensor:
        """[Q, 1, X, X], which tokens each one sees: those before it of its prompt and its own completion.

        Args:
            additive: float32, to be added to the scores, and not bool.
        """
        length = self.input_ids_QX.shape[1]
        before_XX = torch.ones(length, length, dtype=torch.bool, device=self.input_ids_QX.device).tril()
        one_family_QXX = self.families_QX[:, :, None] == self.families_QX[:, None, :]
        own_QXX = self.completions_QX[:, :, None] == self.completions_QX[:, None, :]
        of_prompt_QX = self.completions_QX[:, None, :] == PADDING
        seen = (before_XX & one_family_QXX & (own_QXX | of_prompt_QX))[:, None]
        return added_to_scores(seen) if additive else seen


def added_to_scores(seen: torch.Tensor) -> torch.Tensor:
    """A bool mask as float32 that eager attention adds: nothing where a token is seen, the least number elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


@dataclass(frozen=True, slots=True)
class Family:
    """Samples that are computed together: one alone, or some with the same prompt."""

    indices: tuple[int, ...]
    length: int  # tokens that are computed


def families_of(samples: Sequence[Sample], row_length: int, *, share: bool) -> list[Family]:
    """Put samples with the same prompt together, as many as a row has room for, in the order they come in.

    Args:
        samples: each fits a row.
        row_length: most tokens of a row.
        share: False leaves each sample alone.
    """
    found: list[Family] = []
    open_families: dict[tuple[int, ...], int] = {}  # prompt -> its family that may have room
    for index, sample in enumerate(samples):
        length, place = len(sample.completion_ids), open_families.get(sample.prompt_ids)
        if share and place is not None and found[place].length + length <= row_length:
            found[place] = Family((*found[place].indices, index), found[place].length + length)
        else:
            open_families[sample.prompt_ids] = len(found)
            found.append(Family((index,), len(sample.prompt_ids) + length))
    return found


def shared_rows(
    samples: Sequence[Sample],
    rows: Sequence[Sequence[Family]],
    shape: tuple[int, int],
    width: int,
    pad_token_id: int,
    experts_NLK: torch.Tensor | None,
) -> SharedRows:
    """What is computed of some rows of families.

    Args:
        samples: that the families speak of.
        rows: at most Q of them.
        shape: (Q, X).
        width: W of the rows of whole samples, which hold the same samples in the same order.
        pad_token_id: fills rows up.
        experts_NLK: int16 [Q x X, L, K] of -1, to write the experts into that the sampler chose; of a prompt, those of its
            first sample that has them. None leaves them out.
    """
    made = SharedRows(
        input_ids_QX=torch.full(shape, pad_token_id),
        position_ids_QX=torch.zeros(shape, dtype=torch.int64),
        families_QX=torch.full(shape, PADDING),
        completions_QX=torch.full(shape, PADDING),
        places_N=torch.zeros(shape[0], width, dtype=torch.int64),
        experts_NLK=experts_NLK,
    )
    for number, row in enumerate(rows):
        computed = whole = 0
        for family_number, family in enumerate(row):
            prompt_ids = samples[family.indices[0]].prompt_ids
            prompt = slice(computed, computed + len(prompt_ids))
            made.input_ids_QX[number, prompt] = torch.tensor(prompt_ids)
            made.position_ids_QX[number, prompt] = torch.arange(len(prompt_ids))
            made.families_QX[number, computed : computed + family.length] = family_number
            computed = prompt.stop
            for completion_number, index in enumerate(family.indices):
                sample = samples[index]
                completion = slice(computed, computed + len(sample.completion_ids))
                made.input_ids_QX[number, completion] = torch.tensor(sample.completion_ids)
                made.position_ids_QX[number, completion] = len(prompt_ids) + torch.arange(len(sample.completion_ids))
                made.completions_QX[number, completion] = completion_number
                of_sample_T = number * shape[1] + torch.cat(
                    [torch.arange(prompt.start, prompt.stop), torch.arange(completion.start, completion.stop)]
                )
                made.places_N[number, whole : whole + len(of_sample_T)] = of_sample_T
                _write_experts(made.experts_NLK, sample, of_sample_T)
                computed, whole = completion.stop, whole + len(of_sample_T)
    return replace(made, places_N=made.places_N.flatten())


def _write_experts(experts_NLK: torch.Tensor | None, sample: Sample, places_T: torch.Tensor) -> None:
    if experts_NLK is None or sample.experts_TLK is None:
        return
    known = torch.tensor(sample.experts_TLK[: len(places_T) - 1])  # the last token was never fed to the sampler
    places = places_T[: len(known)]
    is_new = (experts_NLK[places] < 0).flatten(1).any(dim=1)
    experts_NLK[places[is_new]] = known[is_new].to(experts_NLK.dtype)


def require_shareable(model: Any) -> None:
    """Refuse a model that would not heed the mask.

    Raises:
        ValueError: attention of another kind than all tokens before, or by a kernel that takes no mask.
    """
    config = model.config.get_text_config()
    kind = config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ValueError(
            f"learner.share_prompts: attention {kind!r} takes no mask of its own; set model.attn_implementation: sdpa, or "
            f"share_prompts: false"
        )
    if getattr(config, "sliding_window", None) or "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"learner.share_prompts: {type(model).__name__} has layers that do not see all tokens before (sliding window, "
            f"linear attention); set share_prompts: false"
        )
