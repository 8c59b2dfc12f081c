"""Logprobs by chunks of the head: the same values and gradients as with all logits, and less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from stage_commands import ROOT

from posttrain.model.token_scorer import TokenScorer
from posttrain.packing import pack
from tests.oracles.grpo_loss import VOCAB_SIZE, random_samples, tiny_policy

LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4), (6, 9), (2, 3)]


def scored(chunk: int | None, *, candidates: bool, entropy: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    (batch,) = pack(random_samples(LENGTHS), world_size=1, max_tokens_per_microbatch=64, row_length=32, pad_token_id=0)
    microbatch = batch.microbatches[0]
    mask_RW = microbatch.loss_mask_RW
    candidates_RWC = None
    if candidates:
        generator = torch.Generator().manual_seed(0)
        shape = (*mask_RW.shape, 5)
        candidates_RWC = torch.randint(0, VOCAB_SIZE, shape, generator=generator, dtype=torch.int32)
        candidates_RWC[..., 0] = microbatch.input_ids_RW
        candidates_RWC[::2] = -1  # rows that nothing was left out of
    model = tiny_policy()
    scorer = TokenScorer(model, chunk)
    arguments = (microbatch.input_ids_RW, microbatch.position_ids_RW, mask_RW, 0.7)
    logprobs_RW, entropy_RW = scorer(*arguments, candidates_RWC=candidates_RWC, entropy_gradient=entropy)
    weights_RW = torch.linspace(0.5, 2.0, mask_RW.numel()).view(mask_RW.shape) * mask_RW
    loss = (weights_RW * logprobs_RW).sum() + (0.3 * (weights_RW * entropy_RW).sum() if entropy else 0.0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs_RW.detach() * mask_RW, entropy_RW.detach() * mask_RW, gradients


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("candidates", "entropy"), [(False, False), (True, False), (True, True)])
def test_chunks_give_what_all_logits_give(chunk: int, candidates: bool, entropy: bool) -> None:
    expected = scored(None, candidates=candidates, entropy=entropy)
    found = scored(chunk, candidates=candidates, entropy=entropy)
    assert torch.allclose(found[0], expected[0], atol=1e-6) and torch.allclose(found[1], expected[1], atol=1e-6)
    assert found[2].keys() == expected[2].keys()
    scale = max(float(value.norm()) for value in expected[2].values())
    for name, value in expected[2].items():
        assert float((found[2][name] - value).norm()) <= 1e-6 * max(float(value.norm()), 1e-2 * scale), name


def test_nothing_trained_still_reaches_every_shared_parameter() -> None:
    """A rank that has only padding must take part in the others' reduction."""
    model = tiny_policy()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    logprobs_RW, _ = TokenScorer(model, 8)(ids, ids, torch.zeros(1, 1, dtype=torch.bool), 1.0)
    logprobs_RW.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if "experts" not in n)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=1.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with pytest.raises(ValueError, match="set learner.logits_chunk: null"):
        TokenScorer(model, 8)
    TokenScorer(model, None)


def test_the_peak_of_memory_is_lower() -> None:
    words = [
        sys.executable,
        "-P",
        str(ROOT / "benchmarks" / "learner_memory.py"),
        "--tokens",
        "2048",
        "--vocabulary",
        "32000",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # 2,048 x 32,000 logits are 0.24 GiB; the whole pass holds several copies of them.
    assert found["whole"]["peak_gib"] - found["chunked"]["peak_gib"] > 0.2
