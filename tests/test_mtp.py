"""Multi-token prediction: the loss against a loop without packing, files, and vLLM's drafting against our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from data.chat import build_tokenizer
from eval import speculation
from eval.speculation import Answers, answer, compare, pooled_rate
from posttrain.model import mtp_files
from posttrain.model.load import build_policy, save_policy, set_experts_implementation
from posttrain.model.mtp import (
    MtpModule,
    build_mtp,
    copy_mtp,
    has_mtp,
    load_mtp,
    mtp_loss,
    mtp_tensors,
    next_embeddings,
    same_sample,
    save_mtp,
)
from posttrain.model.router import find_routers
from posttrain.recipe import BuildSection, ModelSection, SamplerSection
from posttrain.sampler import SpeculationCount, require_exact
from posttrain.types import Prompt, SamplingParams

BUILD = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
MTP_PREFIX = "model.layers.2."
LENGTHS = (7, 1, 5, 2, 9, 3)  # of the samples: some too short for any loss
IGNORED = -100


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, MtpModule]:
    """A random trunk and a module that differs from its start in every part."""
    policy = build_policy(BuildSection(**BUILD).model_dump(), build_tokenizer(), seed)
    set_experts_implementation(policy, "eager")
    policy = policy.to(dtype)
    # What stays float32 in a checkpoint loaded with another type.
    policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config)
    for router in find_routers(policy):
        router.e_score_correction_bias = torch.linspace(-0.05, 0.0501, 8)
    mtp = build_mtp(policy)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in mtp.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        find_routers(mtp)[0].e_score_correction_bias += 0.01
    return policy, mtp


# --- the loss ---------------------------------------------------------------------------------------------------------


def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels; about half of the labels are trained."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in LENGTHS:
        ids_W = torch.randint(5, 100, (length,), generator=generator)
        rows.append((ids_W, ids_W.where(torch.rand(length, generator=generator) < 0.6, IGNORED)))
    return rows


def packed(width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The samples in two rows: ids, positions, labels, [2, W]. Padding has id 0, position 0 and no label."""
    ids, positions, labels = (torch.full((2, width), fill) for fill in (0, 0, IGNORED))
    place = [0, 0]
    for turn, (ids_W, labels_W) in enumerate(samples()):
        row = 0 if turn < 4 else 1
        span = slice(place[row], place[row] + len(ids_W))
        ids[row, span], labels[row, span], positions[row, span] = ids_W, labels_W, torch.arange(len(ids_W))
        place[row] += len(ids_W)
    assert place == [15, 12]
    return ids, positions, labels


def loss_of(policy: Any, mtp: MtpModule, rows: Sequence[torch.Tensor], **options: bool) -> tuple[torch.Tensor, int]:
    ids, positions, labels = rows
    hidden = policy.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    trunk = policy.model
    loss, count = mtp_loss(
        mtp, trunk.embed_tokens, policy.lm_head, hidden, ids, positions, labels, trunk.rotary_emb, **options
    )
    return loss, int(count)


def transformers_layer(mtp: MtpModule) -> MtpLayer:
    """The same parameters in transformers' own prediction layer."""
    layer = MtpLayer(mtp.config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, layer_idx=2).to(mtp.eh_proj.weight.dtype)
    names = {name: name.replace("mtp_block.", "block.").replace("post_norm.", "norm.") for name in layer.state_dict()}
    names = {theirs: ours.replace("block.norm.", "block.post_norm.") for theirs, ours in names.items()}
    layer.load_state_dict({theirs: mtp.state_dict()[ours] for theirs, ours in names.items()})
    return layer


def loop_loss(policy: Any, layer: MtpLayer) -> tuple[torch.Tensor, int]:
    """Sample by sample and position by position, without packing, masks or our module."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids_W, labels_W in samples():
        if len(ids_W) < 3:
            continue
        hidden_WH = policy.model(ids_W[None]).last_hidden_state[0]
        embeds_WH = policy.model.embed_tokens(ids_W)
        rows = len(ids_W) - 2
        successors_WH = torch.cat([torch.zeros_like(embeds_WH[:1]), embeds_WH[2 : rows + 1]])
        # transformers numbers a row by its token, vLLM and we by its hidden state.
        positions = torch.arange(1, rows + 1)[None]
        states = layer(
            successors_WH[None],
            hidden_WH[None, :rows],
            position_embeddings=policy.model.rotary_emb(hidden_WH, positions),
            attention_mask=None,
            position_ids=positions,
            past_key_values=None,
        )[0]
        for row in range(rows):
            if labels_W[row + 2] != IGNORED:
                total = total - policy.lm_head(states[row]).double().log_softmax(-1)[labels_W[row + 2]]
                count += 1
    return total, count


def gradients(*modules: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return found


def test_same_sample_by_hand() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])  # samples of 3, 2 and 1 tokens, padding
    assert same_sample(positions, 1).int().tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
    assert same_sample(positions, 2).int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert not same_sample(positions[:, :2], 2).any()


def test_next_embeddings_by_hand() -> None:
    found = next_embeddings(
        lambda ids: ids[..., None].float(), torch.tensor([[7, 8, 9, 5, 6, 4]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    )
    assert found[0, :, 0].tolist() == [0.0, 9.0, 0.0, 0.0, 0.0, 0.0]


def test_packed_loss_and_gradient_equal_a_loop_without_packing() -> None:
    policy, mtp = build(dtype=torch.float64)
    layer = transformers_layer(mtp)
    expected, expected_count = loop_loss(policy, layer)
    expected.backward()
    trunk_gradient, layer_gradient = gradients(policy), gradients(layer)
    loss, count = loss_of(policy, mtp, packed())
    assert count == expected_count > 5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    assert len(trunk_gradient) == len(list(policy.parameters()))  # the whole trunk learns from it
    for ours, theirs in zip(gradients(policy), trunk_gradient, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    module_gradient = dict(zip([name for name, _ in mtp.named_parameters()], gradients(mtp), strict=True))
    for (name, _), theirs in zip(layer.named_parameters(), layer_gradient, strict=True):
        ours = module_gradient[
            name.replace("mtp_block.", "block.") if "mtp_block" in name else name.replace("post_", "")
        ]
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm(), name


def test_other_samples_change_nothing() -> None:
    """Other tokens in the first three samples of a row leave the loss of the fourth as it is, and its gradient."""
    policy, mtp = build()
    ids, positions, labels = packed()
    labels[0, :13], labels[1] = IGNORED, IGNORED
    ids[0, 13:18], positions[0, 13:16], labels[0, 13:16] = 40, torch.arange(3), torch.tensor([IGNORED, IGNORED, 41])
    losses = []
    for shift in (0, 7):
        ids[0, :13] += shift
        losses.append(loss_of(policy, mtp, (ids, positions, labels))[0])
    assert losses[0] > 0 and torch.equal(*losses)


def test_detached_trunk_learns_nothing_from_it() -> None:
    policy, mtp = build()
    loss, _ = loss_of(policy, mtp, packed())
    loss.backward()
    shared = (policy.model.embed_tokens.weight, policy.lm_head.weight)
    assert all(weight.grad.abs().max() > 0 for weight in shared)
    gradients(policy)
    module_gradient = gradients(mtp)
    detached, _ = loss_of(policy, mtp, packed(), detach_trunk=True)
    detached.backward()
    assert torch.equal(detached, loss)
    assert gradients(policy) == []
    for ours, theirs in zip(gradients(mtp), module_gradient, strict=True):
        assert torch.equal(ours, theirs)


def test_logits_exist_for_trained_positions_only() -> None:
    policy, mtp = build()
    seen: list[int] = []
    policy.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    _, count = loss_of(policy, mtp, packed())
    assert seen == [count]


@pytest.mark.parametrize("width", [1, 2, 5])
def test_rows_without_a_loss_give_a_zero_that_can_be_differentiated(width: int) -> None:
    policy, mtp = build()
    ids, positions = torch.full((1, width), 9), torch.arange(width)[None]
    loss, count = loss_of(policy, mtp, (ids, positions, torch.full((1, width), IGNORED)))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(parameter.grad is not None for parameter in mtp.parameters())


# --- files ------------------------------------------------------------------------------------------------------------


def save(policy: Any, directory: Path, **options: Any) -> Path:
    save_policy(policy, build_tokenizer(), directory)
    if options:
        (directory / "model.safetensors").unlink()
        policy.save_pretrained(directory, **options)
    return directory


def assert_same_module(ours: MtpModule, theirs: MtpModule) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


@pytest.mark.parametrize("sharded", [False, True])
def test_saved_module_is_loaded_bit_by_bit_and_the_trunk_too(tmp_path: Path, sharded: bool) -> None:
    policy, mtp = build(dtype=torch.bfloat16)
    save(policy, tmp_path, **({"max_shard_size": "200KB"} if sharded else {}))
    before = {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    assert not has_mtp(tmp_path)
    save_mtp(policy, mtp, tmp_path)
    assert has_mtp(str(tmp_path))
    added = {path.name for path in tmp_path.iterdir()} - before
    assert added == {"model-mtp.safetensors"} | ({"model.safetensors.index.json"} - before)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    written = load_file(tmp_path / "model-mtp.safetensors")
    assert written[f"{MTP_PREFIX}mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert written[f"{MTP_PREFIX}mlp.experts.7.down_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(written[f"{MTP_PREFIX}shared_head.head.weight"], policy.lm_head.weight)
    assert torch.equal(written[f"{MTP_PREFIX}embed_tokens.weight"], policy.model.embed_tokens.weight)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_module(load_mtp(again, tmp_path), mtp)
    assert find_routers(load_mtp(again, tmp_path))[0].e_score_correction_bias.dtype == torch.float32
    set_experts_implementation(again, "eager")
    ids = torch.arange(10, 30)[None]
    assert torch.equal(again(ids).logits, policy(ids).logits)


def test_upstream_layout(tmp_path: Path) -> None:
    """The names of DeepSeek's checkpoints, with everything in one file and no copies of embedding and head."""
    policy, mtp = build()
    save(policy, tmp_path)
    tensors = dict(mtp_tensors(policy, mtp))
    layer = ["enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head", "input_layernorm"]
    layer += [
        "post_attention_layernorm",
        "mlp.gate",
        *(f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa")),
    ]
    layer += [f"self_attn.{name}" for name in ("kv_a_layernorm", "kv_b_proj", "o_proj")]
    mlps = ["mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(8))]
    layer += [f"{place}.{kind}_proj" for place in mlps for kind in ("gate", "up", "down")]
    names = {f"{MTP_PREFIX}{name}.weight" for name in layer} | {f"{MTP_PREFIX}mlp.gate.e_score_correction_bias"}
    assert list(tensors) == sorted(names)
    assert tensors[f"{MTP_PREFIX}eh_proj.weight"].shape == (64, 128)
    fused_IH = mtp.block.mlp.experts.gate_up_proj[3]  # type: ignore[union-attr, index]
    assert torch.equal(tensors[f"{MTP_PREFIX}mlp.experts.3.gate_proj.weight"], fused_IH[:32])
    assert torch.equal(tensors[f"{MTP_PREFIX}mlp.experts.3.up_proj.weight"], fused_IH[32:])
    for copied in ("embed_tokens.weight", "shared_head.head.weight"):
        del tensors[MTP_PREFIX + copied]
    whole = tmp_path / "model.safetensors"
    save_file(
        load_file(whole) | {name: t.contiguous() for name, t in tensors.items()}, whole, metadata={"format": "pt"}
    )
    assert_same_module(load_mtp(policy, tmp_path), mtp)
    with pytest.raises(ValueError, match=r"model\.safetensors holds model\.layers\.2.* already"):
        save_mtp(policy, mtp, tmp_path)


def test_copied_module_is_unchanged_but_for_embedding_and_head(tmp_path: Path) -> None:
    policy, mtp = build()
    source, target = tmp_path / "source", tmp_path / "target"
    save_mtp(policy, mtp, save(policy, source))
    trained, _ = build(seed=5)
    save(trained, target)
    copy_mtp(source, trained, target)
    assert_same_module(load_mtp(trained, target), mtp)
    copied = load_file(target / "model-mtp.safetensors")
    assert torch.equal(copied[f"{MTP_PREFIX}embed_tokens.weight"], trained.model.embed_tokens.weight)
    assert torch.equal(copied[f"{MTP_PREFIX}shared_head.head.weight"], trained.lm_head.weight)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    trunk = load_file(target / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(trunk, "model.safetensors") | dict.fromkeys(
        copied, "model-mtp.safetensors"
    )
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in [*trunk.values(), *copied.values()])


def test_tied_head_is_written_as_well(tmp_path: Path) -> None:
    policy, mtp = build()
    policy.lm_head.weight = policy.model.embed_tokens.weight
    policy.config.tie_word_embeddings = True
    save_mtp(policy, mtp, save(policy, tmp_path))
    assert_same_module(load_mtp(policy, tmp_path), mtp)


@pytest.mark.parametrize("steps_done", [0, 1, 2])
def test_a_crash_leaves_a_loadable_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_done: int) -> None:
    """After the file is written come config, rename and index; the crash is after `steps_done` of these three."""
    policy, mtp = build()
    save(policy, tmp_path)
    write, replace = mtp_files.write_atomically, Path.replace

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    if steps_done == 1:
        monkeypatch.setattr(Path, "replace", lambda a, b: crash() if a.name.startswith("model-mtp") else replace(a, b))
    else:
        fatal = {0: "config.json", 2: "model.safetensors.index.json"}[steps_done]
        monkeypatch.setattr(
            mtp_files, "write_atomically", lambda p, text: crash() if p.name == fatal else write(p, text)
        )
    with pytest.raises(KeyboardInterrupt):
        save_mtp(policy, mtp, tmp_path)
    monkeypatch.undo()
    assert has_mtp(tmp_path) == (steps_done == 2)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, policy(ids).logits)
    save_mtp(policy, mtp, tmp_path)
    assert_same_module(load_mtp(policy, tmp_path), mtp)


def test_hub_names_are_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, mtp = build()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="'someone/tiny' is neither a checkpoint directory nor a hub model in the cache"
    ):
        has_mtp("someone/tiny")
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("a" * 40)
    save_mtp(policy, mtp, save(policy, cached / "snapshots" / ("a" * 40)))
    assert_same_module(load_mtp(policy, "someone/tiny"), mtp)


def test_start_of_a_new_module() -> None:
    """At its start the module is the trunk's last layer on the mean of the two normed inputs."""
    policy, _ = build()
    mtp = build_mtp(policy)
    ids, positions, _ = packed()
    hidden = policy.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    rms_norm = torch.nn.RMSNorm(64, eps=policy.config.rms_norm_eps)
    successors = next_embeddings(policy.model.embed_tokens, ids, positions)
    caught: list[torch.Tensor] = []
    mtp.block.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    mtp(hidden, successors, positions, policy.model.rotary_emb)
    torch.testing.assert_close(caught[0], (rms_norm(hidden) + rms_norm(successors)) / 2)
    for name, tensor in policy.model.layers[-1].state_dict().items():
        copy = mtp.block.state_dict()[name]
        assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    policy, mtp = build()
    with pytest.raises(ValueError, match="holds no saved model"):
        save_mtp(policy, mtp, tmp_path)
    save(policy, tmp_path)
    with pytest.raises(ValueError, match="holds no multi-token prediction module"):
        load_mtp(policy, tmp_path)
    qwen = Qwen3ForCausalLM(Qwen3Config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8))
    with pytest.raises(ValueError, match="this is a qwen3"):
        build_mtp(qwen)
    dense = build_policy(BuildSection(**BUILD, first_k_dense_replace=2).model_dump(), build_tokenizer(), 0)
    with pytest.raises(ValueError, match="first_k_dense_replace=2"):
        build_mtp(dense)
    save_mtp(policy, mtp, tmp_path)
    wider = build_policy(BuildSection(**BUILD | {"moe_intermediate_size": 48}).model_dump(), build_tokenizer(), 0)
    with pytest.raises(ValueError, match="not one for this trunk"):
        load_mtp(wider, tmp_path)
    file = tmp_path / "model-mtp.safetensors"
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = load_file(file)
    for extra, message in {
        f"{MTP_PREFIX}self_attn.o_proj.weight_scale_inv": "FP8",
        "model.layers.3.eh_proj.weight": "several depths",
        f"{MTP_PREFIX}surprise.weight": "not one for this trunk",
    }.items():
        save_file(tensors | {extra: torch.ones(1)}, file)
        with pytest.raises(ValueError, match=message):
            load_mtp(policy, tmp_path)
    del tensors[f"{MTP_PREFIX}mlp.experts.5.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has no mlp\.experts\.5\.up_proj"):
        load_mtp(policy, tmp_path)


# --- drafting ---------------------------------------------------------------------------------------------------------


def test_pooled_rate_by_hand() -> None:
    """Two of 4 and 6 of 6 drafts: 0.8. Residuals 2 - 3.2 and 6 - 4.8; their deviation is sqrt(2 * 1.44 / 1), the error
    of the sum sqrt(2) times that, over 10 drafts 0.24: 0.8 +- 0.47, above 1 cut off; Wilson's [0.490, 0.943] is inside."""
    rate = pooled_rate([SpeculationCount(4, 2), SpeculationCount(6, 6)])
    assert (rate.value, rate.n) == (0.8, 2)
    assert rate.low == pytest.approx(0.8 - 1.959964 * 0.24) and rate.high == 1.0
    certain = pooled_rate([SpeculationCount(50, 50)] * 2)  # no spread: Wilson's bound z^2 / (n + z^2)
    assert certain.low == pytest.approx(1 - 3.841459 / 103.841459) and certain.high == pytest.approx(1.0)
    assert (pooled_rate([SpeculationCount(50, 25)]).low, pooled_rate([SpeculationCount(50, 25)]).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no token was drafted"):
        pooled_rate([SpeculationCount(0, 0)])


def test_a_checkpoint_without_module_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, _ = build()
    save(policy, tmp_path / "policy")
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(
        f"stage: eval\nmodel: {{model_name_or_path: {tmp_path / 'policy'}}}\noutput_dir: {tmp_path / 'run'}\n"
        "eval: {datasets: [{task: chain_sum, size: 4}]}\n"
    )
    assert speculation.main([str(recipe)]) == 2
    assert "has no multi-token prediction module to draft with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def walks(count: int, seed: int) -> torch.Tensor:
    """Texts of a world where much can be foreseen: 24 tokens [count, 24] that go up by 1, 2 or 3, modulo 40."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(low, high, (count, 1), generator=generator) for low, high in ((0, 40), (1, 4)))
    return 10 + (start + step * torch.arange(24)) % 40


def train(policy: Any, mtp: MtpModule | None, steps: int) -> None:
    """The trunk, or the module alone."""
    parameters = list((mtp or policy).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95))
    positions = torch.arange(24).expand(16, 24)
    for step in range(steps):
        ids = walks(16, seed=step)
        if mtp is None:
            loss = policy(ids, labels=ids).loss
        else:
            loss_sum, num_tokens = loss_of(policy, mtp, (ids, positions, ids), detach_trunk=True)
            loss = loss_sum / num_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def drafts_by_hand(policy: Any, mtp: MtpModule, prompt: Sequence[int], answered: Sequence[int]) -> SpeculationCount:
    """Follow an engine that drafts one token per step: what it drafts, and whether the policy says the same.

    `n` tokens are there; the newest, n - 1, is a draft's input together with the hidden state of token n - 2.
    """
    ids = torch.tensor([[*prompt, *answered]])
    positions = torch.arange(ids.shape[1])[None]
    hidden = policy.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    successors = next_embeddings(policy.model.embed_tokens, ids, positions)
    guess_W = policy.lm_head(mtp(hidden, successors, positions, policy.model.rotary_emb))[0].argmax(-1)
    n, drafted, accepted = len(prompt) + 1, 0, 0
    while n < ids.shape[1]:
        hit = bool(guess_W[n - 2] == ids[0, n])
        drafted, accepted = drafted + 1, accepted + hit
        n += 1 + hit
    return SpeculationCount(drafted, accepted)


def test_vllm_drafts_what_the_module_predicts(tmp_path: Path) -> None:
    policy = build_policy(BuildSection(**BUILD).model_dump(), build_tokenizer(), seed=0)
    train(policy, None, steps=120)
    with torch.no_grad():  # weights of a norm that are all alike would hide which side of it the hidden state is from
        policy.model.norm.weight *= 1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        find_routers(policy)[0].e_score_correction_bias += torch.linspace(-0.3, 0.3, 8)
    fresh, mtp = build_mtp(policy), build_mtp(policy)
    train(policy, mtp, steps=60)
    save_mtp(policy, mtp, save(policy, tmp_path))

    known = [row[:length].tolist() for row, length in zip(walks(6, seed=10_000), (4, 5, 6, 7, 8, 9), strict=True)]
    generator = torch.Generator().manual_seed(1)
    strange = [torch.randint(5, 100, (length,), generator=generator).tolist() for length in (1, 2, 3, 7, 12, 20)]
    prompts = [Prompt(str(number), (), tuple(ids)) for number, ids in enumerate(known + strange)]
    model = ModelSection(model_name_or_path=str(tmp_path))
    sizes = SamplerSection(max_model_len=64, max_num_seqs=8, num_threads=1)
    params = SamplingParams(30, temperature=0.0)
    drafted, plain = (answer(model, sizes, prompts, params, speculative_tokens=number) for number in (1, 0))

    for ours, theirs in zip(drafted.completions, plain.completions, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        np.testing.assert_array_equal(np.sort(ours.experts_TLK), np.sort(theirs.experts_TLK))
    result = compare(drafted, plain)
    assert (result.same_answers, result.prompts) == (12, 12)
    assert result.tokens_per_second > 0 and result.tokens_per_second_without > 0

    pairs = [(p.token_ids, c.token_ids) for p, c in zip(prompts, drafted.completions, strict=True)]
    assert drafted.counts == [drafts_by_hand(policy, mtp, prompt, answered) for prompt, answered in pairs]
    assert plain.counts == [SpeculationCount(0, 0)] * 12
    untrained = [drafts_by_hand(policy, fresh, prompt, answered) for prompt, answered in pairs]
    untrained_rate = sum(c.accepted for c in untrained) / sum(c.drafted for c in untrained)
    assert result.acceptance.value == result.accepted / result.drafted
    assert untrained_rate + 0.2 < result.acceptance.low <= result.acceptance.value < 1


def test_drafting_at_a_temperature_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.7 with speculative_tokens=1"):
        require_exact(SamplingParams(8, 0.7), 1, on_cpu=True)
    require_exact(SamplingParams(8, 0.0), 1, on_cpu=True)
    require_exact(SamplingParams(8, 0.7), 0, on_cpu=True)
    require_exact(SamplingParams(8, 0.7), 1, on_cpu=False)


def test_differing_answers_are_counted() -> None:
    def answers(*texts: tuple[int, ...]) -> Answers:
        completions = [speculation.Completion(text, (0.0,) * len(text), "stop", "", 0) for text in texts]
        return Answers(completions, [SpeculationCount(2, 1)] * len(texts), seconds=0.5)

    result = compare(answers((1, 2, 3), (4, 5)), answers((1, 2, 3), (4, 6)))
    assert (result.same_answers, result.prompts, result.drafted, result.accepted) == (1, 2, 4, 2)
    assert result.tokens_per_second == 10
