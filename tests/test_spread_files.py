"""Checkpoints read and written by ranks that each keep a part: the values of one process, for several architectures."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_learner_parallel import free_port, make, on_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import Transpose, WeightConverter

from posttrain import disk, learner_parallel, optimizer_files
from posttrain.collectives import all_or_none
from posttrain.learner_model import LearnerPolicy
from posttrain.model import load, spread_files
from posttrain.model.token_scorer import TokenScorer
from posttrain.recipe import ModelSection
from tests.oracles.grpo_loss import tiny_policy

HOW: dict[str, Any] = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "trust_remote_code": False,
}
SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
}
LAYOUTS = [(2, 1), (2, 2), (3, 1), (4, 2)]  # ranks, and those that divide experts: one of three has none of four


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        "deepseek": tiny_policy(),
        "qwen": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16)),
        "gpt_oss": GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
        "dense, tied": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of each, in bfloat16 and in several files."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, model in models().items():
        model.to(torch.bfloat16).save_pretrained(directory / name, max_shard_size="20KB")
        assert len([*(directory / name).glob("model-*.safetensors")]) > 1
    return directory


def join(rank: int, ranks: int, port: int) -> Accelerator:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    return Accelerator(cpu=True)


def read_and_write(rank: int, ranks: int, port: int, group: int, checkpoints: Path, out: Path) -> dict[str, Any]:
    """On a rank: what models are made of that were read in parts, by name; and their files, written in parts."""
    accelerator = join(rank, ranks, port)
    found = {}
    for path in sorted(checkpoints.iterdir()):
        if group > 1 and path.name == "dense, tied":
            continue
        model = spread_files.outline(str(path), **HOW)
        assert all(p.is_meta for p in model.parameters())
        learner_parallel.shard(TokenScorer(model, None), accelerator, group)
        for _ in range(2):  # the second time into tensors that are there
            spread_files.fill(model, str(path), accelerator.device)
        tensors = {**model.state_dict(), **dict(model.named_buffers())}
        whole = learner_parallel.gather(tensors, keep=True)
        assert all(p.to_local().numel() <= p.numel() / len(p) * -(-len(p) // ranks) + 32 for p in model.parameters())
        target = out / path.name
        target.mkdir(exist_ok=True)
        parts = list(model.state_dict().items())
        # As the learner: every rank takes part in each, and one of them keeps it.
        gathered = (
            learner_parallel.gather({name: tensor}, keep=n % ranks == rank) for n, (name, tensor) in enumerate(parts)
        )
        with all_or_none():
            spread_files.write(model, target, gathered, len(parts))
        if rank == 0:
            spread_files.write_index(target, len(parts))
            load.save_config(model, _NoTokenizer(), target)
        found[path.name] = {name: tensor.numpy() for name, tensor in whole.items()}
    return found


class _NoTokenizer:
    def save_pretrained(self, path: object) -> None: ...


@pytest.mark.parametrize(("ranks", "group"), LAYOUTS)
def test_parts_are_those_of_the_whole(checkpoints: Path, tmp_path: Path, ranks: int, group: int) -> None:
    port = free_port()
    found = on_processes(
        ranks, lambda pool, rank: pool.submit(read_and_write, rank, ranks, port, group, checkpoints, tmp_path)
    )
    assert set(found[0]) == {name for name in models() if group == 1 or name != "dense, tied"}
    for name in found[0]:
        whole = load.load_policy(str(checkpoints / name), dtype="float32", **HOW)
        expected = {**whole.state_dict(), **dict(whole.named_buffers())}
        for rank in found:
            assert rank[name].keys() == expected.keys()
            for key, tensor in expected.items():
                assert (torch.tensor(rank[name][key]) == tensor).all(), (name, key)
        again = load.load_policy(str(tmp_path / name), dtype="float32", **HOW)
        for key, tensor in whole.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), (name, key)


def test_what_is_missing_is_said(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn"
    models()["qwen"].save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    lost = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"all weights of a Qwen3MoeForCausalLM.*layers.1.self_attn.q_proj.weight"):
        spread_files.fill(spread_files.outline(str(path), **HOW), str(path), torch.device("cpu"))
    held = spread_files.outline(str(checkpoints / "qwen"), **HOW)
    spread_files.fill(held, str(checkpoints / "qwen"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.weight"):  # also where there are values already
        spread_files.fill(held, str(path), torch.device("cpu"))
    tensors["model.layers.1.self_attn.q_proj.weight"] = lost[:-1]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"or in other shapes.*layers.1.self_attn.q_proj.weight"):
        spread_files.fill(spread_files.outline(str(path), **HOW), str(path), torch.device("cpu"))


@pytest.mark.parametrize("change", [-1, 1])
def test_more_or_fewer_experts_than_the_model_has(tmp_path: Path, change: int) -> None:
    models()["qwen"].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for kind in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.{{}}.{kind}_proj.weight"
        if change > 0:
            tensors[name.format(4)] = tensors[name.format(3)].clone()
        else:
            del tensors[name.format(1)]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{4 + change} tensors for model.layers.1.mlp.experts.*the model has 4 there"):
        spread_files.fill(spread_files.outline(str(tmp_path), **HOW), str(tmp_path), torch.device("cpu"))


def test_other_files_than_safetensors_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoints / "qwen" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"no .safetensors files; convert"):
        spread_files.fill(spread_files.outline(str(tmp_path), **HOW), str(tmp_path), torch.device("cpu"))


def test_a_head_that_the_config_says_is_the_embedding(tmp_path: Path) -> None:
    models()["dense, tied"].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tie_word_embeddings: true, and the files hold a head"):
        spread_files.fill(spread_files.outline(str(tmp_path), **HOW), str(tmp_path), torch.device("cpu"))
    with pytest.raises(ValueError, match="tie_word_embeddings: true, and the files hold a head"):
        LearnerPolicy(
            ModelSection(model_name_or_path=str(tmp_path)),
            str(tmp_path),
            None,
            seed=0,
            gradient_checkpointing=False,
            spread=False,
        )


CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
CONFIG_CODE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("case", ["no generation_config", "old settings", "own code"])
def test_what_lies_beside_the_weights_is_the_same(tmp_path: Path, case: str) -> None:
    source, whole, parts = (tmp_path / name for name in ("source", "whole", "parts"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    how = HOW | {"trust_remote_code": case == "own code"}
    if case != "own code":
        (source / "generation_config.json").unlink()
    if case == "old settings":
        config |= {"temperature": 0.6, "do_sample": True, "max_length": 77}
    if case == "own code":
        (source / "modeling_own.py").write_text(CODE)
        (source / "configuration_own.py").write_text(CONFIG_CODE)
        names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (source / "config.json").write_text(json.dumps(config))
    for out in (whole, parts):
        out.mkdir()
    load.save_policy(load.load_policy(str(source), dtype="float32", **how), _NoTokenizer(), whole)
    model = spread_files.outline(str(source), **how)
    spread_files.fill(model, str(source), torch.device("cpu"))
    spread_files.write(model, parts, [model.state_dict()], 1)
    spread_files.write_index(parts, 1)
    load.save_config(model, _NoTokenizer(), parts)
    beside = [
        {path.name: path.read_text() for path in out.iterdir() if ".safetensors" not in path.name}
        for out in (whole, parts)
    ]
    assert beside[0] == beside[1]
    found = [load.load_policy(str(out), dtype="float32", **how).state_dict() for out in (whole, parts)]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def refused(rank: int, port: int, path: Path) -> list[str]:
    """Experts that are spread in a dimension that gate and up are joined in, or turned on the way."""
    join(rank, 2, port)
    mesh = init_device_mesh("cpu", (2,))
    said = []
    for dim, mapping in (
        (1, None),
        (2, None),
        (0, [WeightConverter("lm_head.weight", "lm_head.weight", [Transpose()])]),
    ):
        model = spread_files.outline(str(path), **HOW)
        holder, name = (model.lm_head, "weight") if mapping else (model.model.layers[0].mlp.experts, "gate_up_proj")
        spread = distribute_tensor(torch.zeros(getattr(holder, name).shape), mesh, [Shard(dim)])
        setattr(holder, name, torch.nn.Parameter(spread))
        try:
            spread_files._require_whole_joints(model, mapping or spread_files.get_model_conversion_mapping(model))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_parts_would_be_read_wrongly_is_refused(checkpoints: Path) -> None:
    port = free_port()
    for said in on_processes(2, lambda pool, rank: pool.submit(refused, rank, port, checkpoints / "qwen")):
        assert "gate_up_proj, spread in dimension 1" in said[0] and "Concatenate" in said[0]
        assert "set learner.parallel: ddp" in said[0] and not said[1] and "Transpose" in said[2]


def no_room(rank: int, port: int, path: Path, out: Path) -> tuple[bool, str]:
    """What a save says while the second rank may write small files only. Afterwards it may write, and another one succeeds."""
    join(rank, 2, port)
    learner = make(path, num_workers=2, parallel="fsdp")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    (out / "torn").mkdir(exist_ok=True)
    with pytest.raises(Exception) as failure:
        learner.save(out / "torn")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (out / "whole").mkdir(exist_ok=True)
    learner.save(out / "whole")
    return disk.is_full(failure.value), str(failure.value)


def test_a_rank_without_room_is_heard_of_by_all(tmp_path: Path) -> None:
    from data.chat import build_tokenizer

    path, out = tmp_path / "policy", tmp_path / "out"
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    out.mkdir()
    port = free_port()
    found = on_processes(2, lambda pool, rank: pool.submit(no_room, rank, port, path, out))
    assert [full for full, _ in found] == [True, True] and "rank 1 failed" in found[0][1]
    assert not (out / "torn" / "trainer_state.pt").exists()
    load.load_policy(str(out / "whole"), dtype="float32", **HOW)


def with_a_teacher(rank: int, port: int, path: Path, teacher: Path) -> str:
    join(rank, 2, port)
    try:
        make(path, num_workers=2, parallel="fsdp", logits_chunk=8, teacher_path=str(teacher))
    except ValueError as error:
        return str(error)
    return ""


def test_a_teacher_whose_head_does_more_is_refused_when_it_has_weights(tmp_path: Path) -> None:
    from data.chat import build_tokenizer

    path, teacher = tmp_path / "policy", tmp_path / "teacher"
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).save_pretrained(teacher)
    port = free_port()
    said = on_processes(2, lambda pool, rank: pool.submit(with_a_teacher, rank, port, path, teacher))
    assert all("GraniteForCausalLM does more to its logits" in text for text in said)


@pytest.mark.parametrize("lost", ["part", "directory"])
def test_parts_of_the_optimizer_that_are_not_there(tmp_path: Path, lost: str) -> None:
    save_file({}, tmp_path / "optimizer-00001-of-00002.safetensors", metadata={"regions": "{}"})
    if lost == "part":
        (tmp_path / "optimizer").mkdir()
        (tmp_path / "optimizer-00001-of-00002.safetensors").rename(
            tmp_path / "optimizer" / "optimizer-00001-of-00002.safetensors"
        )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=f"has {int(lost == 'part')} of 2 parts; copy the checkpoint again"):
        optimizer_files.load_state(optimizer, optimizer.state_dict(), tmp_path, 2)
    two = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"state is of \[2\] parameters.*and \[1\] are trained now"):
        optimizer_files.load_state(optimizer, two.state_dict(), tmp_path, 0)


def test_a_file_of_another_rank_that_is_not_here(tmp_path: Path) -> None:
    from posttrain.errors import RunStopped

    tensors: Mapping[str, torch.Tensor] = {"a": torch.zeros(2)}
    save_file(dict(tensors), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        RunStopped, match="1 of 2 files with weights are not here, model-00002-of-00002.*all nodes share"
    ):
        spread_files.write_index(tmp_path, 2)
