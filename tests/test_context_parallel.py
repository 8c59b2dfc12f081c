"""Rows divided over ranks: each computes its part of the tokens, and what is said of them is what one rank says."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_learner_parallel import LENGTHS, free_port, on_processes
from test_sampler_layout import recipe
from transformers import Qwen2Config, Qwen2ForCausalLM

from posttrain.cli import check_recipe
from posttrain.context_parallel import mask_of_rows
from posttrain.dry_run import describe
from posttrain.layout import require_context_groups
from posttrain.learner import Learner
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from posttrain.types import Sample
from tests.oracles.grpo_loss import VOCAB_SIZE, random_samples, tiny_policy

ALGORITHM = AlgorithmSection(beta=0.05, entropy_coef=0.01, importance="truncate", loss_aggregation="sequence")
CASES = [("deepseek", "sdpa", True), ("deepseek", "eager", False), ("qwen", "sdpa", False)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.chat import build_tokenizer

    home = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    qwen = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    for name, model in {"deepseek": tiny_policy(), "qwen": Qwen2ForCausalLM(qwen)}.items():
        model.save_pretrained(home / name)
        build_tokenizer().save_pretrained(home / name)
    return home


def samples_with_experts() -> list[Sample]:
    """As a sampler gives them: the experts of each token but the last, in one layer, two of four."""
    random = np.random.default_rng(0)
    found = []
    for sample in random_samples(LENGTHS):
        tokens = len(sample.prompt_ids) + len(sample.completion_ids) - 1
        experts = np.stack([random.permutation(4)[:2] for _ in range(tokens)]).astype(np.uint8)
        found.append(replace(sample, experts_TLK=experts[:, None]))
    return found


def story(path: Path, rank: int, sharing: int, attention: str, replay: bool) -> dict[str, Any]:
    sparse = path.name == "deepseek"
    learner = Learner(
        model=ModelSection(model_name_or_path=str(path), experts_implementation="eager", attn_implementation=attention),
        optimizer=OptimizerSection(learning_rate=1e-2),
        learner=LearnerSection(num_workers=sharing, context_parallel_size=sharing, logits_chunk=7),
        reference_path=str(path),
        router_section=GrpoRouterSection(replay=replay, bias_update_speed=0.01 if sparse else 0.0),
        temperature=1.0,
        max_completion_length=16,
        total_steps=4,
        seed=0,
    )
    samples = samples_with_experts() if sparse else random_samples(LENGTHS)
    # 33 tokens do not come out even.
    (batch,) = pack(
        samples, world_size=1, max_tokens_per_microbatch=66, row_length=33, pad_token_id=0, with_experts=replay
    )
    seen: list[int] = []
    learner._model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    metrics, (parity, apart) = learner.forward_backward_compared(batch, samples, ALGORITHM, near_tie_margin=1e-5)
    gradients = {name.removeprefix("module."): g.numpy() for name, g in learner.gradients().items()}
    stepped = learner.optim_step()
    scores = learner.score(batch, samples, near_tie_margin=1e-5)
    return {
        "seen": seen,
        "metrics": {name: metric.value for name, metric in metrics.items()},
        "stepped": {name: metric.value for name, metric in stepped.items()},
        "agreement": [parity.tokens, parity.gap_max, parity.routing_agreement, apart.tokens],
        "loads": learner.take_expert_loads(),
        "gradients": gradients,
        "logprobs": scores.logprobs,
        "scored": scores.parity.tokens,
    }


def on_a_rank(rank: int, port: int, home: str) -> list[dict[str, Any]]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    return [story(Path(home) / kind, rank, 2, attention, replay) for kind, attention, replay in CASES]


@pytest.fixture(scope="module")
def divided(checkpoints: Path) -> list[list[dict[str, Any]]]:
    """Of each case what both ranks say."""
    port = free_port()
    ranks = on_processes(2, lambda pool, rank: pool.submit(on_a_rank, rank, port, str(checkpoints)))
    return [list(case) for case in zip(*ranks, strict=True)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_two_ranks_say_of_a_row_what_one_does(
    checkpoints: Path, divided: list[list[dict[str, Any]]], number: int
) -> None:
    kind, attention, replay = CASES[number]
    expected = story(checkpoints / kind, 0, 1, attention, replay)
    first, second = divided[number]
    for rank in (first, second):
        # Half of the tokens, rounded up, in every forward pass.
        assert rank["seen"] == [-(-tokens // 33 * 17) for tokens in expected["seen"]] and rank["seen"]
        for name, gradient in expected["gradients"].items():
            gap = float(np.linalg.norm(rank["gradients"][name] - gradient))
            assert gap <= 1e-5 * max(float(np.linalg.norm(gradient)), 1e-3), name
        for name, value in expected["stepped"].items():
            assert rank["stepped"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for index, values in expected["logprobs"].items():
            assert rank["logprobs"][index] == pytest.approx(values, abs=1e-4)
        assert rank["loads"] == expected["loads"]
    assert first["metrics"].keys() == second["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert first["metrics"][name] + second["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # One of the two reports.
    assert first["agreement"] == pytest.approx(expected["agreement"], rel=1e-3)
    assert (first["scored"], second["scored"]) == (expected["scored"], 0)


def test_a_token_sees_what_comes_before_it_in_its_sample() -> None:
    seen = mask_of_rows(torch.tensor([[0, 1, 0, 1, 2]]), 6, additive=False)[0, 0].int()
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    added = mask_of_rows(torch.tensor([[0, 0]]), 2, additive=True)[0, 0]
    assert added.tolist() == [[0.0, torch.finfo(torch.float32).min], [torch.finfo(torch.float32).min, 0.0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "6 heads of queries and 3 of keys, .* use one of 1, 3"),
        ({"num_attention_heads": 8, "sliding_window": 64}, "layers that do not see all tokens before"),
    ],
)
def test_what_does_not_divide_is_refused(config: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"context_parallel_size=2: .*{message}"):
        require_context_groups(config, 2)


def test_keys_of_latent_attention_divide_as_queries_do() -> None:
    require_context_groups({"num_attention_heads": 6, "num_key_value_heads": 1, "kv_lora_rank": 512}, 2)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_workers": 3}, "num_workers=3: .* a number that divides 3"),
        ({"num_workers": 2, "share_prompts": True}, "context_parallel_size with share_prompts"),
        ({"num_workers": 2, "logits_chunk": None}, "context_parallel_size with logits_chunk: null"),
    ],
)
def test_what_is_not_divided_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerSection(context_parallel_size=2, **section)


def test_a_recipe_is_refused_before_anything_starts_and_a_dry_run_tells() -> None:
    with pytest.raises(ValueError, match=r"grpo.yaml: learner.context_parallel_size=8: .* use one of 1, 2, 4"):
        check_recipe(recipe("qwen3_30b_a3b", "learner.context_parallel_size=8"), "grpo.yaml")
    assert "each row over 4 of them" in describe(recipe("qwen3_30b_a3b", "learner.context_parallel_size=4"))
