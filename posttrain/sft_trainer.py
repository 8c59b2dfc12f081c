"""TRL's SFTTrainer for MoE policies: balance, multi-token prediction, exact checkpoints, exact held-out loss.

Every loss is a sum divided by a count over the whole optimizer step, all microbatches and ranks together, so the gradient
does not depend on how the step is cut up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from posttrain import checkpoint
from posttrain.guarded_steps import GuardedSteps
from posttrain.model import router
from posttrain.model.balance import RouterBalance
from posttrain.model.logit_teacher import LogitTeacher
from posttrain.model.mtp_objective import MtpObjective
from posttrain.model.policy_files import PolicyFiles
from posttrain.sections import OptimizerSection
from posttrain.sft_data import IGNORED, PackedStream

TOKENS = "tokens"  # among the sums: real tokens, not a loss


class PolicyTrainer(GuardedSteps, SFTTrainer):
    """What a policy needs beyond its cross-entropy.

    Args:
        balance: watches and balances the routers.
        mtp: the extra prediction depth, None without.
        teacher: whose distributions are learnt beside the tokens, None without.
        checkpoints: the run's directory of checkpoints.
        keep: how many to keep.
        made_with: what they say of their recipe, see `posttrain.resume`.
        section: of the recipe, for the optimizer.
        take_weights: puts those of a checkpoint of this run into the policy.
        files: writes the policy.
        stream: where the rows come from, None for a data set of known length.
        **settings: SFTTrainer's.
    """

    def __init__(
        self,
        *,
        balance: RouterBalance,
        mtp: MtpObjective | None,
        teacher: LogitTeacher | None,
        checkpoints: Path,
        keep: int,
        made_with: Mapping[str, Any],
        section: OptimizerSection,
        take_weights: Callable[[Path], None],
        files: PolicyFiles,
        stream: PackedStream | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._balance = balance
        self._mtp = mtp
        self._teacher = teacher
        self._use_checkpoints(checkpoints, keep, files.write, made_with)
        self._use_guard(section, take_weights)
        self._files = files
        self._stream = stream
        self._num_sequences = self._num_mtp_tokens = self._num_microbatches = 1
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._since = time.perf_counter()
        self._last: dict[str, float] = {}

    # --- the loss -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The microbatches of a step; counts what the losses are divided by."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        sequences = sum(int((_sequences(batch) + 1).amax(dim=1).sum()) for batch in batches)
        mtp_tokens = sum(int(_mtp_targets(batch).sum()) for batch in batches)
        counts = torch.tensor([sequences, mtp_tokens, len(batches)], device=device)
        totals = self.accelerator.gather(counts).view(-1, 3).sum(dim=0).clamp(min=1).tolist()
        self._num_sequences, self._num_mtp_tokens, self._num_microbatches = totals
        self._steps += 1
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy by TRL; distillation, balance and multi-token prediction by us."""
        assert not return_outputs
        sequence_N = _row_sequences(inputs).flatten()
        inputs = {name: value for name, value in inputs.items() if name != "row_lengths"}
        policy = self.accelerator.unwrap_model(model)
        routing = router.record_routing(self._balance.routers, with_gradient=self._balance.needs_gradient)
        with routing as trace, _caught(self._mtp, policy) as hidden, _caught(self._teacher, policy) as states:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        ranks = self.accelerator.num_processes
        if not self.model.training:
            return loss
        self._balance.observe(trace, sequence_N >= 0)
        self._add(TOKENS, (sequence_N >= 0).sum().float())
        self._add("nll", loss / ranks)
        if self._teacher is not None:
            weight = self._teacher.weight
            own = (1 - weight) * loss if weight < 1 else 0.0  # what counts nothing needs no backward pass
            loss = own + self._distil(policy, states, inputs, num_items_in_batch) * (weight * ranks)
        if self._balance.needs_gradient:
            balance = self._balance.loss(
                trace, sequence_N, num_sequences=self._num_sequences, num_microbatches=self._num_microbatches
            )
            self._add("balance_loss", balance)
            loss = loss + balance * ranks
        if self._mtp is not None:
            mtp_sum = self._mtp.loss_sum(policy, hidden, inputs, sequence_N >= 0)
            self._add("mtp_loss", mtp_sum / self._num_mtp_tokens)
            loss = loss + mtp_sum * (self._mtp.loss_weight * ranks / self._num_mtp_tokens)
        return loss

    def _distil(
        self, policy: Any, states: list[torch.Tensor], inputs: dict[str, Any], num_tokens: torch.Tensor
    ) -> torch.Tensor:
        """This microbatch's part of the mean divergence from the teacher over the step's trained tokens."""
        assert self._teacher is not None
        loss_sum, sums = self._teacher.loss_sum(policy, states, inputs)
        num_tokens = torch.as_tensor(num_tokens, device=loss_sum.device).clamp(min=1)
        for name, value in sums.items():
            self._add(f"distillation/{name}", value / num_tokens)
        return loss_sum / num_tokens

    def _forget_step(self) -> None:
        for balance in (self._balance, *([self._mtp.balance] if self._mtp else [])):
            balance.forget_step()

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value.detach())) + value.detach()

    # --- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was seen since the last line; called on every rank alike."""
        if "loss" in logs:
            names = sorted(self._sums)
            totals = self.accelerator.reduce(
                torch.stack([self._sums[name] for name in names]), reduction="sum"
            ).tolist()
            sums = dict(zip(names, totals, strict=True))
            logs["throughput/tokens_per_second"] = sums.pop(TOKENS) / (time.perf_counter() - self._since)
            logs |= {name: total / self._steps for name, total in sums.items()}
            for balance in (self._balance, *([self._mtp.balance] if self._mtp else [])):
                logs |= {name: metric.value for name, metric in balance.metrics().items()}
            self._last = {**logs}
            self._sums, self._steps, self._since = {}, 0, time.perf_counter()
        super().log(logs, start_time)

    def last_metrics(self) -> dict[str, float]:
        """Of the last logged steps, and the best held-out loss."""
        best = {} if self.state.best_metric is None else {"validation/best_loss": self.state.best_metric}
        names = ("loss", "nll", "mtp_loss", "distillation/divergence")
        return {**{name: value for name, value in self._last.items() if name in names}, **best}

    def take_expert_loads(self) -> list[list[int]]:
        """[L][E] tokens that each expert got since this was last asked; empty for a dense model."""
        return self._balance.take_loads()

    def last_counts(self) -> torch.Tensor:
        """Tokens that each expert received in the last optimizer step, [L, E]."""
        return self._balance.last_counts

    # --- held-out loss --------------------------------------------------------------------------------------------

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Mean negative log-likelihood per trained token of the held-out rows, whatever batches they come in."""
        paused = time.perf_counter()
        self.model.eval()
        sums = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        for batch in self._held_out_batches():
            batch = self._prepare_inputs(batch)
            count = (batch["labels"][:, 1:] != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                nll = self.compute_loss(self.model_wrapped, batch, num_items_in_batch=torch.ones_like(count))
            sums += torch.stack([nll.double() / self.accelerator.num_processes, count.double()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        found = {f"{metric_key_prefix}_loss": total / max(1, count), f"{metric_key_prefix}_tokens": count}
        self._metrics["eval"].clear()
        self.log(found)
        self.model.train()
        control: Any = getattr(self, "control")  # noqa: B009  # its type is not known where TRL is not followed
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, found)
        self._since += time.perf_counter() - paused  # not the training's time
        return found

    def _held_out_batches(self) -> Iterator[dict[str, Any]]:
        """This rank's share of the held-out rows; every rank gets as many batches, the last perhaps without loss.

        The trainer's own loader would repeat rows to make the shares even.
        """
        rows, ranks = self.eval_dataset, self.accelerator.num_processes
        mine = range(self.accelerator.process_index, len(rows), ranks)
        size = self.args.per_device_eval_batch_size
        for start in range(0, -(-len(rows) // ranks), size):
            chosen = mine[start : start + size]
            batch = self.data_collator([rows[place] for place in chosen] or [rows[0]])
            if not chosen:
                batch["labels"].fill_(IGNORED)
            yield batch

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics, trial))
        if better:
            self.control.should_save = True
        return better

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save_last(self, *, finished: bool) -> Path:
        """The present step as a whole checkpoint; adapters are merged once the run is `finished`.

        Raises:
            RunStopped: the disk is full.
        """
        step = self.state.global_step
        path = self._checkpoints / f"step-{step}"
        self._settle(require=False)
        if self._files.has_adapters and finished:
            if self.args.should_save:
                self._saver.save(step, self._files.write_merged, self._made_with)
        elif path not in checkpoint.whole(self._checkpoints):
            self._save_checkpoint(self.model, None)
        self._settle(require=True)
        return path

    def _cursor(self) -> dict[str, Any]:
        if self._stream is None:
            return {}
        rows = self.state.global_step * self.rows_per_step
        cursor = self._stream.cursor_at(rows)
        return {"rows": rows, "cursor": {"chats": cursor.chats, "rows": cursor.rows}}

    @property
    def rows_per_step(self) -> int:
        """Rows that an optimizer step takes, all ranks together."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes


def _caught(objective: MtpObjective | LogitTeacher | None, policy: Any) -> AbstractContextManager[list[torch.Tensor]]:
    """The states that an objective needs of the policy's forward pass; none without it."""
    return nullcontext([]) if objective is None else objective.capture(policy)


def _row_sequences(batch: dict[str, Any]) -> torch.Tensor:
    """[R, W]: the sample of each token, counted through the whole batch; -1 for padding."""
    per_row_RW = _sequences(batch)
    counts_R = per_row_RW.amax(dim=1) + 1
    first_R = counts_R.cumsum(0) - counts_R
    return torch.where(per_row_RW >= 0, per_row_RW + first_R[:, None], per_row_RW)


def _sequences(batch: dict[str, Any]) -> torch.Tensor:
    """[R, W]: the sample of each token within its row, from position ids that restart; -1 for padding."""
    position_ids_RW = batch["position_ids"]
    real_RW = torch.arange(position_ids_RW.shape[1], device=position_ids_RW.device) < batch["row_lengths"][:, None]
    sequence_RW = ((position_ids_RW == 0) & real_RW).cumsum(dim=1) - 1
    return torch.where(real_RW, sequence_RW, -1)


def _mtp_targets(batch: dict[str, Any]) -> torch.Tensor:
    """[R, W]: tokens with loss that have two tokens of their sample before them."""
    return (batch["labels"] != IGNORED) & (batch["position_ids"] >= 2)
