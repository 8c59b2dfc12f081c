"""Multi-token prediction as a training objective: catches the trunk's hidden states and adds the module's loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.model.balance import RouterBalance
from posttrain.model.mtp import MtpModule, mtp_loss
from posttrain.model.router import find_routers, record_routing
from posttrain.sft_recipe import SftRouterSection


class MtpObjective:
    """The module hangs on the policy as `policy.mtp`, so that optimizer and accelerate take it along.

    Args:
        policy: a DeepSeek-V3.
        module: its extra depth.
        loss_weight: lambda.
        detach_trunk: the loss trains the module only.
        router: how the correction bias of its router moves.
    """

    def __init__(
        self, policy: Any, module: MtpModule, *, loss_weight: float, detach_trunk: bool, router: SftRouterSection
    ) -> None:
        policy.mtp = module
        self.module = module
        self.loss_weight = loss_weight
        # Its router moves like the trunk's; the balance losses are the trunk's alone.
        section = SftRouterSection(bias_update_speed=router.bias_update_speed, freeze=router.freeze)
        self.balance = RouterBalance(find_routers(module), section, name="mtp_router")
        self._detach_trunk = detach_trunk

    @contextmanager
    def capture(self, policy: Any) -> Iterator[list[torch.Tensor]]:
        """Catch the hidden states [R, W, H] after the trunk's final norm while the block runs."""
        caught: list[torch.Tensor] = []
        handle = policy.model.norm.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            yield caught
        finally:
            handle.remove()

    def loss_sum(
        self, policy: Any, hidden: list[torch.Tensor], inputs: dict[str, Any], real_N: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of the token after the next, summed over the tokens that `labels` trains.

        Args:
            policy: the model.
            hidden: what `capture` caught.
            inputs: of the same forward pass.
            real_N: False for padding.
        """
        (hidden_RWH,) = hidden
        with record_routing(self.balance.routers) as trace:
            loss_sum, _ = mtp_loss(
                policy.mtp,
                policy.model.embed_tokens,
                policy.lm_head,
                hidden_RWH,
                inputs["input_ids"],
                inputs["position_ids"],
                inputs["labels"],
                policy.model.rotary_emb,
                detach_trunk=self._detach_trunk,
            )
        self.balance.observe(trace, real_N)
        return loss_sum
