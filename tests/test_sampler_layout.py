"""Samplers of several devices without an engine: what divides, what is planned and reserved, how weights get there."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stage_commands import ROOT

from posttrain.architectures import ARCHITECTURES, Architecture
from posttrain.cli import check_recipe
from posttrain.dry_run import describe
from posttrain.errors import ParityError, RunStopped
from posttrain.layout import require_layout
from posttrain.placement import bundle, require_room
from posttrain.planning.hardware import load_hardware
from posttrain.planning.plans import make_plan
from posttrain.planning.stages import Assumptions
from posttrain.recipe import GrpoRecipe, ParitySection, SamplerSection
from posttrain.recipe_file import load_recipe
from posttrain.sampler import Sampler
from posttrain.weight_buckets import filled, in_buckets
from posttrain.weights import Publisher
from posttrain.wire import Digest, LoadReport, WeightSnapshot, WireTensor, digest_of_all

V3, QWEN = ARCHITECTURES["deepseek-ai/DeepSeek-V3"], ARCHITECTURES["Qwen/Qwen3-30B-A3B"]
DENSE = ARCHITECTURES["Qwen/Qwen2.5-7B"]


@pytest.mark.parametrize(
    ("shape", "devices", "experts"),
    [(V3, 8, True), (V3, 16, False), (QWEN, 2, False), (QWEN, 8, True), (DENSE, 4, False), (DENSE, 1, False)],
)
def test_what_divides_is_let_through(shape: Architecture, devices: int, experts: bool) -> None:
    require_layout(asdict(shape), devices, expert_parallel=experts)


@pytest.mark.parametrize(
    ("config", "devices", "experts", "message"),
    [
        ({"num_attention_heads": 6}, 4, False, "size=4: the policy's num_attention_heads=6 is no multiple .* of 1, 2, 3, 6"),
        ({"num_attention_heads": 8, "intermediate_size": 100}, 8, False, "intermediate_size=100 .* use one of 1, 2, 4"),
        ({"num_attention_heads": 8, "num_local_experts": 6}, 4, True, "routed experts=6 .* use one of 1, 2"),
        (
            {"num_attention_heads": 8, "num_experts": 6, "moe_intermediate_size": 4},
            8, False, "moe_intermediate_size=4 .* use one of 1, 2, 4",
        ),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, False, "num_key_value_heads=3 neither"),
        ({"num_attention_heads": 8}, 2, True, "enable_expert_parallel=true: the policy is dense .* set it to false"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_with_what_would(
    config: dict[str, int], devices: int, experts: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_layout(config, devices, expert_parallel=experts)


def test_latent_attention_needs_no_key_heads() -> None:
    require_layout({"num_attention_heads": 8, "num_key_value_heads": 3, "kv_lora_rank": 512}, 8, expert_parallel=False)


def test_a_sampler_refuses_before_vllm_is_loaded(policy_path: Path) -> None:
    def start(**settings: int) -> None:
        Sampler(
            str(policy_path), dtype="float32", max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.5,
            trust_remote_code=False, seed=0, **settings,
        )  # fmt: skip

    with pytest.raises(ValueError, match="tensor_parallel_size=3: .*num_attention_heads=4"):
        start(tensor_parallel_size=3)
    with pytest.raises(ValueError, match="speculative_tokens=1 with tensor_parallel_size=2: .* default"):
        start(tensor_parallel_size=2, speculative_tokens=1)


def test_experts_need_devices_to_be_spread_over() -> None:
    with pytest.raises(ValidationError, match="enable_expert_parallel=true with tensor_parallel_size=1: .* 2 or more"):
        SamplerSection(enable_expert_parallel=True)


def test_ray_reserves_all_devices_of_a_sampler_on_one_node() -> None:
    section = SamplerSection(num_workers=2, tensor_parallel_size=4, num_cpus=0.5)
    assert (section.devices, section.cpus_of_one, section.cpus) == (8, 2.0, 4.0)
    needed = bundle(section.cpus_of_one, 4, {})
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 6.0}]  # the second one's 2 more are of no use
    require_room("sampler", 2, needed, "any", nodes)
    with pytest.raises(RunStopped, match="num_workers=3 .*holds 2 .*change .*sampler.tensor_parallel_size"):
        require_room("sampler", 3, needed, "any", nodes)


def recipe(name: str, *overrides: str) -> GrpoRecipe:
    found = load_recipe(ROOT / f"recipes/{name}/grpo.yaml", overrides)
    assert isinstance(found, GrpoRecipe)
    return found


def test_a_recipe_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        ValueError, match=r"grpo.yaml: sampler.tensor_parallel_size=3: the policy's num_attention_heads=32"
    ):
        check_recipe(recipe("qwen3_30b_a3b", "sampler.tensor_parallel_size=3"), "grpo.yaml")


def test_a_plan_divides_weights_and_cache_by_the_devices() -> None:
    assumed = Assumptions(hardware=load_hardware("h100"))
    two, four = (make_plan(recipe("qwen3_30b_a3b", f"sampler.tensor_parallel_size={n}"), assumed) for n in (2, 4))
    for name in ("weights", "KV cache of a token"):
        assert two.value("Memory of each GPU", name) == 2 * four.value("Memory of each GPU", name)
    assert two.value("The run", "GPUs") == 16 + 8 * 2
    assert not [warning for warning in two.warnings if "sampler of this recipe" in warning]
    (said,) = [w for w in make_plan(recipe("deepseek_v3"), assumed).warnings if "sampler of this recipe" in w]
    assert "8 GPU(s)" in said and "8 engines of 32 GPUs" in said
    with pytest.raises(ValueError, match="tensor_parallel_size=16: a sampler is on one node, which has 8"):
        make_plan(recipe("qwen3_30b_a3b", "sampler.tensor_parallel_size=16"), assumed)
    small = make_plan(recipe("qwen3_30b_a3b", "sampler.tensor_parallel_size=1", "model.dtype=float32"), assumed)
    (said,) = [w for w in small.warnings if "sampler of this recipe" in w]
    assert "set sampler.tensor_parallel_size: 2" in said


def test_a_dry_run_names_the_devices() -> None:
    text = describe(recipe("qwen3_30b_a3b"))
    assert "8 vLLM workers of 2 devices, up to" in text
    assert "each of a sampler's 2 devices 29.4 GiB: weights 28.4 GiB" in text
    assert "of 8 devices, whole experts on each" in describe(recipe("deepseek_v3"))


def test_buckets_carry_tensors_of_all_types_without_a_name() -> None:
    tensors = [
        ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
        ("b", torch.tensor(2.5, dtype=torch.bfloat16)),
        ("c", torch.ones(5, dtype=torch.float8_e4m3fn)),
        ("d", torch.arange(12).reshape(3, 4).T),  # not contiguous
        ("e", torch.zeros(0, 4)),
    ]
    names, sent, arrived = set(os.listdir("/dev/shm")), Digest(), Digest()
    sent.add([WireTensor.of(name, tensor) for name, tensor in tensors])
    with filled(tensors) as bucket:
        found, other = dict(bucket.tensors(arrived)), dict(bucket.tensors(Digest()))
        assert set(os.listdir("/dev/shm")) <= names
    assert arrived.hexdigest() == sent.hexdigest() and list(found) == [name for name, _ in tensors]
    for name, tensor in tensors:  # after the sampler has let go of it
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name
    found["a"].zero_()
    assert other["a"].sum() == 15  # what one worker does to its tensors is its own


def test_buckets_are_as_large_as_they_may_be() -> None:
    tensors = [(str(size), torch.zeros(size)) for size in (1, 2, 9, 3)]
    assert [[name for name, _ in bucket] for bucket in in_buckets(iter(tensors), 16)] == [["1", "2"], ["9"], ["3"]]
    assert list(in_buckets([])) == []


def test_a_sampler_reports_the_worker_that_missed_something() -> None:
    assert digest_of_all("sent", "sent", ()) == "sent"  # one device
    assert digest_of_all("sent", "sent", ("sent", "sent")) == "sent"
    assert (
        digest_of_all("sent", "noisy", ("noisy", "noisy")) == "sent"
    )  # a deliberate fault, which the canary is to find
    assert digest_of_all("sent", "sent", ("sent", "old")) == "old"


def test_a_publication_that_a_worker_missed_has_no_valid_receipt() -> None:
    admitted = []
    snapshot = WeightSnapshot(4, "sent", 10, ())
    report = LoadReport(4, digest_of_all("sent", "sent", ("sent", "old")), 1.0, ())
    fleet = SimpleNamespace(admit=lambda version, proved: admitted.append((version, list(proved))))
    samplers: Any = SimpleNamespace(fleet=fleet, load_weights=lambda snapshot, canary: {0: report})
    learner: Any = SimpleNamespace(export_weights=lambda version: snapshot)
    with pytest.raises(
        ParityError, match="sampler 0: received old where sent was sent: .* worker process .* missed it"
    ):
        Publisher(learner, samplers, ParitySection(), []).publish(4)
    assert admitted == [(4, [])]
