"""Logprobs of tokens without the logits of all tokens: the trunk once, the head on what is trained, a chunk at a time.

The logits of a microbatch of T tokens are T x V numbers, for a vocabulary of 129,280 half a megabyte a token and mostly of
tokens that nothing is learnt from: prompts and padding. Here the head sees the positions that predict a trained token, and the
backward pass computes each chunk's logits again, so that only one chunk of them is ever there.

Shapes: R rows of a packed microbatch, W tokens of a row, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from posttrain import losses
from posttrain.context_parallel import ContextParallel, mask_of_rows
from posttrain.prompt_sharing import SharedRows


class TokenScorer(torch.nn.Module):
    """A causal language model that says how likely the trained tokens are.

    Args:
        model: of transformers.
        chunk: positions whose logits are in memory together; None takes the model's own logits of all positions.
        context: the ranks that share each row with this one; the model is changed to do so.

    Raises:
        ValueError: see `require_plain_head`. A model that has no weights yet is looked at when that is called.
    """

    def __init__(self, model: Any, chunk: int | None, context: ContextParallel | None = None) -> None:
        super().__init__()
        self.model = model
        self._chunk = chunk
        self._context: ContextParallel | None = None
        self._looks_at_head = False
        # Eager attention adds its mask to the scores, and would add True as 1.
        self._takes_additive_mask = model.config.get_text_config()._attn_implementation == "eager"
        if not next(model.parameters()).is_meta:
            self.require_plain_head()
        if context is not None:
            self._context = context
            context.attach(model)

    def require_plain_head(self) -> None:
        """Compare the model's own logits with those of trunk and head, on a few tokens. Collective where weights are spread.

        Raises:
            ValueError: with a chunk, the model's logits are more than its head on its trunk's states.
        """

        def compute(ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self._looks_at_head = True  # in `forward`, where weights that are spread are gathered
            found: tuple[torch.Tensor, torch.Tensor] = self(ids, positions, positions > 0, 1.0)
            self._looks_at_head = False
            return found

        if self._chunk is not None:
            cure = "set learner.logits_chunk: null, which keeps all logits in memory"
            require_plain_head(self.model, cure, compute)

    def forward(
        self,
        input_ids_RW: torch.Tensor,
        position_ids_RW: torch.Tensor,
        mask_RW: torch.Tensor,
        temperature: float,
        *,
        candidates_RWC: torch.Tensor | None = None,
        entropy_gradient: bool = False,
        shared: SharedRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprob of each trained token and entropy of what it was drawn from, float32 [R, W] each; see `token_logprobs`.

        Args:
            input_ids_RW: int64.
            position_ids_RW: int64; they restart at each sample.
            mask_RW: bool, the trained tokens. With a chunk, all others get 0.
            temperature: above 0.
            candidates_RWC: see `posttrain.losses.token_logprobs`.
            entropy_gradient: let a gradient through the entropy.
            shared: what the model computes instead of these rows; needs a chunk.
        """
        if self._looks_at_head:
            return _logits_twice(self.model, self._inputs(input_ids_RW, position_ids_RW, None))
        if self._chunk is None:
            assert shared is None and self._context is None
            return losses.token_logprobs(
                self.model(**self._inputs(input_ids_RW, position_ids_RW, shared)).logits,
                input_ids_RW,
                temperature,
                entropy_gradient=entropy_gradient,
                candidates_RWC=candidates_RWC,
            )
        hidden = trunk(self.model)(**self._inputs(input_ids_RW, position_ids_RW, shared)).last_hidden_state
        # Position w predicts token w + 1; a row's first token is never trained.
        predicts_RW, next_RW = _next(mask_RW), _next(input_ids_RW)
        allowed_RWC = None if candidates_RWC is None else _next(candidates_RWC)
        if self._context is not None:
            predicts_RW, next_RW = self._context.own(predicts_RW), self._context.own(next_RW)
            allowed_RWC = None if allowed_RWC is None else self._context.own(allowed_RWC)
        targets_N = next_RW[predicts_RW]
        if shared is None:
            states_ND = hidden[predicts_RW]
        else:
            states_ND = hidden.flatten(0, 1)[shared.places_N.view(mask_RW.shape)[predicts_RW]]
        allowed = [None] if allowed_RWC is None else allowed_RWC[predicts_RW].split(self._chunk)
        found = [
            self._of_chunk(states_CD, targets_C, allowed[min(index, len(allowed) - 1)], temperature, entropy_gradient)
            for index, (states_CD, targets_C) in enumerate(
                zip(states_ND.split(self._chunk), targets_N.split(self._chunk), strict=True)
            )
        ]
        logprobs_RW, entropy_RW = (
            torch.zeros(predicts_RW.shape, device=mask_RW.device).masked_scatter(predicts_RW, torch.cat(values))
            for values in zip(*found, strict=True)
        )
        if not len(targets_N):
            # A rank short of work takes part in the backward pass all the same.
            logprobs_RW = logprobs_RW + 0.0 * hidden.sum() + 0.0 * self.model.get_output_embeddings().weight.sum()
        if self._context is not None:
            width = mask_RW.shape[1]
            logprobs_RW, entropy_RW = (self._context.whole(values, width) for values in (logprobs_RW, entropy_RW))
        return _previous(logprobs_RW), _previous(entropy_RW)

    def _inputs(
        self, input_ids_RW: torch.Tensor, position_ids_RW: torch.Tensor, shared: SharedRows | None
    ) -> dict[str, Any]:
        """What the model is called with."""
        if shared is not None:
            return {
                "input_ids": shared.input_ids_QX,
                "position_ids": shared.position_ids_QX,
                "attention_mask": shared.attention_mask(additive=self._takes_additive_mask),
                "use_cache": False,
            }
        if self._context is not None:
            own_RB = self._context.own(input_ids_RW)
            width = own_RB.shape[1] * self._context.size
            mask = mask_of_rows(position_ids_RW, width, additive=self._takes_additive_mask)
            positions_RB = self._context.own(position_ids_RW)
            return {"input_ids": own_RB, "position_ids": positions_RB, "attention_mask": mask, "use_cache": False}
        # No attention mask: transformers then keeps packed samples apart by their position ids.
        return {"input_ids": input_ids_RW, "position_ids": position_ids_RW, "use_cache": False}

    def _of_chunk(
        self,
        states_CD: torch.Tensor,
        targets_C: torch.Tensor,
        allowed_CN: torch.Tensor | None,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def scored(states_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits_CV = self.model.get_output_embeddings()(states_CD)
            return losses.logprobs_of(logits_CV, targets_C, temperature, allowed_CN, entropy_gradient=entropy_gradient)

        if not torch.is_grad_enabled():
            return scored(states_CD)
        found: tuple[torch.Tensor, torch.Tensor] = checkpoint(scored, states_CD, use_reentrant=False)
        return found


def _next(values_RW: torch.Tensor) -> torch.Tensor:
    """At each place of [R, W, ...] what is at the next one; zeros at the last."""
    return torch.cat([values_RW[:, 1:], torch.zeros_like(values_RW[:, :1])], dim=1)


def _previous(values_RW: torch.Tensor) -> torch.Tensor:
    """At each place what is at the one before; zeros at the first."""
    return torch.nn.functional.pad(values_RW[:, :-1], (1, 0))


def trunk(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, model.base_model_prefix)


def _logits_twice(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """By the model, and by its head on its trunk's states, in one pass: layers may have to be gathered from other ranks."""
    states: list[torch.Tensor] = []
    hook = trunk(model).register_forward_hook(lambda _, __, found: states.append(found.last_hidden_state))
    try:
        own = model(**inputs).logits
    finally:
        hook.remove()
    return own, model.get_output_embeddings()(states[0])


@torch.no_grad()
def require_plain_head(
    model: Any, cure: str, compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
) -> None:
    """Compare the model's own logits with those of trunk and head, on a few tokens.

    Args:
        model: of transformers.
        cure: what to do about it.
        compute: both logits of tokens and their positions, where that takes more than a call of the model.

    Raises:
        ValueError: they differ; the message ends with the cure.
    """
    positions = torch.arange(8, device=next(model.parameters()).device)[None]
    ids = positions % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()  # dropout would make any two passes differ
    own, split = compute(ids, positions) if compute else _logits_twice(model, {"input_ids": ids, "use_cache": False})
    model.train(training)
    if not torch.equal(own, split):
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its head (they differ by "
            f"{float((own - split).abs().max()):.1e}); {cure}"
        )
