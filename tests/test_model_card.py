"""The model card of an exported checkpoint, from what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from posttrain.model_card import model_card, short_name


def test_the_card_says_recipe_data_evaluation_and_lineage(tmp_path: Path) -> None:
    pipeline = tmp_path / "counting"
    checkpoint = pipeline / "grpo/checkpoints/step-45"
    checkpoint.mkdir(parents=True)
    (pipeline / "recipe.yaml").write_text("stage: pipeline\n")
    recipe = {
        "model": {"model_name_or_path": str(pipeline / "sft/checkpoints/latest")},
        "datasets": [{"task": "letter_counting", "levels": [2, 3], "size": 800}, {"path": "someone/sums"}],
        "rewards": [{"func": "rewards.format:score", "weight": 0.1}],
    }
    (pipeline / "grpo/recipe.yaml").write_text(yaml.safe_dump({"stage": "grpo", **recipe}, sort_keys=False))
    figure = {"value": 0.9925, "low": 0.97818, "high": 0.99745, "n": 400}
    summary = {
        "stage": "grpo",
        "seconds": 160.0,
        "steps": 45,
        "finished": True,
        "eval": {"after": {"pass_at_1": figure}},
    }
    (pipeline / "grpo/summary.json").write_text(json.dumps(summary))
    (pipeline / "grpo/environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}}))
    (pipeline / "grpo/metrics.jsonl").write_text('{"step": 1, "groups/sampled": 32, "groups/with_signal": 0.5}\n')
    sft = {"kind": "sft", "recipe": "recipes/tiny/sft.yaml", "seconds": 250.0, "inputs": []}
    origin = {"name": "x", "stage": "sft", "artefact": "sft/checkpoints/step-1000", "sha256": "ab" * 32}
    grpo = sft | {"kind": "grpo", "recipe": "recipes/tiny/grpo.yaml", "inputs": [origin]}
    artefacts = {"grpo/checkpoints/step-45": {"sha256": "cd" * 32}}
    (pipeline / "lineage.json").write_text(json.dumps({"stages": {"sft": sft, "grpo": grpo}, "artefacts": artefacts}))
    record = {"source": "x", "source_format": "float32", "format": "fp8", "adapter": None, "mtp": False}
    card = model_card(checkpoint, "tiny", record | {"tensors": 10, "parameters": 888_000})
    for words in (
        "datasets:\n- someone/sums\n",
        "# tiny\n\nMade by reinforcement learning with GRPO with posttrain: checkpoint step-45 (counting/grpo/checkpoints/",
        "888,000 parameters, 10 tensors: FP8 (e4m3)",
        "generated problems of `letter_counting`: levels [2, 3], size 800",
        "rewards differ: 16 groups",
        "`rewards.format:score` x 0.1",
        "| after | pass@1, sampled | 99.2% | 97.8% to 99.7% | 400 |",
        "**sft**: sft by `recipes/tiny/sft.yaml`, 4m10s\n",
        "**grpo**: grpo by `recipes/tiny/grpo.yaml`, 4m10s, from sft/checkpoints/step-1000 (sha256 abababababab)",
        f"sha256 {'cd' * 32}",
        "45 steps in 2m40s; torch 2.13.0.",
        "```yaml\nstage: grpo",
    ):
        assert words in card, words
    assert str(tmp_path) not in card
    elsewhere = tmp_path / "tiny-v3"
    assert "Exported from x with" in model_card(elsewhere, "tiny", record | {"tensors": 1, "parameters": 1})
    assert short_name(elsewhere) == "tiny-v3"
    assert short_name(checkpoint) == "counting/grpo/checkpoints/step-45"
