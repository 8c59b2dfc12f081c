"""The critic of PPO on one accelerate rank: a policy's trunk with a head that says what reward is still to come.

Like `posttrain.learner.Learner` every rank makes the same calls, and losses are sums over one global denominator. The value of
a token is what is expected before it is sampled, so it comes from the position before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from posttrain import losses
from posttrain.learner_offload import HOME, move_state, state_on
from posttrain.metrics import Metric
from posttrain.model.load import load_tokenizer, save_policy
from posttrain.model.reward_head import load_reward_model
from posttrain.optimizer import decay_groups, schedule, set_hyperparameters
from posttrain.packing import to_device, unpack
from posttrain.recipe import CriticSection, LearnerSection, ModelSection
from posttrain.step_guard import StepGuard
from posttrain.types import Microbatch, Sample, TrainBatch


class ValueModel(torch.nn.Module):
    """A sequence classifier with one output, asked at every position."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids_RW: torch.Tensor, position_ids_RW: torch.Tensor) -> torch.Tensor:
        """float32 [R, W], entry w of the value before token w; column 0 is 0."""
        trunk = getattr(self.classifier, self.classifier.base_model_prefix)
        # No attention mask: transformers then keeps packed samples apart by their position ids.
        hidden_RWD = trunk(input_ids=input_ids_RW, position_ids=position_ids_RW, use_cache=False).last_hidden_state
        values_RW = self.classifier.score(hidden_RWD)[..., 0].float()
        return torch.nn.functional.pad(values_RW[:, :-1], (1, 0))


class Critic:
    """One rank. `torch.distributed`'s variables must be set when there is more than one."""

    def __init__(
        self,
        model: ModelSection,
        section: CriticSection,
        learner: LearnerSection,
        *,
        total_steps: int,
        seed: int,
    ) -> None:
        learner.require_accelerator(torch.cuda.is_available())
        torch.manual_seed(seed)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if model.dtype == "bfloat16" else "no"
        )
        path = section.model_name_or_path or model.model_name_or_path
        assert path is not None
        classifier = load_reward_model(
            path,
            head_init_std=section.head_init_std,
            seed=seed,
            attn_implementation=model.attn_implementation,
            experts_implementation=model.experts_implementation,
            trust_remote_code=model.trust_remote_code,
        )
        self._tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
        if learner.gradient_checkpointing:
            classifier.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = ValueModel(classifier).train()
        self._clip = section.value_clip
        self._offloaded = learner.offload_optimizer
        optimizer = torch.optim.AdamW(
            decay_groups(self._model, section.optimizer.weight_decay),
            lr=section.optimizer.learning_rate,
            betas=(section.optimizer.adam_beta1, section.optimizer.adam_beta2),
            eps=section.optimizer.adam_epsilon,
        )
        self._scheduler = schedule(optimizer, section.optimizer, total_steps)
        self._optimizer_section = section.optimizer
        self._guard = StepGuard(section.optimizer, self._accelerator.device)
        self._wrapped, self._optimizer = self._accelerator.prepare(self._model, optimizer)

    @torch.no_grad()
    def values(self, batch: TrainBatch, samples: Sequence[Sample]) -> dict[int, tuple[float, ...]]:
        """What is expected before each completion token, by the index of this rank's samples."""
        found = [self._values(self._model, microbatch).cpu() for microbatch in batch.microbatches]
        return unpack(found, batch, samples)

    def forward_backward(self, batch: TrainBatch) -> dict[str, Metric]:
        """Add the gradient of this rank's share of a minibatch, whose samples carry values and returns."""
        metrics: dict[str, Metric] = {}
        last = len(batch.microbatches) - 1
        for index, microbatch in enumerate(batch.microbatches):
            microbatch = to_device(microbatch, self._accelerator.device)
            with nullcontext() if index == last else self._accelerator.no_sync(self._wrapped):
                values_RW = self._values(self._wrapped, microbatch)
                old_RW, returns_RW = microbatch.values_RW, microbatch.returns_RW
                if old_RW is None or returns_RW is None:  # a rank short of work has nothing but padding
                    old_RW = returns_RW = torch.zeros_like(values_RW)
                loss_sum, sums = losses.value_loss(values_RW, old_RW, returns_RW, microbatch.loss_mask_RW, self._clip)
                # Ranks' gradients are averaged, so the sum over ranks needs their number.
                self._accelerator.backward(loss_sum * (self._accelerator.num_processes / batch.num_loss_tokens))
            self._guard.see(loss_sum)
            for name, value in sums.items():
                before = metrics[f"critic/{name}"].value if f"critic/{name}" in metrics else 0.0
                metrics[f"critic/{name}"] = Metric(before + float(value) / batch.num_loss_tokens, "sum")
        return metrics

    def optim_step(self) -> dict[str, Metric]:
        """Clip and step, unless the guard says no (see `Learner.optim_step`)."""
        limit = self._optimizer_section.max_grad_norm
        grad_norm = float(self._accelerator.clip_grad_norm_(self._wrapped.parameters(), limit))
        metrics = {"critic/learning_rate": Metric(self._scheduler.get_last_lr()[0], "last")}
        if self._guard.allows(grad_norm):
            metrics["critic/grad_norm"] = Metric(grad_norm, "mean")
            with state_on(self._optimizer, self._accelerator.device) if self._offloaded else nullcontext():
                self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return {**metrics, **self._guard.metrics("critic")}

    def save(self, path: str | Path) -> None:
        """Write the critic, as a sequence classifier, and its training state into an existing directory; rank 0 only."""
        if self._accelerator.process_index == 0:
            save_policy(self._model.classifier, self._tokenizer, path)
            state = {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}
            torch.save(state, Path(path) / "trainer_state.pt")

    def restore(self, path: str | Path) -> None:
        """Take optimizer and scheduler up where `save` left them; the model itself is loaded from `path` at the start."""
        state = torch.load(Path(path) / "trainer_state.pt", map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        if self._offloaded:
            move_state(self._optimizer, HOME)
        self._scheduler.load_state_dict(state["scheduler"])
        set_hyperparameters(self._optimizer, self._scheduler, self._optimizer_section)

    def drop_gradients(self) -> None:
        """Forget what `forward_backward` has accumulated."""
        self._optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The accumulated gradient by parameter name (copies), for inspection."""
        return {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}

    def _values(self, model: Any, microbatch: Microbatch) -> torch.Tensor:
        microbatch = to_device(microbatch, self._accelerator.device)
        values_RW: torch.Tensor = model(microbatch.input_ids_RW, microbatch.position_ids_RW)
        return values_RW
