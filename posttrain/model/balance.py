"""Expert balance while training: what the routers did, the correction bias, and the balance losses.

Shapes: N tokens of a forward pass, L MoE layers, E routed experts, S samples.
"""

from __future__ import annotations

from typing import Any

import torch

from posttrain.balance_losses import sequence_balance, switch_balance
from posttrain.metrics import Metric
from posttrain.model import router
from posttrain.model.router import RouterTrace
from posttrain.sections import RouterSection
from posttrain.sft_recipe import SftRouterSection


class RouterBalance:
    """Watches the routers of a policy in training.

    `observe` takes each microbatch's trace, `end_step` follows each optimizer step and moves the correction bias,
    `metrics` gives what was seen since it was last asked. Padding is never counted.

    Raises:
        ValueError: the section asks for what these routers do not have.
    """

    def __init__(self, routers: list[Any], section: RouterSection, name: str = "router") -> None:
        self.routers = routers
        self._name = name
        self._section = section
        self._losses = section if isinstance(section, SftRouterSection) else SftRouterSection()
        self._sigmoid = router.has_correction_bias(routers)
        _check(routers, section, sigmoid=self._sigmoid)
        if section.freeze:
            for module in routers:
                module.weight.requires_grad_(False)
        if routers:
            shape = (len(routers), routers[0].weight.shape[0])
            self._step_LE = torch.zeros(shape)
            self._seen_LE = torch.zeros(shape)
            self._loads_LE = torch.zeros(shape)
            self._entropy_L = torch.zeros(len(routers))
            self._step_entropy_L = torch.zeros(len(routers))

    @property
    def step_counts_LE(self) -> torch.Tensor:
        """Tokens that each expert got since the last optimizer step; padding is left out."""
        return self._step_LE

    @property
    def needs_gradient(self) -> bool:
        """Whether traces must be recorded with gradient."""
        return self._losses.sequence_balance_alpha > 0 or self._losses.router_aux_loss_coef > 0

    def observe(self, trace: RouterTrace, real_N: torch.Tensor, *, replayed: bool = False) -> None:
        """Count a microbatch.

        Args:
            trace: of its forward pass.
            real_N: False for padding.
            replayed: count the experts that were replayed, rather than those that the routers chose.
        """
        if not self.routers:
            return
        self._to(real_N.device)
        num_experts = self._step_LE.shape[1]
        self._step_LE += router.expert_counts(trace.used_layers if replayed else trace.chosen, real_N, num_experts)
        with torch.no_grad():
            for layer, logits_NE in enumerate(trace.logits):
                self._step_entropy_L[layer] += router.entropy_sum(logits_NE.detach(), real_N, sigmoid=self._sigmoid)

    def loss(
        self, trace: RouterTrace, sequence_N: torch.Tensor, *, num_sequences: int, num_microbatches: int
    ) -> torch.Tensor:
        """The weighted balance losses of a microbatch, a scalar.

        Args:
            trace: recorded with gradient.
            sequence_N: the sample of each token, -1 for padding.
            num_sequences: samples of the optimizer step, all microbatches and ranks together.
            num_microbatches: of the optimizer step, all ranks together.
        """
        section = self._losses
        if section.sequence_balance_alpha:
            top_k = trace.chosen[0].shape[1]
            layers = [
                sequence_balance(router.affinities(logits_NE.float(), sigmoid=True), sequence_N, top_k)
                for logits_NE in trace.logits
            ]
            return torch.stack(layers).sum() * (section.sequence_balance_alpha / num_sequences)
        weight = section.router_aux_loss_coef / num_microbatches
        return switch_balance(trace.logits, trace.chosen, sequence_N >= 0) * weight

    def end_step(self) -> None:
        """After an optimizer step: move the correction bias by the load of the global batch."""
        if not self.routers:
            return
        if torch.distributed.is_initialized():
            self._to(self.routers[0].weight.device)  # a rank that observes nothing takes part, too
            torch.distributed.all_reduce(self._step_LE)
        if self._section.bias_update_speed:
            router.update_correction_bias(self.routers, self._step_LE, self._section.bias_update_speed)
        self._entropy_L += self._step_entropy_L
        self._seen_LE += self._step_LE
        self._loads_LE += self._step_LE
        self.last_counts = self._step_LE.clone()
        self.forget_step()

    def forget_step(self) -> None:
        """Leave out what was observed since the last optimizer step."""
        if self.routers:
            self._step_LE.zero_()
            self._step_entropy_L.zero_()

    def metrics(self) -> dict[str, Metric]:
        """Load and entropy of each layer since the last call; collective where there are several ranks."""
        if not self.routers:
            return {}
        entropy_L = self._entropy_L.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(entropy_L)
        top_k = getattr(self.routers[0], "top_k", 1)
        tokens_L = self._seen_LE.sum(dim=1).clamp(min=1) / top_k
        violation_L = router.violations(self._seen_LE)
        found = {f"{self._name}/max_violation": Metric(float(violation_L.max()), "max")}
        for layer, module in enumerate(self.routers):
            place = f"{self._name}/layer_{layer:02d}"
            found[f"{place}/max_violation"] = Metric(float(violation_L[layer]), "max")
            found[f"{place}/entropy"] = Metric(float(entropy_L[layer] / tokens_L[layer]), "mean")
            found[f"{place}/unused_experts"] = Metric(float((self._seen_LE[layer] == 0).sum()), "max")
            if self._sigmoid:
                bias_E = module.e_score_correction_bias.float()
                found[f"{place}/bias_range"] = Metric(float(bias_E.max() - bias_E.min()), "last")
        self._seen_LE.zero_()
        self._entropy_L.zero_()
        return found

    def take_loads(self) -> list[list[int]]:
        """[L][E] tokens that each expert got in the optimizer steps since this was last asked; empty for a dense model."""
        if not self.routers:
            return []
        found: list[list[int]] = self._loads_LE.long().tolist()
        self._loads_LE.zero_()
        return found

    def _to(self, device: torch.device) -> None:
        if self._step_LE.device != device:  # the trainer moved the model after we were made
            self._step_LE, self._seen_LE = self._step_LE.to(device), self._seen_LE.to(device)
            self._loads_LE = self._loads_LE.to(device)
            self._entropy_L, self._step_entropy_L = self._entropy_L.to(device), self._step_entropy_L.to(device)


def _check(routers: list[Any], section: RouterSection, *, sigmoid: bool) -> None:
    wanted = {name: value for name, value in section if value and name != "bias_counts"}
    if wanted and not routers:
        raise ValueError(
            f"router.{next(iter(wanted))}: this policy is dense and has no router; remove the router section"
        )
    for name in ("bias_update_speed", "sequence_balance_alpha"):
        if name in wanted and not sigmoid:
            raise ValueError(
                f"router.{name}={wanted[name]:g} needs DeepSeek-V3's sigmoid router with a correction bias, and this policy "
                f"has {type(routers[0]).__name__}; use router.router_aux_loss_coef"
            )
    if "router_aux_loss_coef" in wanted and sigmoid:
        raise ValueError(
            f"router.router_aux_loss_coef={wanted['router_aux_loss_coef']:g} is the loss of softmax routers, and this policy "
            f"has {type(routers[0]).__name__}; use router.bias_update_speed or router.sequence_balance_alpha"
        )
