"""Checkpoints in DeepSeek-V3's FP8 layout, in and out: values to the bit, files, memory, adapters, the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp8_checkpoints import FP8_SECTION, PROJECTION, TABLE, expected, write_fp8_checkpoint
from safetensors.torch import load_file, save_file
from stage_commands import ROOT, run
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data.chat import build_tokenizer
from posttrain.export import ExportOptions, companions, export, main, parse_size
from posttrain.export_check import _what_to_load, probe, transformers_scores
from posttrain.model import checkpoint_files, fp8, lora
from posttrain.model.adapter_deltas import AdapterDeltas
from posttrain.model.load import load_policy, load_tokenizer, save_policy
from posttrain.model.mtp import has_mtp, load_mtp
from posttrain.recipe import RecipeError
from posttrain.recipe_file import check_files, load_recipe

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8_checkpoint(tmp_path_factory.mktemp("published") / "tiny-v3")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """By the index, which must say of each tensor where it is, and of no other."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
    assert {name: file for file, found in files.items() for name in found} == index["weight_map"]
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    if index["metadata"]:
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def exported(source: Path, out: Path, target: Any, **options: Any) -> dict[str, torch.Tensor]:
    export(ExportOptions(source, out, target, max_shard_bytes=options.pop("max_shard_bytes", 400_000), **options))
    assert not out.with_name(out.name + ".partial").exists()
    return tensors_of(out)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_all_bytes_of_e4m3_are_dequantized_as_the_format_says() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(1, 2).view(1, 512)
    scales = torch.tensor([[1.0, 0.1, 3e-5, 700.0]])
    found = fp8.dequantize(weight, scales)
    assert torch.equal(found.nan_to_num(1e9), expected(weight, scales, torch.float32).nan_to_num(1e9))
    assert found[0, 0x7E].item() == 448.0 and found[0, 1].item() == 2.0**-9


def test_quantized_values_are_the_nearest_there_are() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 300) * torch.logspace(-6, 4, 300)
    weight[128:, 128:256] = 0.0
    weight[:3, :3] = 1e-44  # less than float32's smallest normal number
    found, scales = fp8.quantize(weight.bfloat16())
    assert found.shape == weight.shape and scales.shape == (2, 3) and scales[1, 1] == 1.0
    grid = np.unique(TABLE[np.isfinite(TABLE)])
    for row in range(2):
        for column in range(3):
            place = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            wanted = weight.bfloat16()[place].double().numpy() / scales[row, column].double().item()
            nearest = np.abs(wanted[..., None] - grid).min(-1)
            error = np.abs(TABLE[found[place].view(torch.uint8).numpy()] - wanted)
            assert (error <= nearest + 1e-6 * np.abs(wanted)).all()
            assert np.abs(TABLE[found[place].view(torch.uint8).numpy()]).max() in (448.0, 0.0)
    assert torch.equal(fp8.quantize(fp8.dequantize(found, scales))[0].view(torch.uint8), found.view(torch.uint8))
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"has 1 x 2 blocks .* of shape \(2, 1\)"):
        fp8.dequantize(torch.zeros(5, 129).to(fp8.E4M3), torch.ones(2, 1))


def test_why_transformers_does_not_dequantize_them_here() -> None:
    """It takes 576 rows of five scales for an error and 192 rows of two for blocks of 96. When it does not, use it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    theirs = Fp8Dequantize(None)
    with pytest.raises(ValueError, match="not divisible"):
        theirs._dequantize_one(torch.ones(576, 128).to(fp8.E4M3), torch.ones(5, 1))
    weight, scales = torch.ones(192, 128).to(fp8.E4M3), torch.tensor([[1.0], [2.0]])
    assert fp8.dequantize(weight, scales)[100, 0] == 1.0
    assert theirs._dequantize_one(weight, scales)[100, 0] == 2.0


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_dequantized_to_the_bit(published: Path, tmp_path: Path, target: str, dtype: torch.dtype) -> None:
    before = tensors_of(published)
    found = exported(published, tmp_path / "out", target)
    assert set(found) == {name for name in before if not name.endswith("_scale_inv")}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 4
    for name, tensor in found.items():
        if PROJECTION.search(name):
            wanted = expected(before[name], before[f"{name}_scale_inv"], dtype)
        else:
            wanted = before[name] if name.endswith(BIAS) else before[name].to(dtype)
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    assert sum(bool(PROJECTION.search(name)) for name in found) == 72
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 1
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.") and "dtype" not in config
    assert {path.name for path in companions(published)} >= {"tokenizer.json", "chat_template.jinja"}
    for file in companions(published):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    experts = policy.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(experts[3, 32:], found["model.layers.1.mlp.experts.3.up_proj.weight"])
    module = load_mtp(policy, tmp_path / "out")
    assert torch.equal(module.eh_proj.weight, found["model.layers.2.eh_proj.weight"])


def test_there_and_back(published: Path, tmp_path: Path) -> None:
    """FP8 stays as it is; through float32 every byte comes back, through bfloat16 too, with scales rounded like it."""
    before = tensors_of(published)
    copied = exported(published, tmp_path / "copy", "fp8")
    assert copied.keys() == before.keys()
    for name, tensor in copied.items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert json.loads((tmp_path / "copy/config.json").read_text()) == json.loads(
        (published / "config.json").read_text()
    )
    for target, tolerance in (("float32", 2.0**-23), ("bf16", 2.0**-8)):
        exported(published, tmp_path / target, target)
        again = exported(tmp_path / target, tmp_path / f"{target}-fp8", "fp8")
        assert {name: t.dtype for name, t in again.items()} == {name: t.dtype for name, t in before.items()}
        for name, tensor in again.items():
            if name.endswith("_scale_inv"):
                torch.testing.assert_close(tensor, before[name], rtol=tolerance, atol=0.0)
            else:
                assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
        assert json.loads((tmp_path / f"{target}-fp8/config.json").read_text())["quantization_config"] == FP8_SECTION


def test_without_the_prediction_module(published: Path, tmp_path: Path) -> None:
    found = exported(published, tmp_path / "out", "bf16", drop_mtp=True)
    assert not any(".layers.2." in name for name in found) and any(".layers.1." in name for name in found)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not has_mtp(tmp_path / "out")
    with pytest.raises(ValueError, match="no prediction module to drop"):
        exported(tmp_path / "out", tmp_path / "again", "bf16", drop_mtp=True)


def test_an_interrupted_export_goes_on(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exported(published, tmp_path / "whole", "bf16")
    write, count = checkpoint_files.write_shard, 0

    def dies(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        count += 1
        if count == 3:
            path.with_suffix(".partial").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(checkpoint_files, "write_shard", dies)
    options = ["--max-shard-size", "400KB"]
    assert main([str(published), str(tmp_path / "out"), *options]) == 130
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(kept) == 2
    assert main([str(published), str(tmp_path / "out"), *options]) == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()) and found.keys() == whole.keys()
    assert not list((tmp_path / "out").glob("*.partial"))
    # Files of another export are no use to this one.
    count = 1
    assert main([str(published), str(tmp_path / "other"), *options]) == 130
    exported(published, tmp_path / "other", "float32")


def test_what_cannot_be_exported_is_said(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: Path, message: str, out: str = "out", target: Any = "bf16") -> None:
        with pytest.raises(ValueError, match=message):
            export(ExportOptions(source, tmp_path / out, target))
        assert not (tmp_path / "out").exists()

    def broken(name: str, **changes: Any) -> Path:
        """A copy with one file, whose tensors and config are changed; None leaves one out."""
        directory = tmp_path / name
        directory.mkdir()
        tensors = tensors_of(published) | changes
        save_file({key: value for key, value in tensors.items() if value is not None}, directory / "model.safetensors")
        (directory / "config.json").write_text((published / "config.json").read_text())
        return directory

    weight = "model.layers.1.self_attn.o_proj.weight"
    refused(tmp_path / "nowhere", "is no directory")
    refused(tmp_path, "has no config.json")
    refused(published, "exists; give a new directory", out=".")
    refused(broken("a", **{f"{weight}_scale_inv": None}), "is FP8 and has no _scale_inv beside it")
    refused(broken("b", **{weight: None}), "has no weight beside it")
    refused(broken("c", **{f"{weight}_scale_inv": torch.ones(1, 1)}), r"is of shape \(1, 1\); blocks of \(128, 128\)")
    refused(broken("d", **{weight: torch.ones(160, 128, dtype=torch.int8)}), "int8 with scales; only e4m3 is read")
    plain = broken("e")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    refused(plain, "is FP8 and config.json has no quantization_config")
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    refused(plain, "quantization_config says 'awq'")
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:5000])
    refused(plain, "a .safetensors file cannot be read: .*header")
    incomplete = broken("f")
    index = {"weight_map": {weight: "model-00009-of-000009.safetensors"}}
    (incomplete / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(incomplete, "model-00009-of-000009.safetensors, which the index names, is not there")
    qwen = Qwen3ForCausalLM(Qwen3Config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8))
    qwen.save_pretrained(tmp_path / "qwen")
    refused(tmp_path / "qwen", "a qwen3 in FP8: the layout written is DeepSeek-V3's", target="fp8")
    assert main([str(tmp_path / "qwen"), str(tmp_path / "qwen-out")]) == 0
    assert main([str(tmp_path / "qwen"), str(tmp_path / "qwen-out")]) == 2
    assert "exists; give a new directory" in capsys.readouterr().err
    assert (parse_size("5GB"), parse_size("1.5 kb"), parse_size("7")) == (5 * 10**9, 1500, 7)
    with pytest.raises(ValueError, match="'much': write a number"):
        parse_size("much")


def test_the_tokenizer_goes_along(published: Path, tmp_path: Path) -> None:
    exported(published, tmp_path / "out", "bf16")
    chat = [{"role": "user", "content": "2+2?"}]
    ours, theirs = load_tokenizer(str(tmp_path / "out")), load_tokenizer(str(published))
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


# --- training ---------------------------------------------------------------------------------------------------------


def test_fp8_is_not_trained_as_it_is(published: Path, tmp_path: Path) -> None:
    command = f"python -m posttrain.export {published} OUT --format bf16"
    settings: dict[str, Any] = {"dtype": "float32", "attn_implementation": "sdpa", "experts_implementation": "eager"}
    with pytest.raises(ValueError, match=command):
        load_policy(str(published), **settings, trust_remote_code=False)
    file = tmp_path / "sft.yaml"
    data = "datasets: [{task: letter_counting, levels: [1], size: 10}]\ntraining: {max_steps: 1}"
    file.write_text(f"stage: sft\nmodel: {{model_name_or_path: {published}}}\n{data}\n")
    with pytest.raises(RecipeError, match=command):
        check_files(load_recipe(file), file)


@pytest.mark.slow
def test_an_fp8_checkpoint_is_trained_and_comes_out_in_both_formats(published: Path, tmp_path: Path) -> None:
    """In as FP8, four SFT steps with its prediction module, out as bfloat16, which vLLM and transformers load, and as FP8."""
    exported(published, tmp_path / "in", "bf16")
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(f"""
stage: sft
model: {{model_name_or_path: {tmp_path / "in"}}}
datasets: [{{task: letter_counting, levels: [1], size: 100}}]
training: {{max_length: 128, per_device_train_batch_size: 4, max_steps: 4, logging_steps: 1}}
optimizer: {{learning_rate: 1.0e-3}}
mtp: {{init: checkpoint, loss_weight: 0.1}}
""")
    code, output = run("posttrain.sft", str(recipe), f"output_dir={tmp_path / 'run'}")
    assert code == 0, output
    trained = tmp_path / "run/checkpoints/latest"
    weights = tensors_of(trained)
    start = tensors_of(tmp_path / "in")
    assert weights.keys() == start.keys()
    moved = [
        name for name in start if PROJECTION.search(name) and not torch.equal(weights[name].bfloat16(), start[name])
    ]
    assert any(".layers.2." in name for name in moved) and any(".experts.7." in name for name in moved)
    code, output = run("posttrain.export", str(trained), str(tmp_path / "bf16"), "--check")
    assert code == 0, output
    assert "check: passed; transformers and vLLM loaded it (bf16 weights)" in output, output
    record = json.loads((tmp_path / "bf16/export.json").read_text())
    assert record["source"] == "run/checkpoints/step-4" and record["mtp"] and str(tmp_path) not in json.dumps(record)
    check = record["check"]
    assert check["gap_max"] < 1e-3 and check["same_greedy"] == check["continuations"] == 4
    assert 0 < check["drift_mean"] < 0.05  # what bfloat16 did to float32 weights
    card = (tmp_path / "bf16/README.md").read_text()
    assert "supervised fine-tuning" in card and "agree within" in card and str(tmp_path) not in card
    for name, tensor in tensors_of(tmp_path / "bf16").items():
        assert torch.equal(tensor, weights[name] if name.endswith(BIAS) else weights[name].bfloat16()), name
    found = exported(trained, tmp_path / "fp8", "fp8")
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in tensors_of(published).items()}
    for name, tensor in found.items():
        if PROJECTION.search(name):
            again = expected(tensor, found[f"{name}_scale_inv"], torch.float32)
            # Half a step of three bits of mantissa, or of the smallest numbers of the block.
            limit = (weights[name].abs() / 16).clamp(min=2.0**-10 * weights[name].abs().max() / 448)
            assert ((again - weights[name]).abs() <= limit * 1.001).all(), name
    plain, _, compute, words = _what_to_load(tmp_path / "fp8", "fp8", tmp_path / "scratch")
    assert compute == "float32" and "dequantized" in words
    scores = transformers_scores(plain, probe(plain), "float32")
    assert all(np.isfinite(scores.logprobs[0])) and len(scores.greedy) == 4


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from posttrain.export import ExportOptions, export
from posttrain.model import checkpoint_files, conversion  # what export imports, so that it is in the baseline
import posttrain.model_card, torch

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

grown, before = {}, 0
for source, out, target in zip(*[iter(sys.argv[2:])] * 3):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    export(ExportOptions(Path(source), Path(out), target, max_shard_bytes=int(sys.argv[1])))
    grown[out] = status("VmHWM") - before
    before = before or status("VmRSS")  # after the first, a small one that brings in the code
print(json.dumps(grown))
"""
SHARD = 32 * 2**20


def write_large(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> Path:
    """Six files of experts, 32 MiB each."""
    directory.mkdir()
    expert, weight_map = torch.randn(512, 1024).to(dtype), {}
    for number in range(6):
        weights: dict[str, torch.Tensor] = {}
        for part in range(SHARD // expert.nbytes):
            name = f"model.layers.{number}.mlp.experts.{part}.up_proj.weight"
            weights[name] = expert.clone()
            if dtype == torch.float8_e4m3fn:
                weights[f"{name}_scale_inv"] = torch.rand(4, 8)
        file = f"model-{number + 1:05d}-of-000006.safetensors"
        save_file(weights, directory / file)
        weight_map |= dict.fromkeys(weights, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    return directory


def test_memory_stays_below_two_files(published: Path, tmp_path: Path) -> None:
    """Peak resident memory of a process, above what it has after a small export, against the size of a file."""
    config = json.loads((published / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    sources = {
        "bf16": write_large(tmp_path / "fp8", config, torch.float8_e4m3fn),
        "fp8": write_large(tmp_path / "bf16", plain, torch.bfloat16),
    }
    words = [sys.executable, "-c", MEASURE, str(SHARD), str(published), str(tmp_path / "small-out"), "float32"]
    for target, source in sources.items():
        words += [str(source), str(tmp_path / f"{target}-out"), target]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for target in sources:
        grown = found[str(tmp_path / f"{target}-out")]
        sizes = [path.stat().st_size for path in (tmp_path / f"{target}-out").glob("*.safetensors")]
        print(
            f"to {target}: grown by {grown / 2**20:.0f} MiB, files of {max(sizes) / 2**20:.0f} MiB, {len(sizes)} of them"
        )
        assert max(sizes) <= SHARD * 1.01 and sum(sizes) > 2.9 * SHARD
        assert grown < 2 * max(sizes)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_merged_adapters_are_what_peft_merges(published: Path, tmp_path: Path) -> None:
    start = exported(published, tmp_path / "base", "float32", drop_mtp=True)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = lora.apply_lora(policy, r=4, alpha=8, dropout=0.0, targets=None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapter = tmp_path / "adapter"
    lora.save_adapter(adapted, adapter)
    merged = exported(tmp_path / "base", tmp_path / "merged", "float32", adapter=adapter)
    (tmp_path / "peft").mkdir()
    save_policy(lora.merge(adapted), build_tokenizer(), tmp_path / "peft")
    wanted = load_file(tmp_path / "peft/model.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {name for name in start if PROJECTION.search(name)}
    # Onto the FP8 checkpoint: dequantized, added, quantized anew; what has no adapter stays as it is, to the bit.
    before = tensors_of(published)
    into = exported(published, tmp_path / "fp8", "fp8", adapter=adapter)
    for name in changed:
        again = expected(into[name], into[f"{name}_scale_inv"], torch.float32)
        torch.testing.assert_close(again, wanted[name], rtol=1 / 15, atol=float(wanted[name].abs().max()) / 448 / 500)
    for name in before.keys() - changed - {f"{name}_scale_inv" for name in changed}:
        assert torch.equal(into[name].view(torch.uint8), before[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="holds no adapters"):
        AdapterDeltas(tmp_path / "base", tmp_path / "base")
    narrow = json.loads((tmp_path / "base/config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow/config.json").write_text(json.dumps(narrow))
    with pytest.raises(ValueError, match="these adapters are not for"):
        AdapterDeltas(adapter, tmp_path / "narrow")
