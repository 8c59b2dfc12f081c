"""The learner: model, optimizer and reference on one accelerate rank.

Every rank holds a `Learner` and makes the same calls in the same order. Losses are sums divided by the global number of
tokens or samples, so the gradient does not depend on how a minibatch is cut into microbatches or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from posttrain import learner_offload, learner_parallel, optimizer_files
from posttrain.collectives import all_or_none
from posttrain.context_parallel import ContextParallel
from posttrain.learner_model import LearnerPolicy, load_weights
from posttrain.learner_scores import Scores, compare_microbatch
from posttrain.metrics import Metric
from posttrain.model import load, router
from posttrain.model.balance import RouterBalance
from posttrain.model.replay import replay_routing
from posttrain.model.spread_files import fill
from posttrain.model.token_scorer import TokenScorer
from posttrain.objective import denominator, objective
from posttrain.optimizer import decay_groups, schedule, set_hyperparameters
from posttrain.packing import to_device, unpack
from posttrain.parity import Agreement, Mismatch, ParityReport
from posttrain.prompt_sharing import require_shareable
from posttrain.recipe import (
    AlgorithmSection,
    GrpoRouterSection,
    LearnerSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
)
from posttrain.rng import gather_rng, restore_rng
from posttrain.step_guard import StepGuard
from posttrain.types import Microbatch, Sample, TrainBatch


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
        lora: LoraSection | None = None,
        router_section: GrpoRouterSection,
        temperature: float,
        max_completion_length: int,
        total_steps: int,
        seed: int,
    ) -> None:
        learner.require_accelerator(torch.cuda.is_available())
        torch.manual_seed(seed)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if model.dtype == "bfloat16" else "no"
        )
        self._publish_dtype = getattr(torch, model.dtype)
        self._temperature = temperature
        self._max_completion_length = max_completion_length
        assert model.model_name_or_path is not None
        self._tokenizer = load.load_tokenizer(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
        self._learner = learner
        self._section = model
        # `origin` and not the checkpoint to go on from, which may be deleted meanwhile.
        origin = origin or model.model_name_or_path
        self._is_spread = learner.parallel == "fsdp"
        self._policy = LearnerPolicy(
            model,
            origin,
            lora,
            seed=seed,
            gradient_checkpointing=learner.gradient_checkpointing,
            spread=self._is_spread,
        )
        self._model = self._policy.model
        size, ranks = learner.context_parallel_size, self._accelerator.num_processes
        self._context = ContextParallel(size, ranks, self._accelerator.device.type) if size > 1 else None
        # Models that only score: what is sampled is compared with them.
        paths = {"reference": reference_path, "teacher": teacher_path}
        self._compared = [name for name, path in paths.items() if path is not None]
        if lora is not None and reference_path is not None:
            if reference_path != origin:
                raise ValueError(
                    f"lora: the reference is the policy without adapters, {origin}, and not {reference_path}"
                )
            del paths["reference"]
        self._frozen = {name: self._load_frozen(path) for name, path in paths.items() if path is not None}
        self._routers = router.find_routers(self._model)
        self._router_section = router_section
        self._balance = RouterBalance(self._routers, router_section)
        # Dropout is off in every policy trained here, so one mode serves training and scoring.
        self._model.train()
        if learner.share_prompts:
            require_shareable(self._model)
        self._scorer = self._scorer_of(self._model, model.model_name_or_path)
        raw_optimizer = torch.optim.AdamW(
            decay_groups(self._model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
            # Torch's lists of tensors must be spread in one way, and experts are in another.
            foreach=False if learner.expert_parallel_size > 1 else None,
        )
        self._scheduler = schedule(raw_optimizer, optimizer, total_steps)
        self._optimizer_section = optimizer
        self._guard = StepGuard(optimizer, self._accelerator.device)
        self._wrapped, self._optimizer = self._scorer, raw_optimizer
        if learner.parallel == "ddp":
            self._wrapped, self._optimizer = self._accelerator.prepare(self._scorer, raw_optimizer)

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    # --- training -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: TrainBatch, algorithm: AlgorithmSection) -> dict[str, Metric]:
        """Add the gradient of this rank's share of a minibatch. Call `optim_step` afterwards."""
        return self._forward_backward(batch, algorithm, lambda *_: None)

    def forward_backward_compared(
        self, batch: TrainBatch, samples: Sequence[Sample], algorithm: AlgorithmSection, *, near_tie_margin: float
    ) -> tuple[dict[str, Metric], Agreement]:
        """`forward_backward`, and how far the sampler is from the logprobs and experts of that very forward pass.

        Args:
            batch: packed samples.
            samples: indexed by the batch's sample numbers.
            algorithm: of the recipe.
            near_tie_margin: see `posttrain.parity`.
        """
        parity, apart = [ParityReport()], [Mismatch()]

        def look(microbatch: Microbatch, logprobs_RW: torch.Tensor, trace: router.RouterTrace) -> None:
            found = compare_microbatch(
                microbatch, logprobs_RW, trace, samples, self._routers, near_tie_margin=near_tie_margin
            )
            parity.append(found[0])
            apart.append(found[1])

        metrics = self._forward_backward(batch, algorithm, look)
        return metrics, (reduce(add, parity), reduce(add, apart))

    def _forward_backward(
        self,
        batch: TrainBatch,
        algorithm: AlgorithmSection,
        look: Callable[[Microbatch, torch.Tensor, router.RouterTrace], None],
    ) -> dict[str, Metric]:
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
            self._guard.see(loss_sum)
            trace = self._of_whole_samples(trace, microbatch)
            if self._speaks:
                look(microbatch, logprobs_RW.detach(), trace)
                real_N = (microbatch.sample_ids_RW >= 0).flatten()
                self._balance.observe(trace, real_N, replayed=self._router_section.bias_counts == "sampler")
            # All ranks have the same names, and their parts add up.
            share = 1.0 if self._speaks else 0.0
            _accumulate(metrics, {name: share * value for name, value in sums.items()}, batch.num_loss_tokens)
            _accumulate(metrics, {"policy/loss": share * loss_sum.detach()}, divisor)
        return metrics

    def optim_step(self) -> dict[str, Metric]:
        """Clip, step, move the router's bias. The policy is a new version afterwards.

        Where the loss or the gradient norm is no number, or the norm beyond `optimizer.skip_grad_norm`, the step is not taken
        and only the schedule goes on.
        """
        limit = self._optimizer_section.max_grad_norm
        grad_norm = learner_parallel.clip_grad_norm(self._wrapped.parameters(), limit)
        learning_rate = self._scheduler.get_last_lr()[0]
        metrics = {"optim/learning_rate": Metric(learning_rate, "last")}
        if self._guard.allows(grad_norm):
            metrics["optim/grad_norm"] = Metric(grad_norm, "mean")
            offloaded = self._learner.offload_optimizer
            with learner_offload.state_on(self._optimizer, self._accelerator.device) if offloaded else nullcontext():
                self._optimizer.step()
        else:
            metrics["optim/skipped_grad_norm"] = Metric(grad_norm, "last")
            self._balance.forget_step()
        metrics |= self._guard.metrics("optim")
        metrics["optim/steps"] = Metric(1 - metrics["optim/skipped"].value, "sum")
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._balance.end_step()
        return {**metrics, **self._balance.metrics()}

    def take_expert_loads(self) -> list[list[int]]:
        """[L][E] tokens that each expert got since this was last asked, all ranks together; empty for a dense model."""
        return self._balance.take_loads()

    def _replayed(self, microbatch: Microbatch) -> torch.Tensor | None:
        """The experts that the sampler chose, if the learner is to use them."""
        if not self._router_section.replay:
            return None
        if microbatch.shared is not None:
            return microbatch.shared.experts_NLK
        experts_NLK = microbatch.experts_NLK
        if self._context is None or experts_NLK is None:
            return experts_NLK
        experts_RWLK = experts_NLK.view(*microbatch.input_ids_RW.shape, *experts_NLK.shape[1:])
        return self._context.own(experts_RWLK, fill=-1).flatten(0, 1)

    @property
    def _speaks(self) -> bool:
        """Whether this rank says what its microbatches are like: of those that share them, one does."""
        return self._context is None or self._context.rank == 0

    def _of_whole_samples(self, trace: router.RouterTrace, microbatch: Microbatch) -> router.RouterTrace:
        """The trace of the microbatch's own rows, where it is of those that were computed instead, or of a part of them."""
        if microbatch.shared is not None:
            return trace.of_tokens(microbatch.shared.places_N)
        return trace if self._context is None else self._context.whole_trace(trace, *microbatch.input_ids_RW.shape)

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
        others: dict[str, list[torch.Tensor]] = {name: [] for name in self._compared}
        with ExitStack() as stack:
            if self._learner.offload_reference:
                for model in self._frozen.values():
                    stack.enter_context(learner_offload.weights_on(model, self._accelerator.device))
            for microbatch in batch.microbatches:
                microbatch = to_device(microbatch, self._accelerator.device)
                trace = router.RouterTrace()
                with (
                    replay_routing(self._routers, self._replayed(microbatch), trace),
                    router.record_routing(self._routers, trace),
                ):
                    logprobs_RW, _ = self._logprobs(self._scorer, microbatch, temperature)
                trace = self._of_whole_samples(trace, microbatch)
                ours.append(logprobs_RW.cpu())
                for name, values in others.items():
                    values.append(self._logprobs_of(name, microbatch, temperature).cpu())
                if self._speaks:
                    found = compare_microbatch(
                        microbatch, logprobs_RW, trace, samples, self._routers, near_tie_margin=near_tie_margin
                    )
                    parity, apart = parity + found[0], apart + found[1]
        for model in (self._scorer, *self._frozen.values()):
            learner_parallel.release(model)
        found_of = {name: unpack(values, batch, samples) for name, values in others.items()}
        return Scores(
            unpack(ours, batch, samples), found_of.get("reference", {}), parity, apart, found_of.get("teacher", {})
        )

    def _logprobs_of(self, name: str, microbatch: Microbatch, temperature: float | None) -> torch.Tensor:
        """Under the reference or the teacher."""
        if name in self._frozen:
            return self._logprobs(self._frozen[name], microbatch, temperature)[0]
        with self._policy.adapters_off():
            return self._logprobs(self._scorer, microbatch, temperature)[0]

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
            shared=microbatch.shared,
        )
        return found

    # --- weights and state ----------------------------------------------------------------------------------------

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of the policy's weights in checkpoint names, in the type that the sampler holds.

        Where weights are spread over ranks, each layer is gathered by another of them, so that none ever holds the policy; all
        must iterate. Otherwise the first rank has all weights, and the others nothing.
        """
        for weights in self._policy.layers(self._publish_dtype, self.rank, self._accelerator.num_processes):
            yield from load.checkpoint_tensors(self._model, weights)

    def save(self, path: str | Path) -> None:
        """Write policy and training state into an existing directory, for any number of ranks to go on from.

        Where weights are spread each rank writes its part, else the first writes all.
        """
        # What all ranks take part in comes first: the first rank may find the disk full, and none must wait for it then.
        generators = gather_rng()
        optimizer, spread = optimizer_files.local_state(self._optimizer)
        if self._is_spread:
            with all_or_none():
                self._policy.write_parts(path, self.rank, self._accelerator.num_processes)
                optimizer_files.write_part(Path(path), spread, self.rank, self._accelerator.num_processes)
        if self.rank == 0:
            self._policy.save(path, self._tokenizer)
            state = {
                "optimizer": optimizer,
                "optimizer_parts": self._accelerator.num_processes if self._is_spread else 0,
                "scheduler": self._scheduler.state_dict(),
                "rng": generators,
            }
            torch.save(state, Path(path) / "trainer_state.pt")

    def restore(self, path: str | Path) -> None:
        """Take adapters, optimizer, schedule and random numbers up where `save` left them; all else is loaded from `path` at
        the start. The optimizer's numbers are those of the recipe.
        """
        self._policy.restore(path)
        generators = self._restore_state(path).get("rng", [])
        if self.rank < len(generators):  # there may be more ranks than there were
            restore_rng(generators[self.rank])

    def _restore_state(self, path: str | Path) -> dict[str, Any]:
        state = torch.load(Path(path) / "trainer_state.pt", map_location="cpu", weights_only=True, mmap=True)
        parts = state.get("optimizer_parts", 0)  # written before there were any
        optimizer_files.load_state(self._optimizer, state["optimizer"], Path(path), parts)
        if self._learner.offload_optimizer:
            learner_offload.move_state(self._optimizer, learner_offload.HOME)
        self._scheduler.load_state_dict(state["scheduler"])
        set_hyperparameters(self._optimizer, self._scheduler, self._optimizer_section)
        found: dict[str, Any] = state
        return found

    def roll_back(self, path: str | Path) -> None:
        """Take weights, optimizer and schedule of an earlier checkpoint of this run."""
        self.drop_gradients()
        self._guard.in_a_row = 0
        self._policy.roll_back(path)
        self._restore_state(path)

    def renew_reference(self) -> None:
        """The policy as it is becomes the reference.

        Raises:
            ValueError: with adapters, whose reference is the policy without them.
        """
        if self._policy.has_adapters:
            raise ValueError(
                "lora: the reference is the policy without adapters; set algorithm.reference_refresh_steps: 0"
            )
        self._frozen["reference"].model.load_state_dict(self._model.state_dict())

    def drop_gradients(self) -> None:
        """Forget what `forward_backward` has accumulated."""
        self._optimizer.zero_grad()
        self._guard.forget()
        self._balance.forget_step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The accumulated gradient by parameter name (copies), for inspection. All ranks must ask if weights are spread."""
        parameters = self._model.named_parameters()
        return {name: learner_parallel.whole(p.grad).clone() for name, p in parameters if p.grad is not None}

    def _load_frozen(self, path: str) -> TokenScorer:
        model = load_weights(self._section, path, spread=self._is_spread).requires_grad_(False).eval()
        scorer = self._scorer_of(model, path)
        return scorer if self._learner.offload_reference else scorer.to(self._accelerator.device)

    def _scorer_of(self, model: Any, path: str) -> TokenScorer:
        """A model that scores; one that is to be spread over ranks is so now, and gets the weights at `path`."""
        scorer = TokenScorer(model, self._learner.logits_chunk, self._context)
        if self._is_spread:
            learner_parallel.shard(scorer, self._accelerator, self._learner.expert_parallel_size)
            fill(model, path, self._accelerator.device)
            scorer.require_plain_head()
            learner_parallel.release(scorer)
        return scorer


def _accumulate(metrics: dict[str, Metric], sums: Mapping[str, torch.Tensor], denominator: float) -> None:
    """Add a microbatch's sums to running means: parts over one global denominator simply add up."""
    for name, value in sums.items():
        before = metrics[name].value if name in metrics else 0.0
        metrics[name] = Metric(before + float(value) / denominator, "sum")
