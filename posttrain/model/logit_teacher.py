"""A teacher's distributions as a training objective of SFT: caught states of the policy against those of a frozen model.

The teacher reads the very rows that the policy is trained on, with the same position ids, so packed samples stay apart. Of
neither model the logits of all tokens are ever there: heads see the positions that predict a trained token, a chunk at a time,
and the backward pass computes each chunk's logits again.

Shapes: R rows, W tokens of a row, D hidden size of either model, N positions that predict a trained token, C of a chunk, V
vocabulary; E events and K tokens as in distillation_losses.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from posttrain.distillation_losses import distillation_loss, event_logprobs
from posttrain.errors import RunStopped
from posttrain.model.token_scorer import require_plain_head, trunk
from posttrain.sft_recipe import SftTeacherSection

IGNORED = -100  # the label of a token without loss
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


class LogitTeacher:
    """What draws the policy to the teacher.

    Args:
        policy: a causal language model, adapters on it or not, before a trainer has changed its forward pass.
        teacher: another with the same tokens; is frozen here.
        section: of the recipe.
        num_tokens: of the tokenizer.

    Raises:
        RunStopped: one of the two does more to its logits than its head, or has fewer logits than there are tokens, or
            `top_k` leaves no token out.
    """

    def __init__(self, policy: Any, teacher: Any, section: SftTeacherSection, num_tokens: int) -> None:
        self.model = teacher.requires_grad_(False).eval()
        self.weight = section.weight
        self._section = section
        heads = {"the policy": _unwrapped(policy), f"the teacher {section.model_name_or_path!r}": teacher}
        for name, model in heads.items():
            try:
                require_plain_head(model, "logit distillation computes logits by the head alone; use another model")
            except ValueError as error:
                raise RunStopped(f"teacher: {name}: {error}") from error
        sizes = {name: len(model.get_output_embeddings().weight) for name, model in heads.items()}
        # Checkpoints of one family pad their vocabulary to different sizes; what is beyond the shared part is no token.
        self._vocabulary = min(sizes.values())
        for name, size in sizes.items():
            if size < num_tokens:
                raise RunStopped(f"teacher: {name} has logits of {size} tokens and the tokenizer {num_tokens}")
        if section.top_k is not None and section.top_k >= self._vocabulary:
            raise RunStopped(
                f"teacher.top_k={section.top_k} leaves none of {self._vocabulary} tokens out; lower it, or remove it to take "
                f"all"
            )

    @contextmanager
    def capture(self, policy: Any) -> Iterator[list[torch.Tensor]]:
        """Catch the states [R, W, D] that the policy's head sees while the block runs."""
        caught: list[torch.Tensor] = []
        handle = trunk(_unwrapped(policy)).register_forward_hook(
            lambda _module, _inputs, output: caught.append(output.last_hidden_state)
        )
        try:
            yield caught
        finally:
            handle.remove()

    def loss_sum(self, policy: Any, hidden: list[torch.Tensor], inputs: dict[str, Any]) -> Found:
        """Divergence from the teacher, summed over the tokens that `labels` trains; see `distillation_loss`.

        Args:
            policy: the model.
            hidden: what `capture` caught.
            inputs: `input_ids`, `position_ids` and `labels`, int64 [R, W], of the same forward pass.

        Returns:
            A scalar, which has a gradient (zero) even where no token is trained, and detached sums.
        """
        (hidden_RWD,) = hidden
        with torch.no_grad():
            of_teacher_RWD = trunk(self.model)(
                input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
            ).last_hidden_state
        # Position w - 1 predicts token w.
        places = (inputs["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        states_ND, of_teacher_ND = hidden_RWD[:, :-1][places], of_teacher_RWD[:, :-1][places]
        size = self._section.logits_chunk
        found = [
            self._of_chunk(_unwrapped(policy), states_CD, of_teacher_CD)
            for states_CD, of_teacher_CD in zip(states_ND.split(size), of_teacher_ND.split(size), strict=True)
        ]
        sums = {name: torch.stack([of_chunk[name] for _, of_chunk in found]).sum() for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).sum(), sums

    def _of_chunk(self, policy: Any, states_CD: torch.Tensor, of_teacher_CD: torch.Tensor) -> Found:
        section = self._section
        # K tokens a position are few enough to keep; all of them are computed again instead.
        kept = self._events(of_teacher_CD) if section.top_k is not None else None

        def compared(states_CD: torch.Tensor) -> Found:
            teacher_CE, tokens_CK = self._events(of_teacher_CD) if kept is None else kept
            logits_CV = policy.get_output_embeddings()(states_CD)[:, : self._vocabulary]
            return distillation_loss(
                logits_CV,
                teacher_CE,
                tokens_CK,
                kind=section.divergence,
                beta=section.mixture,
                temperature=section.temperature,
            )

        if not torch.is_grad_enabled():
            return compared(states_CD)
        found: Found = checkpoint(compared, states_CD, use_reentrant=False)
        return found

    @torch.no_grad()
    def _events(self, of_teacher_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's log-probabilities, and which tokens they are of (None: all)."""
        logits_CV = self.model.get_output_embeddings()(of_teacher_CD)[:, : self._vocabulary]
        tokens_CK = None if self._section.top_k is None else logits_CV.topk(self._section.top_k, dim=-1).indices
        return event_logprobs(logits_CV, self._section.temperature, tokens_CK), tokens_CK


def _unwrapped(policy: Any) -> Any:
    """The causal language model inside peft's wrapper; its adapters stay in their places."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy
