"""The learner: model, optimizer and reference on one accelerate rank.

Every rank holds a `Learner` and makes the same calls in the same order. Losses are sums divided by the global number of
tokens or samples, so the gradient does not depend on how a minibatch is cut into microbatches or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.model import load, mtp, router
from posttrain.model.balance import RouterBalance
from posttrain.model.replay import replay_routing
from posttrain.model.token_scorer import TokenScorer
from posttrain.objective import denominator, objective
from posttrain.optimizer import decay_groups, schedule
from posttrain.packing import to_device, unpack
from posttrain.parity import Mismatch, ParityReport, compare, mismatch
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Microbatch, Sample, TrainBatch


@dataclass(frozen=True, slots=True)
class Scores:
    """What the learner says of samples before it trains on them; keyed by sample index."""

    logprobs: Mapping[int, tuple[float, ...]]
    ref_logprobs: Mapping[int, tuple[float, ...]]  # empty without a reference
    parity: ParityReport
    mismatch: Mismatch
    teacher_logprobs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # empty without a teacher

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            {**self.logprobs, **other.logprobs},
            {**self.ref_logprobs, **other.ref_logprobs},
            self.parity + other.parity,
            self.mismatch + other.mismatch,
            {**self.teacher_logprobs, **other.teacher_logprobs},
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
        teacher_path: str | None = None,
        origin: str | None = None,
        router_section: GrpoRouterSection,
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
        assert model.model_name_or_path is not None
        # Where a prediction module is that is carried along: the run's own checkpoints may be deleted meanwhile.
        self._origin = origin or model.model_name_or_path
        self._tokenizer = load.load_tokenizer(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
        self._section = model
        self._model = self._load(model, model.model_name_or_path)
        if learner.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        # Models that only score: what is sampled is compared with them.
        paths = {"reference": reference_path, "teacher": teacher_path}
        self._frozen = {
            name: self._load_frozen(path, learner.logits_chunk) for name, path in paths.items() if path is not None
        }
        self._routers = router.find_routers(self._model)
        self._router_section = router_section
        self._balance = RouterBalance(self._routers, router_section)
        raw_optimizer = torch.optim.AdamW(
            decay_groups(self._model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
        )
        self._scheduler = schedule(raw_optimizer, optimizer, total_steps)
        self._max_grad_norm = optimizer.max_grad_norm
        # Dropout is off in every policy trained here, so one mode serves training and scoring.
        self._model.train()
        self._scorer = TokenScorer(self._model, learner.logits_chunk)
        self._wrapped, self._optimizer = self._accelerator.prepare(self._scorer, raw_optimizer)

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
            microbatch = to_device(microbatch, self._accelerator.device)
            with nullcontext() if index == last else self._accelerator.no_sync(self._wrapped):
                trace = router.RouterTrace()
                with replay_routing(self._routers, self._replayed(microbatch), trace):
                    with router.record_routing(self._routers, trace):
                        logprobs_RW, entropy_RW = self._logprobs(
                            self._wrapped, microbatch, entropy_gradient=bool(algorithm.entropy_coef)
                        )
                    loss_sum, sums = objective(logprobs_RW, entropy_RW, microbatch, algorithm)
                    # Ranks' gradients are averaged, so the sum over ranks needs their number.
                    self._accelerator.backward(loss_sum * (self._accelerator.num_processes / divisor))
            real_N = (microbatch.sample_ids_RW >= 0).flatten()
            self._balance.observe(trace, real_N, replayed=self._router_section.bias_counts == "sampler")
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
        self._balance.end_step()
        return {**metrics, **self._balance.metrics()}

    def _replayed(self, microbatch: Microbatch) -> torch.Tensor | None:
        """The experts that the sampler chose, if the learner is to use them."""
        return microbatch.experts_NLK if self._router_section.replay else None

    # --- scoring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, batch: TrainBatch, samples: Sequence[Sample], *, near_tie_margin: float, temperature: float | None = None
    ) -> Scores:
        """Logprobs of this rank's samples under policy, reference and teacher, and how well the sampler's agree.

        Args:
            batch: the samples packed; only this rank's are in it.
            samples: all samples of the batch, indexed by `sample_ids_RW`.
            near_tie_margin: see `posttrain.parity`.
            temperature: None takes that of the training.
        """
        ours, parity, apart = [], ParityReport(), Mismatch()
        others: dict[str, list[torch.Tensor]] = {name: [] for name in self._frozen}
        for microbatch in batch.microbatches:
            microbatch = to_device(microbatch, self._accelerator.device)
            trace = router.RouterTrace()
            with (
                replay_routing(self._routers, self._replayed(microbatch), trace),
                router.record_routing(self._routers, trace),
            ):
                logprobs_RW, _ = self._logprobs(self._scorer, microbatch, temperature)
            ours.append(logprobs_RW.cpu())
            for name, model in self._frozen.items():
                others[name].append(self._logprobs(model, microbatch, temperature)[0].cpu())
            found = self._compare(microbatch, logprobs_RW, trace, samples, near_tie_margin)
            parity, apart = parity + found[0], apart + found[1]
        found_of = {name: unpack(values, batch, samples) for name, values in others.items()}
        return Scores(
            unpack(ours, batch, samples), found_of.get("reference", {}), parity, apart, found_of.get("teacher", {})
        )

    def _compare(
        self,
        microbatch: Microbatch,
        logprobs_RW: torch.Tensor,
        trace: router.RouterTrace,
        samples: Sequence[Sample],
        near_tie_margin: float,
    ) -> tuple[ParityReport, Mismatch]:
        report, apart = ParityReport(), Mismatch()
        ids_N, logprobs_N = microbatch.sample_ids_RW.flatten(), logprobs_RW.flatten()
        chosen_NLK, used_NLK = (trace.chosen_NLK(), trace.used_NLK()) if self._routers else (None, None)
        for index in ids_N.unique().tolist():
            if index < 0:
                continue
            sample, rows = samples[index], (ids_N == index).nonzero().flatten()
            own: list[router.Flip] = []
            flips: list[router.Flip] = []
            if sample.experts_TLK is not None and chosen_NLK is not None and used_NLK is not None:
                own = router.find_flips(sample.experts_TLK, chosen_NLK, trace, rows[:-1], self._routers)
                # What replay left to the router is compared as well: the experts that were used, whoever chose them.
                flips = (
                    router.find_flips(sample.experts_TLK, used_NLK, trace, rows[:-1], self._routers)
                    if trace.used
                    else own
                )
            values = logprobs_N[rows[len(sample.prompt_ids) :]].tolist()
            report += compare(sample, values, flips, near_tie_margin=near_tie_margin, name=f"sample {index}")
            apart += mismatch(sample, values, own, len(self._routers))
        return report, apart

    def _logprobs(
        self, model: Any, microbatch: Microbatch, temperature: float | None = None, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = model(
            microbatch.input_ids_RW,
            microbatch.position_ids_RW,
            microbatch.loss_mask_RW,
            temperature or self._temperature,
            candidates_RWC=microbatch.candidates_RWC,
            entropy_gradient=entropy_gradient,
        )
        return found

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

    def roll_back(self, path: str | Path) -> None:
        """Take weights, optimizer and schedule of an earlier checkpoint of this run."""
        self.drop_gradients()
        self._model.load_state_dict(self._load(self._section, str(path)).state_dict())
        self.restore(path)

    def renew_reference(self) -> None:
        """The policy as it is becomes the reference."""
        self._frozen["reference"].model.load_state_dict(self._model.state_dict())

    def drop_gradients(self) -> None:
        """Forget what `forward_backward` has accumulated."""
        self._optimizer.zero_grad()
        self._balance.forget_step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The accumulated gradient by parameter name (copies), for inspection."""
        return {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}

    def _load_frozen(self, path: str, logits_chunk: int | None) -> TokenScorer:
        model = self._load(self._section, path).requires_grad_(False).eval().to(self._accelerator.device)
        return TokenScorer(model, logits_chunk)

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
