"""The learned reward model: its loss, its files, its scores, and the stage as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_commands import metrics, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data.chat import build_tokenizer
from data.pairs import Pair, task_pairs
from posttrain.errors import RunStopped
from posttrain.model.router import find_routers
from posttrain.ranks import join_ranks
from posttrain.recipe import RecipeError, RewardModelRecipe
from posttrain.recipe_file import load_recipe
from posttrain.reward_data import encode_pairs, require_visible_answers, set_pad_token, split_by_prompt
from posttrain.reward_metrics import ScoredPair, measure
from posttrain.reward_parts import build_trainer, load_job, reload_gap
from posttrain.reward_trainer import RewardModelTrainer
from posttrain.run_dir import RunDir
from rewards.forms import form_of
from rewards.learned import NORMALIZATION, encode, load, raw_scores, read_reward_model, score


def recipe_for(path: Path, out: Path, **changes: Any) -> RewardModelRecipe:
    tree: dict[str, Any] = {
        "run_name": "test",
        "output_dir": str(out),
        "model": {"model_name_or_path": str(path)},
        "datasets": [{"task": "letter_counting", "levels": [1], "size": 64}],
        "training": {"max_length": 96, "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
        "validation": {"datasets": [{"task": "letter_counting", "levels": [1], "size": 24}]},
    }
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return RewardModelRecipe.model_validate(tree)


def trainer_for(recipe: RewardModelRecipe) -> tuple[RewardModelTrainer, Any]:
    job = load_job(recipe, None, join_ranks())
    return build_trainer(recipe, RunDir(recipe.run_dir), job), job


@pytest.fixture(scope="module")
def reward_path(policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model after a few steps, as the stage saves it."""
    out = tmp_path_factory.mktemp("reward")
    recipe = recipe_for(policy_path, out, training={"max_steps": 4})
    trainer, _ = trainer_for(recipe)
    trainer.train()
    return trainer.save_last(measure(trainer.score_held_out())["normalization"])


# ---- the loss


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_loss_of_a_batch_is_bradley_terry_with_margin(policy_path: Path, tmp_path: Path, centre: float) -> None:
    recipe = recipe_for(policy_path, tmp_path, training={"center_rewards_coefficient": centre, "head_init_std": 1.0})
    trainer, job = trainer_for(recipe)
    margins = [0.0, 0.5, 2.0, 1.0]
    rows = [{**pair.row(), "margin": m} for pair, m in zip(job.pairs.train, margins, strict=False)]
    with torch.no_grad():
        loss = trainer.compute_loss(job.model, trainer.data_collator(rows))
    expected = 0.0
    for row in rows:
        chosen, rejected = (one_by_one(job.model, row[side]) for side in ("chosen_ids", "rejected_ids"))
        expected += math.log1p(math.exp(-(chosen - rejected - row["margin"]))) / 4
        expected += centre * (chosen + rejected) ** 2 / 4
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - math.log(2)) > 0.1  # the scores do differ


def one_by_one(model: Any, ids: list[int]) -> float:
    """The head's value of the last token's state, by hand: no batch, no padding, no pooling."""
    with torch.no_grad():
        state_H = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(model.score.weight[0] @ state_H)


def test_accumulated_microbatches_step_like_one_batch(policy_path: Path, tmp_path: Path) -> None:
    norms = []
    for size, accumulated in ((8, 1), (2, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer, _ = trainer_for(recipe_for(policy_path, tmp_path / str(size), training=training))
        trainer.train()
        logged = trainer.state.log_history[0]
        norms.append((logged["loss"], logged["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_step_trains_experts_and_head_and_leaves_the_correction_bias(policy_path: Path, tmp_path: Path) -> None:
    trainer, job = trainer_for(recipe_for(policy_path, tmp_path))
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    assert float(before["score.weight"].std()) == pytest.approx(0.01, rel=0.3)
    trainer.train()
    after = job.model.state_dict()
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert still == {name for name in after if name.endswith("e_score_correction_bias")}
    assert all(bool(router.e_score_correction_bias.any()) for router in find_routers(job.model))


# ---- files


def test_the_saved_model_scores_as_the_trained_one(policy_path: Path, tmp_path: Path) -> None:
    recipe = recipe_for(policy_path, tmp_path, training={"max_steps": 3})
    trainer, job = trainer_for(recipe)
    trainer.train()
    scored = trainer.score_held_out()
    path = trainer.save_last(measure(scored)["normalization"])
    loaded = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = [pair.chosen_ids for pair in job.pairs.held_out]
    assert raw_scores(loaded, ids, 8) == pytest.approx([pair.chosen for pair in scored], abs=1e-6)
    experts = "model.layers.1.mlp.experts."
    base, saved = load_file(policy_path / "model.safetensors"), load_file(path / "model.safetensors")
    assert any(name.startswith(experts) and not torch.equal(base[name], saved[name]) for name in saved if name in base)
    assert (tmp_path / "checkpoints" / "latest").resolve() == path.resolve()
    # Experts that stayed what they were are noticed.
    spoilt = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        spoilt.model.layers[1].mlp.experts.down_proj.mul_(1.5)
    spoilt.save_pretrained(tmp_path / "spoilt")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "spoilt")
    assert reload_gap(path, scored, job, recipe) < 1e-6
    with pytest.raises(RunStopped, match="weights were lost on the way"):
        reload_gap(tmp_path / "spoilt", scored, job, recipe)


def test_a_dense_policy_of_another_family_becomes_a_reward_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 107, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    trainer, job = trainer_for(recipe_for(tmp_path / "dense", tmp_path / "run"))
    trainer.train()
    scored = trainer.score_held_out()
    path = trainer.save_last(None)
    found = raw_scores(read_reward_model(str(path), "eager").model, [p.chosen_ids for p in job.pairs.held_out], 5)
    assert found == pytest.approx([pair.chosen for pair in scored], abs=1e-6)


def test_a_checkpoint_that_lacks_weights_is_refused(policy_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(policy_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((policy_path / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight, which would be random"):
        trainer_for(recipe_for(tmp_path, tmp_path / "run"))
    with pytest.raises(ValueError, match="is no reward model: it lacks"):
        load(str(policy_path))


# ---- scores

PROMPTS = ["e in sleepless?", "a in apple?", "s in pals?", "l in leap?"]
TEXTS = ["<think>s0l0e1</think><answer>1</answer>", "<answer>4</answer>", "", "<think>" + "s0" * 40 + "</think>"]


def learned(path: Path, texts: list[str] = TEXTS, **options: Any) -> list[float]:
    metadata = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[: len(texts)]]
    return score(texts, [None] * len(texts), metadata, model=str(path), **options)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_padding_and_batches_do_not_change_a_score(reward_path: Path, experts: str) -> None:
    together = learned(reward_path, normalize=False, experts_implementation=experts)
    assert max(together) - min(together) > 1e-3
    for batch_size in (1, 2, 3):
        found = learned(reward_path, normalize=False, batch_size=batch_size, experts_implementation=experts)
        assert found == pytest.approx(together, abs=1e-5)
    assert learned(reward_path, TEXTS[:1], normalize=False) == pytest.approx(together[:1], abs=1e-5)
    rm = load(str(reward_path), experts)
    for prompt, text, value in zip(PROMPTS, TEXTS, together, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        assert one_by_one(rm.model, encode(rm.tokenizer, chat)) == pytest.approx(value, abs=1e-5)


def test_normalised_scores_of_held_out_answers_have_mean_0_and_deviation_1(reward_path: Path) -> None:
    pairs = task_pairs("letter_counting", [1], "eval", 24, seed=0)
    prompts = [{"messages": [dict(message) for message in pair.chosen[:-1]]} for pair in pairs]
    texts = [side[-1]["content"] for pair in pairs for side in (pair.chosen, pair.rejected)]
    metadata = [prompt for prompt in prompts for _ in range(2)]
    found = torch.tensor(score(texts, [None] * 48, metadata, model=str(reward_path)), dtype=torch.float64)
    assert float(found.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-4)
    raw = torch.tensor(score(texts, [None] * 48, metadata, model=str(reward_path), normalize=False))
    kept = json.loads((reward_path / NORMALIZATION).read_text())
    assert kept["n"] == 48 and kept["mean"] == pytest.approx(float(raw.mean()), abs=1e-5)


def test_a_reward_model_is_loaded_once_and_says_what_it_lacks(reward_path: Path, tmp_path: Path) -> None:
    assert form_of(score) == "batch"
    assert load(str(reward_path)) is load(str(reward_path))
    with pytest.raises(ValueError, match="metadata `messages`"):
        score(["x"], [None], [{}], model=str(reward_path))
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        learned(reward_path, batch_size=0)
    with pytest.raises(ValueError, match="more than the reward model's 512"):
        learned(reward_path, ["s" * 600])
    for file in reward_path.iterdir():
        if file.name != NORMALIZATION:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="middle of a run"):
        learned(tmp_path)
    assert learned(tmp_path, normalize=False) == learned(reward_path, normalize=False)


# ---- what the scores are worth


def scored(
    chosen: float, rejected: float, kind: str = "a", lengths: tuple[int, int] = (5, 5), **rest: Any
) -> ScoredPair:
    return ScoredPair(chosen, rejected, rest.pop("margin", 0.0), kind, *lengths, **rest)


def test_measurements_by_hand() -> None:
    logit = math.log(3)  # sigmoid gives 3/4
    pairs = [
        scored(logit, 0, "a", (5, 7), chosen_right=True, rejected_right=False),
        scored(0, logit, "a", (6, 4), chosen_right=True, rejected_right=False),
        scored(logit, 0, "b", (7, 7), margin=logit, chosen_right=True),
        scored(0, 0, "b", (8, 8)),
    ]
    found = measure(pairs)
    assert found["accuracy"]["value"] == 0.5 and found["accuracy"]["n"] == 4
    assert found["accuracy"]["low"] < 0.5 < found["accuracy"]["high"]
    assert {kind: of["value"] for kind, of in found["by_kind"].items()} == {"a": 0.5, "b": 0.5}
    assert found["loss"] == pytest.approx((math.log(4 / 3) + math.log(4) + 2 * math.log(2)) / 4)
    assert found["calibration"]["brier"] == pytest.approx((1 / 16 + 9 / 16 + 1 / 16 + 1 / 4) / 4)
    # Bins: three of confidence 3/4 with two right, one of confidence 1/2 with none.
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(3 / 4 * (3 / 4 - 2 / 3) + 1 / 4 * 1 / 2)
    assert found["length"]["accuracy_rejected_longer"]["value"] == 1.0
    assert found["length"]["accuracy_rejected_shorter"]["value"] == 0.0
    assert found["length"]["accuracy_rejected_same"]["n"] == 2
    # Right: log 3, 0, log 3; wrong: 0, log 3. Of six comparisons two are won, three tied, one lost.
    assert found["verifier"] == {"auc": pytest.approx(3.5 / 6), "right": 3, "wrong": 2}
    assert found["normalization"]["mean"] == pytest.approx(3 * logit / 8) and found["normalization"]["n"] == 8


def test_length_bias_is_a_rank_correlation_within_each_side() -> None:
    pairs = [scored(float(n**3), -float(n), lengths=(n, n)) for n in range(1, 9)]
    found = measure(pairs)["length"]
    assert found["correlation_chosen"] == pytest.approx(1) and found["correlation_rejected"] == pytest.approx(-1)
    assert measure([scored(1, 0), scored(2, 0)])["length"]["correlation_chosen"] is None  # all of one length
    assert measure([scored(1, 0)])["verifier"] is None


# ---- pairs to tokens


def test_pairs_that_cannot_be_used_are_counted_and_never_cut() -> None:
    tokenizer = build_tokenizer()
    user = {"role": "user", "content": "e"}
    texts = [("a", "b"), ("a" * 50, "b"), ("é", "ü")]  # the last two are both one unknown token
    pairs = [
        Pair(str(n), (user, {"role": "assistant", "content": a}), (user, {"role": "assistant", "content": b}))
        for n, (a, b) in enumerate(texts)
    ]
    kept, counts = encode_pairs(tokenizer, pairs, max_length=20)
    assert [pair.pair.id for pair in kept] == ["0"]
    assert (counts.pairs, counts.kept, counts.too_long, counts.same_tokens) == (3, 1, 1, 1)
    assert tokenizer.decode(kept[0].chosen_ids) == "<bos><|user|>e<|assistant|>a<eos>"


def test_prompts_are_held_out_with_all_their_pairs() -> None:
    pairs = task_pairs("letter_counting", [1], "train", 200, seed=0)
    pairs += task_pairs("letter_counting", [1], "train", 200, seed=0, kinds=["format"])
    train, held_out = split_by_prompt(pairs, 0.25, seed=0)
    assert len(train) + len(held_out) == 400 and 60 < len(held_out) < 140
    assert not {pair.chosen[0]["content"] for pair in train} & {pair.chosen[0]["content"] for pair in held_out}


def test_a_template_that_hides_the_reasoning_is_refused() -> None:
    tokenizer = build_tokenizer()
    pairs = task_pairs("letter_counting", [1], "train", 3, seed=0)
    require_visible_answers(tokenizer, pairs)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}{% endfor %}<eos>"
    )
    with pytest.raises(RunStopped, match="does not write all that the assistant says"):
        require_visible_answers(tokenizer, pairs)


def test_the_padding_token_must_be_its_own() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<eos>"
    with pytest.raises(RunStopped, match="they must differ"):
        set_pad_token(tokenizer, None)
    with pytest.raises(RunStopped, match="'<nope>' is not in the vocabulary"):
        set_pad_token(tokenizer, "<nope>")
    set_pad_token(tokenizer, "<unk>")
    assert tokenizer.pad_token_id == tokenizer.get_vocab()["<unk>"]


# ---- the stage

STAGE = """
stage: reward_model
model: {{model_name_or_path: {path}}}
datasets: [{{task: letter_counting, levels: [1], size: 400, kinds: [format, skipped]}}]
training: {{max_length: 96, max_steps: 30, per_device_train_batch_size: 8, logging_steps: 5}}
optimizer: {{learning_rate: 3.0e-3, lr_scheduler_type: constant}}
validation: {{datasets: [{{task: letter_counting, levels: [1], size: 60, kinds: [format, skipped]}}], eval_steps: 10}}
checkpoint: {{save_steps: 10}}
"""


@pytest.fixture
def recipe_file(policy_path: Path, tmp_path: Path) -> Path:
    file = tmp_path / "rm.yaml"
    file.write_text(STAGE.format(path=policy_path))
    return file


def test_the_stage_trains_measures_saves_and_resumes(recipe_file: Path, tmp_path: Path) -> None:
    import shutil

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, output = run("posttrain.reward_model", str(recipe_file), f"output_dir={whole}")
    assert code == 0, output
    assert "held-out pairs" in output and "Brier score" in output
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 30
    held_out = summary["held_out"]
    assert held_out["accuracy"]["n"] == 60 and set(held_out["by_kind"]) == {"format", "skipped"}
    assert held_out["accuracy"]["low"] > 0.5
    assert held_out["reload_gap"] < 1e-6
    assert {"right", "wrong", "auc"} == set(held_out["verifier"])
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[1]["validation/loss"] > lines[-1]["validation/loss"]
    assert lines[-1]["validation/accuracy"] == pytest.approx(held_out["accuracy"]["value"])
    latest = whole / "checkpoints" / "latest"
    assert json.loads((latest / "config.json").read_text())["architectures"] == ["DeepseekV3ForSequenceClassification"]
    assert (latest / NORMALIZATION).exists() and (whole / "samples" / "held-out.parquet").exists()
    # As if the machine had died after step 20.
    shutil.copytree(whole, halves, symlinks=True)
    shutil.rmtree(halves / "checkpoints" / "step-30")
    code, output = run("posttrain.reward_model", str(recipe_file), f"output_dir={halves}", "--resume")
    assert code == 0, output
    expected = load_file(latest / "model.safetensors")
    found = load_file(halves / "checkpoints" / "latest" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert [line["step"] for line in metrics(halves)] == [5, 10, 15, 20, 25, 30]


MALFORMED = [
    ("training={}", "exactly one of max_steps and num_train_epochs"),
    ("training.packing=true", "unknown key"),
    ("training.max_seq_length=9", "did you mean 'training.max_length'"),
    ("training.head_init_std=0", "greater than 0"),
    ("training.center_rewards_coefficient=-1", "greater than or equal to 0"),
    ("validation=null", "validation"),
    ("validation={}", "exactly one of datasets (held-out pairs) and fraction"),
    ("validation={fraction: 1}", "less than 1"),
    ("validation={datasets: [{path: a/b, weight: 2}]}", "weight=2.0 has no meaning here"),
    ("datasets.0={task: chain_sum, size: 4, kinds: [typo]}", "'answer', 'step', 'carried'"),
    ("datasets.0={task: chain_sum, size: 4, kinds: [step, step]}", "name each once"),
    ("datasets.0={task: chain_sum, size: 4, kinds: []}", "at least 1 item"),
    ("datasets.0={path: a/b, kinds: [step]}", "has no meaning here"),
    ("datasets.0={path: a/b, worked_fraction: 0.5}", "has no meaning here"),
    ("model={build: {}}", "a reward model needs a checkpoint"),
    ("model.dtype=bfloat16", "set training.bf16"),
    ("router.freeze=true", "unknown key"),
]


@pytest.mark.parametrize(("override", "words"), MALFORMED)
def test_a_wrong_recipe_is_refused_in_one_line(recipe_file: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_file, [override], stage="reward_model")
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("validation.datasets.0.levels=[9]", "validation.datasets.0.levels: letter_counting has no level 9"),
        ("datasets.0={path: missing.jsonl}", "give a path that does"),
        ("model.model_name_or_path=./nowhere", "give a path that does"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_loaded(
    recipe_file: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.reward_model import main

    assert main([str(recipe_file), override]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_a_dry_run_spells_out_the_batch(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.reward_model import main

    assert main([str(recipe_file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "8 pairs x 1 accumulated = 8 pairs, so 16 chats" in printed
    assert "held out    task letter_counting, level 1, 60 records, measured every 10 steps and at the end" in printed
