"""LoRA on MoE policies: what is adapted, what trains, merging, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from data.chat import build_tokenizer
from posttrain.errors import RunStopped
from posttrain.model import lora
from posttrain.model.load import build_policy, load_policy, save_policy
from posttrain.recipe import BuildSection

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = {"gate_up_proj", "down_proj"}
SHARED = {f"shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}


def deepseek() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    return build_policy(BuildSection(**sizes).model_dump(), build_tokenizer(), seed=0)


def qwen() -> Any:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tails(names: set[str], layer: int) -> set[str]:
    """Names within a layer, without the block's own."""
    part = f".layers.{layer}."
    return {name.split(part)[1].removeprefix("self_attn.").removeprefix("mlp.") for name in names if part in name}


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        (deepseek, ["attention"], {f"{n}.weight" for n in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}),
        (deepseek, ["routed_experts"], {f"experts.{name}" for name in EXPERTS}),
        (deepseek, ["shared_experts"], SHARED),
        (deepseek, ["routed_experts", "shared_experts"], SHARED | {f"experts.{name}" for name in EXPERTS}),
        (deepseek, ["router"], {"gate.weight"}),
        (qwen, ["attention", "routed_experts"], {f"{n}.weight" for n in QKVO} | {f"experts.{n}" for n in EXPERTS}),
        (mixtral, ["attention", "routed_experts"], {f"{n}.weight" for n in QKVO} | {f"experts.{n}" for n in EXPERTS}),
        (llama, ["dense_mlp"], {f"{name}_proj.weight" for name in ("gate", "up", "down")}),
        (qwen, None, {f"{n}.weight" for n in QKVO} | {f"experts.{n}" for n in EXPERTS}),  # all but the router
        (llama, None, {f"{n}.weight" for n in QKVO} | {f"{name}_proj.weight" for name in ("gate", "up", "down")}),
    ],
)
def test_what_was_asked_for_is_adapted_and_nothing_else(
    make: Any, targets: list[str] | None, expected: set[str]
) -> None:
    model = lora.apply_lora(make(), r=4, alpha=8, dropout=0.0, targets=targets)
    ranks = lora.adapter_ranks(model)
    assert tails(set(ranks), layer=1) == expected
    assert set(ranks.values()) == {4}  # peft doubles it on fused experts that it finds by itself
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_dense_layers_of_a_moe_are_a_group_of_their_own() -> None:
    model = lora.apply_lora(deepseek(), r=4, alpha=8, dropout=0.0, targets=["dense_mlp"])
    names = set(lora.adapter_ranks(model))
    assert tails(names, layer=0) == {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    assert tails(names, layer=1) == set()


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two packed rows of two samples each."""
    torch.manual_seed(1)
    ids = torch.randint(4, 60, (2, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)]).repeat(2, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def train(model: Any, steps: int, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch(model), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


ALL_OF = {
    deepseek: ["attention", "routed_experts", "shared_experts", "dense_mlp"],
    qwen: ["attention", "routed_experts"],
}


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("make", [deepseek, qwen, mixtral])
def test_adapters_learn_the_rest_stays_and_merging_changes_nothing(make: Any, experts: str, tmp_path: Path) -> None:
    base = make()
    base.set_experts_implementation(experts)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = lora.apply_lora(base, r=4, alpha=8, dropout=0.0, targets=ALL_OF.get(make, ["attention", "routed_experts"]))
    losses = train(model, 20)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[lora._plain(name)]), name
    inputs = {key: value for key, value in batch(model).items() if key != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = lora.merge(model)
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == before.keys()
    tokenizer = build_tokenizer()
    save_policy(merged, tokenizer, tmp_path)
    options = {"dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": False}
    again = load_policy(str(tmp_path), experts_implementation=experts, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_experts_adapter_is_the_product_that_the_paper_says() -> None:
    """W + (alpha / r) B A, with the r rows and columns that belong to the expert (LoRA, section 4.1)."""
    base = deepseek()
    name = "model.layers.1.mlp.experts.down_proj"
    before = base.get_parameter(name).detach().clone()
    model = lora.apply_lora(base, r=3, alpha=6, dropout=0.0, targets=["routed_experts"])
    train(model, 3)
    layer = dict(lora.adapters(model))[name]
    a, b = (matrix["default"].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
    a_ERI, b_ORE = a.view(8, 3, -1), b.view(-1, 3, 8)  # peft's layout for 8 experts
    merged = lora.merge(model).get_parameter(name).detach()
    for expert in range(8):
        torch.testing.assert_close(merged[expert], before[expert] + 6 / 3 * b_ORE[:, :, expert] @ a_ERI[expert])
    assert not torch.equal(merged, before)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_gradient_checkpointing_does_not_change_the_gradient(experts: str) -> None:
    found = []
    for checkpointing in (False, True):
        base = deepseek().train()
        base.set_experts_implementation(experts)
        torch.manual_seed(3)
        model = lora.apply_lora(base, r=4, alpha=8, dropout=0.0, targets=["attention", "routed_experts"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch(model), use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(grad.any() for grad in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_training_goes_on_from_saved_adapters_exactly(tmp_path: Path) -> None:
    targets = ["attention", "routed_experts", "shared_experts"]

    def fresh() -> tuple[Any, Any]:
        torch.manual_seed(5)
        model = lora.apply_lora(deepseek(), r=4, alpha=8, dropout=0.0, targets=targets)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = fresh()
    expected = train(whole, 6, optimizer)
    half, optimizer = fresh()
    train(half, 3, optimizer)
    lora.save_adapter(half, tmp_path)
    state = optimizer.state_dict()
    again, optimizer = fresh()
    lora.load_adapter(again, tmp_path)
    optimizer.load_state_dict(state)
    assert train(again, 3, optimizer) == expected[3:]
    for (name, one), (_, other) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    wrong = lora.apply_lora(deepseek(), r=4, alpha=8, dropout=0.0, targets=["attention"])
    with pytest.raises(ValueError, match="not those of this recipe"):
        lora.load_adapter(wrong, tmp_path)


def test_the_table_of_what_trains() -> None:
    model = deepseek()
    total = sum(p.numel() for p in model.parameters())
    full = lora.trained_parameters(model)
    assert sum(row.count for row in full) == sum(row.trainable for row in full) == total
    groups = {row.group for row in full}
    assert {
        "embedding",
        "attention",
        "routed_experts",
        "shared_experts",
        "dense_mlp",
        "router",
        "norm",
        "head",
    } == groups
    adapted = lora.apply_lora(model, r=4, alpha=8, dropout=0.0, targets=["attention", "routed_experts"])
    rows = {row.name: row for row in lora.trained_parameters(adapted)}
    assert sum(row.count for row in rows.values()) == total
    query = rows["model.layers.*.self_attn.q_proj.weight"]
    out_features, in_features = 4 * (32 + 64), 32  # heads x (plain + rotary dimensions), hidden size
    assert (query.tensors, query.rank, query.trainable) == (2, 4, 2 * 4 * (out_features + in_features))
    assert rows["lm_head.weight"].trainable == 0 and rows["lm_head.weight"].rank is None
    assert rows["model.layers.*.mlp.gate.weight"].trainable == 0


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (llama, {"targets": ["routed_experts"]}, "it has attention, dense_mlp: leave routed_experts out"),
        (mixtral, {"targets": ["attention", "shared_experts"]}, "shared_experts matches nothing in this Mixtral"),
        (deepseek, {"targets": ["shared_experts"], "dropout": 0.1}, "cannot have dropout"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora.apply_lora(make(), **{"r": 4, "alpha": 8, "dropout": 0.0, **options})


def test_quantization_without_gpu_or_package_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RunStopped, match="nf4 needs .*GPU; install it, or leave quantization out"):
        lora.quantization_config("nf4")
