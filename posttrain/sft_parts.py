"""What SFT plugs into TRL's SFTTrainer: dataset, collator, arguments and callbacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data.chat import tokenize_with_mask
from posttrain.errors import RunStopped
from posttrain.interrupt import StopRequest
from posttrain.metrics import Metric, MetricsLog
from posttrain.model import router
from posttrain.progress import Progress
from posttrain.recipe import SftRecipe
from posttrain.records import load_chats

TRAINER_DIRECTORY = "trainer"


IGNORED = -100  # the label of a token without loss


def tokenized_dataset(recipe: SftRecipe, tokenizer: Any) -> Dataset:
    """The recipe's chats as rows of token ids and labels, packed best-fit if the recipe says so.

    Columns: input_ids, labels (the token itself where it is trained, else -100) and, when packed, seq_lengths.

    Raises:
        RunStopped: no sample fits `training.max_length`, or none has a token to train on.
    """
    training = recipe.training
    rows, too_long, untrained = [], 0, 0
    for chat in load_chats(recipe.datasets, recipe.seed):
        ids, mask = tokenize_with_mask(tokenizer, chat.messages)
        trained = (True,) * len(ids) if training.loss_on == "all" else mask
        too_long += len(ids) > training.max_length
        untrained += not any(trained)
        if len(ids) <= training.max_length and any(trained):
            labels = [token if train else IGNORED for token, train in zip(ids, trained, strict=True)]
            rows.append({"input_ids": list(ids), "labels": labels})
    if too_long or untrained:
        print(
            f"sft: left out {too_long} samples longer than training.max_length={training.max_length} tokens and "
            f"{untrained} without a trained token; {len(rows)} remain",
            flush=True,
        )
    if not rows:
        raise RunStopped("no sample to train on: raise training.max_length, or look at the chat template and the data")
    dataset = Dataset.from_list(rows)
    return pack_dataset(dataset, training.max_length, "bfd") if training.packing else dataset


class Rows(DataCollatorForLanguageModeling):
    """Rows side by side, [rows, tokens]; packed samples are told apart by position ids that restart.

    TRL's own collator lays packed rows end to end, which makes attention quadratic in the whole batch where no variable
    length kernel is at hand. There is no attention mask: with one, transformers would let packed samples see each other.
    """

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id=pad_token_id, return_position_ids=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]
        # The first token of a sample is predicted from the sample before it: not a loss anyone wants.
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch


def trainer_arguments(recipe: SftRecipe, run_dir: Path) -> SFTConfig:
    """The recipe in TRL's words."""
    training, optimizer = recipe.training, recipe.optimizer
    scheduler: dict[str, Any] = {"lr_scheduler_type": optimizer.lr_scheduler_type}
    if optimizer.lr_scheduler_type == "cosine":
        scheduler = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": optimizer.min_learning_rate},
        }
    elif optimizer.lr_scheduler_type == "constant":
        scheduler = {"lr_scheduler_type": "constant_with_warmup"}
    saving = recipe.checkpoint.save_steps
    return SFTConfig(
        output_dir=str(run_dir / TRAINER_DIRECTORY),
        # Tokens, labels and packed rows are ready: `tokenized_dataset` made them.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=training.max_steps or -1,
        num_train_epochs=training.num_train_epochs or 1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        bf16=training.bf16,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        logging_steps=training.logging_steps,
        save_strategy="steps" if saving else "no",
        save_steps=saving or 500,
        save_total_limit=recipe.checkpoint.save_total_limit,
        report_to="none",  # metrics.py is the one place that reports
        disable_tqdm=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **scheduler,
    )


def last_checkpoint(run_dir: Path) -> Path | None:
    """The trainer's newest checkpoint of an earlier run."""
    directory = run_dir / TRAINER_DIRECTORY
    found = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    return Path(found) if found else None


def step_of(trainer_checkpoint: Path) -> int:
    return int(trainer_checkpoint.name.rpartition("-")[2])


class LogSteps(TrainerCallback):
    """The trainer's numbers to metrics.jsonl and to the progress display."""

    def __init__(self, log: MetricsLog, progress: Progress) -> None:
        self._log = log
        self._progress = progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.set_total(state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        metrics = {f"train/{name}": Metric(float(value), "mean") for name, value in logs.items() if _is_number(value)}
        self._log.log(state.global_step, metrics)
        self._progress.update(state.global_step, metrics)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


class StopOnRequest(TrainerCallback):
    """Ends the training after the present step when a signal asked for it, with a checkpoint to resume from."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._stop:
            control.should_training_stop = True
            control.should_save = True


class BalanceRouter(TrainerCallback):
    """Auxiliary-loss-free balance during SFT: counts experts as they are chosen, moves the bias after each step."""

    def __init__(self, speed: float, pad_token_id: int) -> None:
        self._speed = speed
        self._pad_token_id = pad_token_id
        self._handles: list[Any] = []
        self._counts: list[torch.Tensor] = []
        self._real_N: torch.Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._routers = router.find_routers(model)
        if not self._speed or not self._routers:
            return
        self._counts = [torch.zeros(r.weight.shape[0], device=r.weight.device) for r in self._routers]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for layer, module in enumerate(self._routers):
            self._handles.append(module.register_forward_hook(self._counter(layer)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._handles:
            return
        counts_LE = torch.stack(self._counts)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_LE)
        router.update_correction_bias(self._routers, counts_LE, self._speed)
        for counts_E in self._counts:
            counts_E.zero_()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self._real_N = (kwargs["input_ids"] != self._pad_token_id).flatten()

    def _end(self, _module: Any, _args: Any, _output: Any) -> None:
        # What runs after the forward pass is gradient checkpointing repeating it: not to be counted again.
        self._real_N = None

    def _counter(self, layer: int) -> Any:
        def count(_module: Any, _args: Any, output: Any) -> None:
            if self._real_N is not None:
                chosen = output[2].detach()[self._real_N].flatten()
                self._counts[layer] += torch.bincount(chosen, minlength=len(self._counts[layer]))

        return count
