"""Shapes of published models: counted here, by transformers, and by those who published them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from posttrain.architectures import ARCHITECTURES, Architecture
from posttrain.dry_run import describe
from posttrain.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
PUBLISHED = {  # billions: all, active; as their cards and papers say
    "deepseek-ai/DeepSeek-V3": (671, 37),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "moonshotai/Moonlight-16B-A3B": (16, 3),
    "Qwen/Qwen2.5-1.5B": (1.54, 1.54),
    "Qwen/Qwen2.5-7B": (7.61, 7.61),
    "Qwen/Qwen2.5-32B": (32.5, 32.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    total, active = PUBLISHED[name]
    assert ARCHITECTURES[name].parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert ARCHITECTURES[name].active_parameters / 1e9 == pytest.approx(active, rel=0.03)


def on_meta(shape: Architecture) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in dataclasses.asdict(shape).items() if key != "model_type"}
    if shape.model_type == "deepseek_v3":
        values |= {"n_routed_experts": values.pop("num_experts"), "v_head_dim": values.pop("head_dim"), "n_group": 1}
        values["topk_group"] = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **values))
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_transformers_on_the_meta_device(name: str) -> None:
    assert ARCHITECTURES[name].parameters == on_meta(ARCHITECTURES[name])


def test_the_cache_of_a_latent_is_that_of_the_paper() -> None:
    assert ARCHITECTURES["deepseek-ai/DeepSeek-V3"].cache_bytes == 2 * 61 * (512 + 64)
    assert ARCHITECTURES["Qwen/Qwen3-30B-A3B"].cache_bytes == 2 * 2 * 48 * 4 * 128


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_30b_a3b", "moonlight_16b_a3b", "qwen2_5_distill"])
def test_recipes_of_real_models_know_their_memory_offline(family: str) -> None:
    for path in (ROOT / "recipes" / family).glob("*.yaml"):
        recipe = load_recipe(path)
        plan = describe(recipe)
        assert re.search(r"16 bytes a parameter for training = [\d.]+ [GT]iB", plan), path
        # What a pipeline's later stages start from is not there before the earlier ones have run.
        assert recipe.stage == "pipeline" or "unknown until" not in plan
