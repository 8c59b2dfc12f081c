"""What the SFT stage puts together: policy, rows, preflight, trainer and its callbacks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from data.records import Record
from data.templates import set_chat_template
from posttrain import checkpoint, preflight, preflight_view, sft_data
from posttrain.disk import write_atomically
from posttrain.distillation import require_same_vocabulary
from posttrain.errors import RunStopped
from posttrain.learner_parallel import load_weights
from posttrain.model import load, lora, mtp
from posttrain.model.balance import RouterBalance
from posttrain.model.logit_teacher import LogitTeacher
from posttrain.model.mtp_objective import MtpObjective
from posttrain.model.policy_files import PolicyFiles
from posttrain.model.router import find_routers
from posttrain.recipe import SftRecipe
from posttrain.records import data_errors, load_chats, stream_chats, validation_split
from posttrain.run_dir import RunDir
from posttrain.sft_callbacks import EarlyStopping, EndStep
from posttrain.sft_data import Cursor, PackedStream, RowCounts, RowMaker
from posttrain.sft_trainer import PolicyTrainer
from posttrain.trainer_arguments import common_arguments

PREVIEW_CHATS = 256  # of a stream, for the preflight


@dataclass(frozen=True)
class SftRows:
    """What is trained on, and what is known of it before."""

    train: Dataset | PackedStream
    held_out: Dataset | None
    preview: list[dict[str, Any]]  # for the preflight: all rows, or the first ones of a stream
    counts: RowCounts  # of the preview
    report: dict[str, Any]  # of the data preparation, see `posttrain.records.load_chats`; empty for a stream


@dataclass(frozen=True)
class SftJob:
    """Everything loaded and ready to train."""

    policy: Any
    files: PolicyFiles
    maker: RowMaker
    rows: SftRows
    balance: RouterBalance
    objective: MtpObjective | None
    teacher: LogitTeacher | None
    resumed_from: Path | None
    is_main: bool

    @property
    def resume_step(self) -> int | None:
        return checkpoint.load_progress(self.resumed_from)["step"] if self.resumed_from else None


# --- loading ----------------------------------------------------------------------------------------------------------


def load_job(recipe: SftRecipe, origin: Path, last: Path | None, ranks: PartialState) -> SftJob:
    """Load the policy and make the rows.

    Args:
        recipe: of the run.
        origin: the checkpoint that the run starts from.
        last: the run's own checkpoint to go on from, None at the start.
        ranks: of this run.

    Raises:
        RunStopped: there is nothing to train on, or the teacher is none for this policy.
        ValueError: the recipe asks for what this policy cannot do.
    """
    tokenizer = load.load_tokenizer(str(origin), trust_remote_code=recipe.model.trust_remote_code)
    require_teachable(recipe, tokenizer)
    if recipe.training.chat_template is not None:
        set_chat_template(tokenizer, recipe.training.chat_template)
    policy, objective = load_policy(recipe, origin, last)
    training, preparation = recipe.training, recipe.preparation
    maker = RowMaker(tokenizer, training.max_length, training.packing, training.loss_on, preparation.too_long)
    with data_errors("datasets"):
        rows = load_rows(recipe, maker, last)
    return SftJob(
        policy=policy,
        files=PolicyFiles(policy, tokenizer, origin, objective.module if objective else None),
        maker=maker,
        rows=rows,
        balance=RouterBalance(find_routers(policy), recipe.router),
        objective=objective,
        teacher=load_teacher(recipe, policy, len(tokenizer), ranks),
        resumed_from=last,
        is_main=ranks.is_main_process,
    )


def load_policy(recipe: SftRecipe, origin: Path, last: Path | None) -> tuple[Any, MtpObjective | None]:
    """The policy with its adapters or its prediction module, as they were at `last`."""
    section = recipe.lora
    # With adapters, the policy itself never changes. Without, it comes from the run's own checkpoint: the trainer alone
    # would lose every routed expert.
    source = str(origin if section is not None or last is None else last)
    policy = load.load_policy(
        source,
        dtype="float32",
        attn_implementation=recipe.model.attn_implementation,
        experts_implementation=recipe.model.experts_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        quantization=section.quantization if section else None,
    )
    if section is not None:
        torch.manual_seed(recipe.seed)
        policy = lora.apply_lora(
            policy, r=section.r, alpha=section.alpha, dropout=section.dropout, targets=section.targets
        )
        if last is not None:
            lora.load_adapter(policy, last / lora.ADAPTER)
    objective = None
    if recipe.mtp is not None:
        fresh = recipe.mtp.init == "new" and last is None
        module = mtp.build_mtp(policy) if fresh else mtp.load_mtp(policy, source)
        objective = MtpObjective(
            policy,
            module,
            loss_weight=recipe.mtp.loss_weight,
            detach_trunk=recipe.mtp.detach_trunk,
            router=recipe.router,
        )
    return policy, objective


def require_teachable(recipe: SftRecipe, tokenizer: Any) -> None:
    """Look at the teacher before anything large is loaded.

    Raises:
        RunStopped: it has another vocabulary, or the policy is to be sharded.
    """
    if recipe.teacher is None:
        return
    path = recipe.teacher.model_name_or_path
    of_teacher = load.load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
    require_same_vocabulary(tokenizer, of_teacher, path)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise RunStopped(
            "teacher with FSDP: logit distillation uses the policy's head outside its forward pass, where a sharded head is "
            "not whole; start without --use_fsdp (lora and gradient_checkpointing save memory), or distil text or on policy"
        )


def take_weights(recipe: SftRecipe, job: SftJob, path: Path) -> None:
    """Those of an earlier checkpoint of this run into the policy in training: adapters, or all and the prediction module's."""
    if job.files.has_adapters:
        lora.load_adapter(job.policy, path / lora.ADAPTER)
        return
    policy, objective = load_policy(recipe, path, path)
    load_weights(job.policy, policy.state_dict())
    if job.objective is not None and objective is not None:
        load_weights(job.objective.module, objective.module.state_dict())


def load_teacher(recipe: SftRecipe, policy: Any, num_tokens: int, ranks: PartialState) -> LogitTeacher | None:
    """The frozen model that the recipe's `teacher` names, whole on every rank.

    Raises:
        RunStopped: see `LogitTeacher`.
    """
    section = recipe.teacher
    if section is None:
        return None
    model = load.load_policy(
        section.model_name_or_path,
        dtype=section.dtype,
        attn_implementation=recipe.model.attn_implementation,
        experts_implementation=recipe.model.experts_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return LogitTeacher(policy, model.to(ranks.device), section, num_tokens)


def load_rows(recipe: SftRecipe, maker: RowMaker, last: Path | None) -> SftRows:
    """Chats to rows, as the recipe's `datasets`, `preparation` and `validation` say.

    Args:
        recipe: of the run.
        maker: of rows.
        last: the checkpoint whose place in the stream to go on from.

    Raises:
        RunStopped: there is nothing to train on.
    """
    validation, held_out = recipe.validation, None
    if validation is not None and validation.datasets is not None:
        held_out = held_out_rows(maker, load_chats(validation.datasets, recipe.seed, split="eval").records)
    if recipe.preparation.streaming:
        stream = PackedStream(partial(open_stream, recipe), maker)
        preview, counts = maker.rows(islice(stream.open_chats(0), PREVIEW_CHATS))
        sft_data.require_rows(preview, counts)
        if last is not None:
            progress = checkpoint.load_progress(last)
            stream.start_at(Cursor(**progress["cursor"]), progress["rows"])
        return SftRows(stream, held_out, preview, counts, {})
    prepared = load_chats(recipe.datasets, recipe.seed, recipe.preparation)
    chats = prepared.records
    if validation is not None and validation.fraction is not None:
        chats, kept_back = validation_split(chats, validation.fraction, recipe.seed)
        held_out = held_out_rows(maker, kept_back)
    rows, counts = maker.rows(chats)
    sft_data.require_rows(rows, counts)
    left_out = {name: prepared.report[name] for name in ("duplicates", "contaminated")}
    return SftRows(Dataset.from_list(rows), held_out, rows, replace(counts, **left_out), prepared.report)


def open_stream(recipe: SftRecipe, skip: int) -> Iterator[Record]:
    """The chats of a stream from the `skip`-th on."""
    return stream_chats(recipe.datasets, recipe.seed, recipe.preparation, skip)


def held_out_rows(maker: RowMaker, chats: Sequence[Record]) -> Dataset:
    """Rows of held-out chats."""
    rows, counts = maker.rows(chats)
    sft_data.require_rows(rows, counts)
    return Dataset.from_list(rows)


# --- before the first step --------------------------------------------------------------------------------------------


def show_preflight(job: SftJob, recipe: SftRecipe, run_dir: RunDir) -> None:
    """Print the preflight and keep it as preflight.json, beside data.json with what became of the chats.

    Raises:
        RunStopped: it found something that would spoil the run.
    """
    prepared = {**job.rows.counts.to_dict(), "preparation": job.rows.report}
    write_atomically(run_dir.path / "data.json", json.dumps(prepared, indent=2))
    rows, tokenizer = job.rows.preview, job.maker.tokenizer
    report = preflight.inspect_run(
        recipe,
        policy=job.policy,
        tokenizer=tokenizer,
        rows=rows,
        counts=job.rows.counts,
        teacher=job.teacher.model if job.teacher else None,
    )
    preflight_view.show(report, rows, tokenizer)
    write_atomically(run_dir.path / "preflight.json", json.dumps(report.facts, indent=2))
    preflight.require(report)


# --- the trainer ------------------------------------------------------------------------------------------------------


def build_trainer(
    recipe: SftRecipe, run_dir: RunDir, job: SftJob, made_with: Mapping[str, Any] | None = None
) -> PolicyTrainer:
    """The trainer, ready to run. `made_with` goes into its checkpoints, see `posttrain.resume`."""
    callbacks: list[TrainerCallback] = [EndStep(job.balance, job.objective)]
    if recipe.validation is not None and recipe.validation.early_stopping_patience:
        callbacks.append(
            EarlyStopping(recipe.validation.early_stopping_patience, recipe.validation.early_stopping_threshold)
        )
    stream = job.rows.train if isinstance(job.rows.train, PackedStream) else None
    trainer = PolicyTrainer(
        balance=job.balance,
        mtp=job.objective,
        teacher=job.teacher,
        files=job.files,
        stream=stream,
        checkpoints=run_dir.checkpoints,
        keep=recipe.checkpoint.save_total_limit,
        made_with=made_with or {},
        section=recipe.optimizer,
        take_weights=lambda path: take_weights(recipe, job, path),
        model=job.policy,
        processing_class=job.maker.tokenizer,
        args=trainer_arguments(recipe, run_dir.path),
        train_dataset=job.rows.train if stream is None else stream.dataset(),
        eval_dataset=job.rows.held_out,
        data_collator=sft_data.Rows(job.maker.tokenizer.pad_token_id),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_arguments(recipe: SftRecipe, run_dir: Path) -> SFTConfig:
    """The recipe in TRL's words."""
    training, optimizer, validation = recipe.training, recipe.optimizer, recipe.validation
    watching: dict[str, Any] = {}
    if validation is not None:
        watching = {
            "eval_strategy": "steps",
            "eval_steps": validation.eval_steps,
            "per_device_eval_batch_size": training.per_device_train_batch_size,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return SFTConfig(
        **common_arguments(training, optimizer, recipe.checkpoint, seed=recipe.seed, run_dir=run_dir),
        # Tokens, labels and packed rows are ready: sft_data.py made them.
        dataset_kwargs={"skip_prepare_dataset": True},
        # Each rank reads the stream itself: rows of a batch differ in width, so they cannot be dispatched by the first.
        accelerator_config={"dispatch_batches": False},
        ignore_data_skip=recipe.preparation.streaming,  # the stream starts at its cursor
        router_aux_loss_coef=0.0,  # ours, in model/balance.py, leaves padding out
        **watching,
    )
