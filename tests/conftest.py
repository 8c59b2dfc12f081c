"""Shared fixtures: nothing here reaches the network, and one small checkpoint serves every test that needs vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posttrain.cli import QUIET

os.environ.update(QUIET)
os.environ["HF_HUB_OFFLINE"] = "1"

# The smallest policy that vLLM's CPU kernels decode, with every part of DeepSeek-V3.
BUILD = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with random weights and an uneven router bias, saved as the stages save it."""
    import torch

    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, save_policy
    from posttrain.model.router import find_routers
    from posttrain.recipe import BuildSection

    tokenizer = build_tokenizer()
    policy = build_policy(BuildSection(**BUILD).model_dump(), tokenizer, seed=0)
    for router in find_routers(policy):
        router.e_score_correction_bias.copy_(torch.linspace(-0.05, 0.05, 8))
    path = tmp_path_factory.mktemp("policy")
    save_policy(policy, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of chats to train on."""
    from sft_trainers import write_chats

    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")
