"""The SFT trainer as the stage builds it, and what its first gradient is, for tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from data.chat import build_tokenizer
from posttrain import sft_parts
from posttrain.model.load import save_policy
from posttrain.ranks import join_ranks
from posttrain.recipe import SftRecipe
from posttrain.run_dir import RunDir
from posttrain.sft_trainer import PolicyTrainer


def write_chats(path: Path) -> Path:
    """Chats of mixed lengths, some with several turns."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(60):
            messages = []
            for _ in range(rng.choice([1, 1, 2])):
                messages.append({"role": "user", "content": "".join(rng.choices("abcde", k=rng.randint(2, 12)))})
                messages.append({"role": "assistant", "content": "".join(rng.choices("01234", k=rng.randint(2, 20)))})
            file.write(json.dumps({"messages": messages, "id": str(number)}) + "\n")
    return path


def save_random(
    path: Path, model: Callable[[Any], Any], config: Callable[..., Any], *, rows: int = 0, **sizes: Any
) -> Path:
    """A model with random weights and our tokens, saved as the stages save it.

    Args:
        path: where.
        model, config: its classes.
        rows: of padding after the tokens' embeddings.
        sizes: of the configuration.
    """
    tokenizer = build_tokenizer()
    specials = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    built = model(config(vocab_size=len(tokenizer) + rows, max_position_embeddings=256, **specials, **sizes))
    save_policy(built, tokenizer, path)
    return path


def build_recipe(path: Path, chats: Path, output: Path, **changes: Any) -> SftRecipe:
    """One short step on a checkpoint; `changes` are merged into the recipe, section by section."""
    tree: dict[str, Any] = {
        "run_name": "test",
        "output_dir": str(output),
        "model": {"model_name_or_path": str(path)},
        "datasets": [{"path": str(chats)}],
        "training": {"max_length": 96, "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return SftRecipe.model_validate(tree)


def build_trainer(path: Path, chats: Path, output: Path, **changes: Any) -> PolicyTrainer:
    """A trainer as the stage builds it, see `build_recipe`."""
    recipe = build_recipe(path, chats, output, **changes)
    run_dir = RunDir(recipe.run_dir)
    job = sft_parts.load_job(recipe, path, None, join_ranks())
    return sft_parts.build_trainer(recipe, run_dir, job)


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_gradient(trainer: PolicyTrainer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The gradient of a trainer's first step, and the rows it was computed on."""
    seen: list[dict[str, Any]] = []
    collate = trainer.data_collator

    def remember(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(examples)
        return collate(examples)

    trainer.data_collator = remember
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.found, seen[: trainer.rows_per_step]


def samples_of(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    return found


def relative_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    gap = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in found)
    return float((gap / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)


def reference_model(path: Path) -> Any:
    from posttrain.model.load import load_policy

    return load_policy(
        str(path),
        dtype="float32",
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    ).train()
