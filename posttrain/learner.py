"""The learner: model, optimizer and reference on one accelerate rank.

Every rank holds a `Learner` and makes the same calls in the same order. Losses are sums divided by the global number of
tokens or samples, so the gradient does not depend on how a minibatch is cut into microbatches or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from posttrain import losses
from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.model import load, mtp, router
from posttrain.objective import denominator, objective
from posttrain.packing import unpack
from posttrain.parity import ParityReport, compare
from posttrain.recipe import AlgorithmSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Microbatch, Sample, TrainBatch


@dataclass(frozen=True, slots=True)
class Scores:
    """What the learner says of samples before it trains on them; keyed by sample index."""

    logprobs: Mapping[int, tuple[float, ...]]
    ref_logprobs: Mapping[int, tuple[float, ...]]  # empty without a reference
    parity: ParityReport

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            {**self.logprobs, **other.logprobs},
            {**self.ref_logprobs, **other.ref_logprobs},
            self.parity + other.parity,
        )


class Learner:
    """One rank. `torch.distributed`'s variables (RANK, WORLD_SIZE, ...) must be set when there is more than one."""

    def __init__(
        self,
        model: ModelSection,
        optimizer: OptimizerSection,
        learner: LearnerSection,
        *,
        reference_path: str | None,
        origin: str | None = None,
        bias_update_speed: float,
        temperature: float,
        max_completion_length: int,
        total_steps: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if model.dtype == "bfloat16" else "no"
        )
        self._publish_dtype = getattr(torch, model.dtype)
        self._temperature = temperature
        self._max_completion_length = max_completion_length
        self._bias_update_speed = bias_update_speed
        assert model.model_name_or_path is not None
        # Where a prediction module is that is carried along: the run's own checkpoints may be deleted meanwhile.
        self._origin = origin or model.model_name_or_path
        self._tokenizer = load.load_tokenizer(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
        self._model = self._load(model, model.model_name_or_path)
        if learner.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._reference = None
        if reference_path is not None:
            self._reference = self._load(model, reference_path).requires_grad_(False).eval()
            self._reference.to(self._accelerator.device)
        self._routers = router.find_routers(self._model)
        raw_optimizer = torch.optim.AdamW(
            _decay_groups(self._model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
        )
        self._scheduler = _scheduler(raw_optimizer, optimizer, total_steps)
        self._max_grad_norm = optimizer.max_grad_norm
        # Dropout is off in every policy trained here, so one mode serves training and scoring.
        self._model.train()
        self._wrapped, self._optimizer = self._accelerator.prepare(self._model, raw_optimizer)
        self._counts_LE: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    # --- training -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: TrainBatch, algorithm: AlgorithmSection) -> dict[str, Metric]:
        """Add the gradient of this rank's share of a minibatch. Call `optim_step` afterwards."""
        metrics: dict[str, Metric] = {}
        divisor = denominator(batch, algorithm, self._max_completion_length)
        last = len(batch.microbatches) - 1
        for index, microbatch in enumerate(batch.microbatches):
            microbatch = _to(microbatch, self._accelerator.device)
            with nullcontext() if index == last else self._accelerator.no_sync(self._wrapped):
                with router.record_routing(self._routers) as trace:
                    logprobs_RW, entropy_RW = self._logprobs(
                        self._wrapped, microbatch, entropy_gradient=bool(algorithm.entropy_coef)
                    )
                loss_sum, sums = objective(logprobs_RW, entropy_RW, microbatch, algorithm)
                # Ranks' gradients are averaged, so the sum over ranks needs their number.
                self._accelerator.backward(loss_sum * (self._accelerator.num_processes / divisor))
            self._count_experts(trace, microbatch)
            _accumulate(metrics, sums, batch.num_loss_tokens)
            _accumulate(metrics, {"policy/loss": loss_sum.detach()}, divisor)
        return metrics

    def optim_step(self) -> dict[str, Metric]:
        """Clip, step, move the router's bias. The policy is a new version afterwards."""
        grad_norm = float(self._accelerator.clip_grad_norm_(self._wrapped.parameters(), self._max_grad_norm))
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise RunStopped(
                f"the gradient norm is {grad_norm}: the step was not taken and the last checkpoint is whole; lower "
                f"optimizer.learning_rate or look at the last samples"
            )
        learning_rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        metrics = {
            "optim/grad_norm": Metric(grad_norm, "mean"),
            "optim/learning_rate": Metric(learning_rate, "last"),
        }
        if self._counts_LE is not None:
            counts_LE = self._accelerator.reduce(self._counts_LE, "sum")
            metrics["router/max_violation"] = Metric(router.max_violation(counts_LE), "mean")
            if self._bias_update_speed:
                router.update_correction_bias(self._routers, counts_LE, self._bias_update_speed)
            self._counts_LE = None
        return metrics

    def _count_experts(self, trace: router.RouterTrace, microbatch: Microbatch) -> None:
        if not self._routers:
            return
        real_N = (microbatch.sample_ids_RW >= 0).flatten()
        counts_LE = router.expert_counts(trace, real_N, self._num_experts)
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE

    # --- scoring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, batch: TrainBatch, samples: Sequence[Sample], *, near_tie_margin: float, temperature: float | None = None
    ) -> Scores:
        """Logprobs of this rank's samples under policy and reference, and how well the sampler's agree.

        Args:
            batch: the samples packed; only this rank's are in it.
            samples: all samples of the batch, indexed by `sample_ids_RW`.
            near_tie_margin: see `posttrain.parity`.
            temperature: None takes that of the training.
        """
        ours, references, parity = [], [], ParityReport()
        for microbatch in batch.microbatches:
            microbatch = _to(microbatch, self._accelerator.device)
            with router.record_routing(self._routers) as trace:
                logprobs_RW, _ = self._logprobs(self._model, microbatch, temperature)
            ours.append(logprobs_RW.cpu())
            if self._reference is not None:
                references.append(self._logprobs(self._reference, microbatch, temperature)[0].cpu())
            parity += self._compare(microbatch, logprobs_RW, trace, samples, near_tie_margin)
        return Scores(
            unpack(ours, batch, samples),
            unpack(references, batch, samples) if references else {},
            parity,
        )

    def _compare(
        self,
        microbatch: Microbatch,
        logprobs_RW: torch.Tensor,
        trace: router.RouterTrace,
        samples: Sequence[Sample],
        near_tie_margin: float,
    ) -> ParityReport:
        report = ParityReport()
        ids_N, logprobs_N = microbatch.sample_ids_RW.flatten(), logprobs_RW.flatten()
        chosen_NLK = trace.chosen_NLK() if self._routers else None
        for index in ids_N.unique().tolist():
            if index < 0:
                continue
            sample, rows = samples[index], (ids_N == index).nonzero().flatten()
            flips: list[router.Flip] = []
            if sample.experts_TLK is not None and chosen_NLK is not None:
                flips = router.find_flips(sample.experts_TLK, chosen_NLK, trace, rows[:-1], self._routers)
            values = logprobs_N[rows[len(sample.prompt_ids) :]].tolist()
            report += compare(sample, values, flips, near_tie_margin=near_tie_margin, name=f"sample {index}")
        return report

    def _logprobs(
        self, model: Any, microbatch: Microbatch, temperature: float | None = None, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # No attention mask: transformers then keeps packed samples apart by their position ids.
        logits_RWV = model(
            input_ids=microbatch.input_ids_RW, position_ids=microbatch.position_ids_RW, use_cache=False
        ).logits
        return losses.token_logprobs(
            logits_RWV, microbatch.input_ids_RW, temperature or self._temperature, entropy_gradient=entropy_gradient
        )

    # --- weights and state ----------------------------------------------------------------------------------------

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights in checkpoint names, in the type that the sampler holds."""
        for name, tensor in load.checkpoint_tensors(self._model):
            keep = not tensor.is_floating_point() or name.endswith("e_score_correction_bias")
            yield name, tensor if keep else tensor.to(self._publish_dtype)

    def save(self, path: str | Path) -> None:
        """Write the policy and this rank's training state into an existing directory; rank 0 only writes the model."""
        if self.rank == 0:
            load.save_policy(self._model, self._tokenizer, path)
            if mtp.has_mtp(self._origin):
                # Not trained here, but carried along: it goes on drafting for a policy that has moved a little.
                mtp.copy_mtp(self._origin, self._model, path)
            state = {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}
            torch.save(state, Path(path) / "trainer_state.pt")

    def restore(self, path: str | Path) -> None:
        """Take optimizer and scheduler up where `save` left them; the model itself is loaded from `path` at the start."""
        state = torch.load(Path(path) / "trainer_state.pt", map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    def renew_reference(self) -> None:
        """The policy as it is becomes the reference."""
        assert self._reference is not None
        self._reference.load_state_dict(self._model.state_dict())

    def drop_gradients(self) -> None:
        """Forget what `forward_backward` has accumulated."""
        self._optimizer.zero_grad()
        self._counts_LE = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """The accumulated gradient by parameter name (copies), for inspection."""
        return {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}

    @property
    def _num_experts(self) -> int:
        return int(self._routers[0].weight.shape[0])

    def _load(self, model: ModelSection, path: str) -> Any:
        # The learner's own weights are float32: a bfloat16 weight would swallow small updates.
        return load.load_policy(
            path,
            dtype="float32",
            attn_implementation=model.attn_implementation,
            experts_implementation=model.experts_implementation,
            trust_remote_code=model.trust_remote_code,
        )


def _accumulate(metrics: dict[str, Metric], sums: Mapping[str, torch.Tensor], denominator: float) -> None:
    """Add a microbatch's sums to running means: parts over one global denominator simply add up."""
    for name, value in sums.items():
        before = metrics[name].value if name in metrics else 0.0
        metrics[name] = Metric(before + float(value) / denominator, "sum")


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms and biases, as transformers' Trainer does."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _scheduler(optimizer: torch.optim.Optimizer, section: OptimizerSection, total_steps: int) -> Any:
    """transformers' schedule of that name, ending at min_learning_rate."""
    name: str = section.lr_scheduler_type
    settings: dict[str, float] = {}
    if name == "cosine":
        name, settings = "cosine_with_min_lr", {"min_lr": section.min_learning_rate}
    elif name == "constant":
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=section.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=settings or None,
    )


def _to(microbatch: Microbatch, device: torch.device) -> Microbatch:
    fields = {name: getattr(microbatch, name).to(device) for name in Microbatch.__slots__}
    return Microbatch(**fields)
