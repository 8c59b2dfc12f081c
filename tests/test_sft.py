"""The SFT trainer on real models: exact packing, exact normalisation, held-out loss, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_trainers import build_trainer, first_gradient, reference_model, relative_gap, samples_of, save_random
from torch.nn import functional as nnf
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from data.chat import build_tokenizer
from data.records import Record
from posttrain import checkpoint
from posttrain.sft_data import IGNORED, Cursor, PackedStream, RowCounts, RowMaker, Rows
from posttrain.sft_trainer import PolicyTrainer


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with random weights."""
    return save_random(
        tmp_path_factory.mktemp("qwen"),
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.001,
    )


@pytest.fixture
def build(chats: Path, tmp_path: Path) -> Callable[..., PolicyTrainer]:
    """See `build_trainer`."""

    def make(path: Path, **changes: dict[str, Any]) -> PolicyTrainer:
        return build_trainer(path, chats, tmp_path / "run", **changes)

    return make


def one_by_one(model: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The gradient by plain transformers, each sample alone, hand-written loss."""
    model.zero_grad()
    samples = samples_of(rows)
    total = sum(label != IGNORED for _, labels in samples for label in labels[1:])
    for ids, labels in samples:
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        loss = nnf.cross_entropy(logits_TV[:-1], torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum")
        (loss / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["policy_path", "qwen_path"])
def test_a_packed_gradient_is_that_of_the_samples_one_by_one(
    kind: str, attention: str, build: Callable[..., PolicyTrainer], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    found, rows = first_gradient(build(path, model={"attn_implementation": attention}))
    assert max(len(row["seq_lengths"]) for row in rows) > 2
    assert relative_gap(found, one_by_one(reference_model(path), rows)) < 1e-6


def test_samples_that_see_each_other_are_noticed(policy_path: Path, build: Callable[..., PolicyTrainer]) -> None:
    class Leaky(Rows):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            width = torch.arange(batch["input_ids"].shape[1])
            return {**batch, "attention_mask": (width < batch["row_lengths"][:, None]).long()}

    trainer = build(policy_path)
    trainer.data_collator = Leaky(trainer.processing_class.pad_token_id)
    found, rows = first_gradient(trainer)
    assert relative_gap(found, one_by_one(reference_model(policy_path), rows)) > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
)
def test_accumulation_and_checkpointing_do_not_change_the_gradient(
    changes: dict[str, Any], policy_path: Path, build: Callable[..., PolicyTrainer]
) -> None:
    losses = {"router": {"bias_update_speed": 0.01, "sequence_balance_alpha": 0.1}}
    whole, whole_rows = first_gradient(build(policy_path, **losses))
    first = build(policy_path, training=changes, **losses)
    parts, rows = first_gradient(first)
    assert rows == whole_rows
    assert relative_gap(parts, whole) < 1e-6
    # Neither padding nor what checkpointing computes twice is counted: tokens x K choices a layer, and the same bias.
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert first.last_counts().sum(dim=1).tolist() == [2 * tokens]


def test_the_balance_loss_reaches_the_gradient(policy_path: Path, build: Callable[..., PolicyTrainer]) -> None:
    plain, _ = first_gradient(build(policy_path))
    balanced, _ = first_gradient(build(policy_path, router={"sequence_balance_alpha": 0.1}))
    gate = next(name for name in plain if name.endswith("mlp.gate.weight"))
    assert (balanced[gate] - plain[gate]).norm() > 1e-3 * plain[gate].norm()


def test_the_classical_loss_of_qwen_is_ours_and_off_by_default(
    qwen_path: Path, build: Callable[..., PolicyTrainer]
) -> None:
    plain, rows = first_gradient(build(qwen_path))
    assert relative_gap(plain, one_by_one(reference_model(qwen_path), rows)) < 1e-6  # config.json's 0.001 is not added
    balanced, _ = first_gradient(build(qwen_path, router={"router_aux_loss_coef": 0.1}))
    gate = next(name for name in plain if name.endswith("mlp.gate.weight"))
    assert (balanced[gate] - plain[gate]).norm() > 1e-3 * plain[gate].norm()


def test_held_out_loss_is_the_mean_over_tokens(policy_path: Path, build: Callable[..., PolicyTrainer]) -> None:
    trainer = build(policy_path, validation={"fraction": 0.3}, training={"per_device_train_batch_size": 3})
    found = trainer.evaluate()
    model, total, count = reference_model(policy_path), 0.0, 0
    for ids, labels in samples_of(list(trainer.eval_dataset)):
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        targets = torch.tensor(labels[1:])
        total += float(nnf.cross_entropy(logits_TV[:-1], targets, ignore_index=IGNORED, reduction="sum"))
        count += int((targets != IGNORED).sum())
    assert found["eval_tokens"] == count
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-6)


# --- rows -------------------------------------------------------------------------------------------------------------


def chat(number: int, length: int) -> Record:
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * length})
    return Record(id=str(number), messages=messages)


def maker(**changes: Any) -> RowMaker:
    settings: dict[str, Any] = {"max_length": 20, "packing": True, "loss_on": "assistant", "too_long": "drop"}
    return RowMaker(tokenizer=build_tokenizer(), **{**settings, **changes})


def test_rows_are_packed_and_counted() -> None:
    # <bos><|user|>a<|assistant|> is 4 tokens, the answer its letters and <eos>.
    rows, counts = maker().rows([chat(0, 5), chat(1, 5), chat(2, 40)])
    assert [row["seq_lengths"] for row in rows] == [[10, 10]]
    assert rows[0]["labels"][:10] == [IGNORED] * 4 + rows[0]["input_ids"][4:10]
    assert counts == RowCounts(chats=3, kept=2, too_long=1, rows=1, tokens=20, trained_tokens=12, capacity=20)
    assert counts.fill == 1.0


def test_what_is_too_long_is_dropped_cut_or_refused() -> None:
    rows, counts = maker(too_long="truncate").rows([chat(0, 40)])
    assert len(rows[0]["input_ids"]) == 20 and counts.truncated == 1 and counts.trained_tokens == 16
    _, counts = maker(too_long="truncate", max_length=4).rows([chat(0, 40)])
    assert counts.truncated == 1 and counts.untrained == 1 and counts.kept == 0
    with pytest.raises(RuntimeError, match="chat 0 has 45 tokens and training.max_length is 20"):
        maker(too_long="error").rows([chat(0, 40)])


def test_padding_has_neither_loss_nor_a_sample() -> None:
    rows, _ = maker().rows([chat(0, 5), chat(1, 5), chat(2, 9)])
    batch = Rows(0)(rows)
    assert batch["row_lengths"].tolist() == [len(row["input_ids"]) for row in rows]
    assert "attention_mask" not in batch
    short = int(batch["row_lengths"].argmin())
    assert (batch["labels"][short, batch["row_lengths"][short] :] == IGNORED).all()


def test_a_stream_goes_on_from_every_row_exactly() -> None:
    def open_chats(skip: int) -> Any:
        return (chat(number, 1 + number * 7 % 12) for number in range(skip, 10**9))

    def stream() -> PackedStream:
        return PackedStream(open_chats, maker(), window=8)

    whole = stream()
    rows = [row for row, _ in zip(whole, range(25), strict=False)]
    for place in range(25):
        again = stream()
        again.start_at(whole.cursor_at(place), place)
        assert [row for row, _ in zip(again, range(25 - place), strict=False)] == rows[place:]
    assert whole.cursor_at(0) == Cursor() and whole.cursor_at(24).chats > 8


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_linked(policy_path: Path, build: Callable[..., PolicyTrainer]) -> None:
    trainer = build(
        policy_path,
        training={"max_steps": 6},
        optimizer={"learning_rate": 0.05},  # so high that the loss goes up again
        validation={"fraction": 0.3, "eval_steps": 1},
        checkpoint={"save_steps": 1, "save_total_limit": 1},
    )
    losses: list[float] = []

    class Remember(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            losses.append(metrics["eval_loss"])

    trainer.add_callback(Remember())
    trainer.train()
    directory = Path(trainer.args.output_dir).parent / "checkpoints"
    best = losses.index(min(losses)) + 1
    assert len(losses) == 6 and best < 6
    assert (directory / "best").resolve().name == f"step-{best}"
    assert [path.name for path in checkpoint.whole(directory)] == [f"step-{best}", "step-6"]
    assert (directory / "latest").resolve().name == "step-6"
    assert trainer.last_metrics()["validation/best_loss"] == pytest.approx(min(losses))


def test_training_stops_early_when_held_out_loss_does_not_fall(
    policy_path: Path, build: Callable[..., PolicyTrainer]
) -> None:
    trainer = build(
        policy_path,
        training={"max_steps": 50},
        optimizer={"learning_rate": 0.05},
        validation={"fraction": 0.3, "eval_steps": 1, "early_stopping_patience": 2},
    )
    trainer.train()
    assert trainer.state.global_step < 50
