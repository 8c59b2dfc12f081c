"""Tokens per second of SFT: this project's trainer beside TRL's SFTTrainer with its defaults.

    python benchmarks/sft.py [--quick]

Both train the same tiny DeepSeek-V3 from the same weights on the same chats of mixed lengths, assistant tokens only, with
the same learning rate and about as many tokens per optimizer step. Counted are real tokens: no padding. The variants take
turns, so that a machine whose speed drifts treats them alike. Between the two ends stand the same TRL trainer with one
thing changed after another, which shows what each brings.

The last line is one JSON object: ratio_tokens_per_second, ours, peer, shares.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

# ruff: noqa: E402  # a file beside this one would hide the package `rewards`
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.chat import build_tokenizer
from posttrain import sft_parts
from posttrain.model.load import build_policy, load_policy, save_policy
from posttrain.ranks import join_ranks
from posttrain.recipe import BuildSection, SftRecipe
from posttrain.run_dir import RunDir

MAX_LENGTH = 512
SAMPLES_PER_STEP = 8  # TRL's default; the packed variants take rows with as many tokens
LEARNING_RATE = 1e-4
ARCHITECTURE = BuildSection(
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    max_position_embeddings=MAX_LENGTH,
    initializer_range=0.02,
)


@dataclass
class Clock(TrainerCallback):
    """Tokens and seconds of the optimizer steps after a warm-up."""

    warmup: int
    tokens: list[int] = field(default_factory=list)  # of each batch, in the order of the steps
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    def watch(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """The same collator, counting."""

        def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
            self.tokens.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        return counted

    @property
    def tokens_per_second(self) -> float:
        seconds = self.times[-1] - self.times[self.warmup - 1]
        return sum(self.tokens[self.warmup : len(self.times)]) / seconds


def write_chats(path: Path, count: int) -> float:
    """Chats of 16 to 480 tokens with the character tokenizer; returns their mean length."""
    rng = random.Random(0)
    lengths = []
    with path.open("w") as file:
        for _ in range(count):
            total = rng.randint(16, 480)
            question = "".join(rng.choices("abcdefgh ", k=max(4, total // 4)))
            answer = "".join(rng.choices("0123456789+-=", k=max(4, total - len(question) - 5)))
            lengths.append(len(question) + len(answer) + 4)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return statistics.fmean(lengths)


def measure_trl(
    checkpoint: Path, chats: Path, steps: int, warmup: int, *, checkpointing: bool, experts: str, rows: int | None
) -> tuple[float, float]:
    """TRL's trainer; `rows` packs into so many rows a step. Returns tokens per second and the first step's loss."""
    from posttrain.model.load import load_tokenizer

    model = load_policy(
        str(checkpoint),
        dtype="float32",
        attn_implementation="sdpa",
        experts_implementation=experts,
        trust_remote_code=False,
    )
    clock = Clock(warmup)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=model,
            processing_class=load_tokenizer(str(checkpoint)),
            train_dataset=Dataset.from_json(str(chats)),
            args=SFTConfig(
                output_dir=directory,
                max_length=MAX_LENGTH,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                assistant_only_loss=True,
                per_device_train_batch_size=rows or SAMPLES_PER_STEP,
                packing=rows is not None,
                gradient_checkpointing=checkpointing,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
            ),
            callbacks=[clock],
        )
        trainer.data_collator = clock.watch(trainer.data_collator)
        trainer.train()
    return clock.tokens_per_second, trainer.state.log_history[0]["loss"]


def measure_ours(
    checkpoint: Path, chats: Path, steps: int, warmup: int, *, checkpointing: bool, rows: int
) -> tuple[float, float]:
    """The SFT stage's own parts, as `python -m posttrain.sft` puts them together."""
    clock = Clock(warmup)
    with tempfile.TemporaryDirectory() as directory:
        recipe = SftRecipe.model_validate(
            {
                "run_name": "bench",
                "output_dir": directory,
                "model": {"model_name_or_path": str(checkpoint)},
                "datasets": [{"path": str(chats)}],
                "training": {
                    "max_length": MAX_LENGTH,
                    "max_steps": steps,
                    "per_device_train_batch_size": rows,
                    "gradient_checkpointing": checkpointing,
                    "logging_steps": 1,
                },
                "optimizer": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "linear"},
            }
        )
        job = sft_parts.load_job(recipe, checkpoint, None, join_ranks())
        trainer = sft_parts.build_trainer(recipe, RunDir(Path(directory)), job)
        trainer.add_callback(clock)
        trainer.data_collator = clock.watch(trainer.data_collator)
        trainer.train()
    return clock.tokens_per_second, trainer.state.log_history[0]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    quick = parser.parse_args().quick
    steps, warmup, rounds = (8, 2, 1) if quick else (20, 4, 3)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, chats = Path(directory) / "policy", Path(directory) / "chats.jsonl"
        tokenizer = build_tokenizer()
        policy = build_policy(ARCHITECTURE.model_dump(), tokenizer, seed=0)
        save_policy(policy, tokenizer, checkpoint)
        mean_length = write_chats(chats, 600)
        rows = max(1, round(SAMPLES_PER_STEP * mean_length / (0.98 * MAX_LENGTH)))
        trl = dict(checkpoint=checkpoint, chats=chats, steps=steps, warmup=warmup)
        variants: dict[str, Callable[[], tuple[float, float]]] = {
            "TRL, defaults": lambda: measure_trl(**trl, checkpointing=True, experts="eager", rows=None),
            "+ no gradient checkpointing": lambda: measure_trl(**trl, checkpointing=False, experts="eager", rows=None),
            "+ grouped experts": lambda: measure_trl(**trl, checkpointing=False, experts="grouped_mm", rows=None),
            "+ packing": lambda: measure_trl(**trl, checkpointing=False, experts="grouped_mm", rows=rows),
            "posttrain, with checkpointing": lambda: measure_ours(**trl, checkpointing=True, rows=rows),
            "posttrain": lambda: measure_ours(**trl, checkpointing=False, rows=rows),
        }
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        losses: dict[str, float] = {}
        for _ in range(rounds):
            for name, measure in variants.items():
                speed, losses[name] = measure()
                speeds[name].append(speed)
    report(speeds, losses, sum(p.numel() for p in policy.parameters()), mean_length)


def report(speeds: dict[str, list[float]], losses: dict[str, float], parameters: int, mean_length: float) -> None:
    """A table to read and a line to parse."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peer, ours = medians["TRL, defaults"], medians["posttrain"]
    table = Table(title=f"SFT of a {parameters / 1e6:.1f}M DeepSeek-V3, chats of {mean_length:.0f} tokens on average")
    for column in ("", "tokens/s", "lowest", "highest", "x TRL", "first loss"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in speeds.items():
        table.add_row(
            name,
            f"{medians[name]:,.0f}",
            f"{min(values):,.0f}",
            f"{max(values):,.0f}",
            f"{medians[name] / peer:.2f}",
            f"{losses[name]:.3f}",
        )
    Console().print(table)
    names = list(medians)
    shares = {
        name.removeprefix("+ "): round(medians[name] / medians[before], 3) for before, name in pairwise(names[:4])
    }
    shares["trainer"] = round(ours / medians["+ packing"], 3)
    shares["checkpointing, within posttrain"] = round(ours / medians["posttrain, with checkpointing"], 3)
    print(
        json.dumps(
            {
                "ratio_tokens_per_second": round(ours / peer, 3),
                "ours": {"tokens_per_second": round(ours)},
                "peer": {"tokens_per_second": round(peer), "name": "trl.SFTTrainer, defaults, bf16 off"},
                "shares": shares,
            }
        )
    )


if __name__ == "__main__":
    main()
