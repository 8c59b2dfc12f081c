"""GRPO with weights spread over ranks, and with state kept off the device."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch.distributed.tensor import DTensor

from posttrain import learner_offload, learner_parallel
from posttrain.learner import Learner
from posttrain.packing import pack
from posttrain.recipe import AlgorithmSection, GrpoRouterSection, LearnerSection, ModelSection, OptimizerSection
from tests.oracles.grpo_loss import random_samples, tiny_policy

T = TypeVar("T")
LENGTHS = [(3, 7), (5, 2), (2, 11), (4, 4), (6, 9), (2, 3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data.chat import build_tokenizer

    path = tmp_path_factory.mktemp("policy")
    tiny_policy().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def make(checkpoint: Path, path: Path | None = None, teacher_path: str | None = None, **section: Any) -> Learner:
    return Learner(
        model=ModelSection(model_name_or_path=str(path or checkpoint), experts_implementation="eager"),
        optimizer=OptimizerSection(learning_rate=1e-2, max_grad_norm=0.1),
        learner=LearnerSection(**section),
        reference_path=str(checkpoint),
        teacher_path=teacher_path,
        router_section=GrpoRouterSection(bias_update_speed=0.01),
        temperature=1.0,
        max_completion_length=16,
        total_steps=10,
        seed=0,
    )


def story(checkpoint: Path, out: Path, rank: int, ranks: int, **section: Any) -> dict[str, Any]:
    """Everything a learner is asked for in a run, in turn: gradients, logprobs before and after steps, files, going on."""
    learner, sharing = make(checkpoint, **section), section.get("context_parallel_size", 1)
    samples = random_samples(LENGTHS)
    samples[5] = replace(samples[5], prompt_ids=samples[2].prompt_ids)
    batch = pack(
        samples,
        world_size=ranks // sharing,
        max_tokens_per_microbatch=32,
        row_length=32,
        pad_token_id=0,
        share_prompts=section.get("share_prompts", False),
    )[rank // sharing]
    algorithm = AlgorithmSection(beta=0.05)
    found: dict[str, Any] = {"held": sum(_local(p).numel() for p in learner._model.parameters())}
    before = learner.score(batch, samples, near_tie_margin=1e-5)
    learner.forward_backward(batch, algorithm)
    gradients = learner.gradients()
    found["norm"] = learner.optim_step()["optim/grad_norm"].value
    after = learner.score(batch, samples, near_tie_margin=1e-5)
    learner.save(out)
    published = [copies(learner)]
    for _ in range(2):  # on from here, and once more from the files
        learner.forward_backward(batch, algorithm)
        learner.optim_step()
        published.append(copies(learner))
        learner.score(batch, samples, near_tie_margin=1e-5)  # what it gathered must not outlive the change of weights
        learner.roll_back(out)
    back = learner.score(batch, samples, near_tie_margin=1e-5)
    other = make(checkpoint, out, **section)
    other.restore(out)
    other.forward_backward(batch, algorithm)
    other.optim_step()
    published.append(copies(other))
    learner.renew_reference()
    renewed = learner.score(batch, samples, near_tie_margin=1e-5)
    assert renewed.logprobs == renewed.ref_logprobs
    assert "whole_rows" not in (out / "config.json").read_text()
    scores = [{**one.logprobs} for one in (before, after, back)] + [{**before.ref_logprobs}, {**after.ref_logprobs}]
    plain = [{name: tensor.numpy() for name, tensor in one.items()} for one in published]
    return found | {
        "scores": scores,
        "published": plain,
        "gradients": {name.removeprefix("module."): g.numpy() for name, g in gradients.items()},
    }


def copies(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.checkpoint_tensors()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def resume(path: Path, **section: Any) -> dict[str, Any]:
    """What ranks have when they go on from files."""
    learner = make(path, path, **section)
    learner.restore(path)
    state = learner._optimizer.state
    return {
        "weights": {name: tensor.numpy() for name, tensor in copies(learner).items()},
        "moments": [float(learner_parallel.whole(state[p]["exp_avg"]).norm()) for p in learner._model.parameters()],
    }


def on_a_rank(rank: int, port: int, path: str, out: str, section: dict[str, Any]) -> dict[str, Any]:
    resumes = section.pop("resumes", False)
    ranks = section["num_workers"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    if resumes:
        return resume(Path(path), **section)
    return story(Path(path), Path(out), rank, ranks, **section)


def on_ranks(checkpoint: Path, out: Path, **section: Any) -> list[dict[str, Any]]:
    port = free_port()

    def begin(pool: ProcessPoolExecutor, rank: int) -> Future[dict[str, Any]]:
        return pool.submit(on_a_rank, rank, port, str(checkpoint), str(out), section)

    return on_processes(section["num_workers"], begin)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_processes(ranks: int, begin: Callable[[ProcessPoolExecutor, int], Future[T]]) -> list[T]:
    """What processes of their own return, by rank."""
    with ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
        calls = [begin(pool, rank) for rank in range(ranks)]
        return [call.result(timeout=400) for call in calls]


@pytest.mark.parametrize(
    "section",
    [
        {"num_workers": 2},
        {"num_workers": 2, "gradient_checkpointing": True, "logits_chunk": 5, "share_prompts": True},
        {"num_workers": 2, "expert_parallel_size": 2, "gradient_checkpointing": True},
        {"num_workers": 2, "context_parallel_size": 2, "gradient_checkpointing": True, "parallel": "ddp"},
        {"num_workers": 4, "expert_parallel_size": 2, "context_parallel_size": 2},
    ],
    ids=[
        "plain",
        "checkpointing, small chunks, prompts in common",
        "experts divided",
        "rows divided",
        "both divided, twice",
    ],
)
def test_spread_over_ranks_is_one_rank(checkpoint: Path, tmp_path: Path, section: dict[str, Any]) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    expected = story(checkpoint, one, 0, 1)
    section = {"parallel": "fsdp", **section}
    ranks = on_ranks(checkpoint, many, **section)
    if section["parallel"] == "fsdp":
        held = [rank["held"] for rank in ranks]
        assert sum(held) == expected["held"] and max(held) < 1.2 * expected["held"] / len(ranks)
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name, gradient in expected["gradients"].items():
            gap = torch.tensor(rank["gradients"][name] - gradient).norm()
            assert float(gap) <= 1e-5 * max(float(torch.tensor(gradient).norm()), 1e-3 * expected["norm"]), name
    for turn, scores in enumerate(zip(*(rank["scores"] for rank in ranks), strict=True)):
        together = {index: values for found in scores for index, values in found.items()}
        # Those that share rows say the same.
        assert len(together) == sum(map(len, scores)) / section.get("context_parallel_size", 1) == len(LENGTHS)
        for index, values in together.items():
            assert values == pytest.approx(expected["scores"][turn][index], abs=1e-4), (turn, index)
    published = []
    turns = zip(*(rank["published"] for rank in ranks), strict=True)
    for turn, (parts, wanted) in enumerate(zip(turns, expected["published"], strict=True)):
        # No rank sends what another one does, and none has more than about its share: here a layer is half of the policy.
        found = {name: tensor for part in parts for name, tensor in part.items()}
        published.append(found)
        assert found.keys() == wanted.keys() and len(found) == sum(map(len, parts))
        sizes = [sum(tensor.size for tensor in part.values()) for part in parts]
        assert section["parallel"] == "ddp" or max(sizes) < 0.75 * sum(sizes)
        for name, tensor in wanted.items():
            assert float(abs(found[name] - tensor).max()) < 2e-4, (turn, name)
    # Once from memory, once after rolling back, once from the files: all the same.
    after_one, after_two, resumed = published[1:]
    for name, tensor in after_one.items():
        assert (after_two[name] == tensor).all() and (resumed[name] == tensor).all(), name
    # What one rank or another number of them goes on from is the same.
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (one / name).read_text() == (many / name).read_text(), name
    learners = [make(checkpoint, path) for path in (one, many)]
    for learner, path in zip(learners, (one, many), strict=True):
        learner.restore(path)
    weights, others = (dict(learner.checkpoint_tensors()) for learner in learners)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert float((weight - others[name]).abs().max()) < 2e-4, name
    for mine, theirs in zip(*(learner._optimizer.state.values() for learner in learners), strict=True):
        assert mine["step"] == theirs["step"] == 1
        for name in ("exp_avg", "exp_avg_sq"):
            assert float((mine[name] - theirs[name]).norm()) <= 1e-4 * float(mine[name].norm()) + 1e-12, name
    if section["parallel"] == "fsdp":  # each rank wrote its share, and reads it from what one rank has written
        assert len([*many.glob("model-*.safetensors")]) > 2 and not (many / "model.safetensors").exists()
        sizes = [path.stat().st_size for path in (many / "optimizer").iterdir()]
        assert len(sizes) == len(ranks) and max(sizes) < 1.3 * sum(sizes) / len(sizes)
        resumed_from_one = on_ranks(one, tmp_path, resumes=True, **section)
        for name in weights:
            (there,) = [part["weights"][name] for part in resumed_from_one if name in part["weights"]]
            assert (torch.tensor(there) == weights[name]).all(), name
        state = learners[0]._optimizer.state
        moments = [float(state[p]["exp_avg"].norm()) for p in learners[0]._model.parameters()]
        assert resumed_from_one[0]["moments"] == pytest.approx(moments, rel=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (lambda: LearnerSection(parallel="fsdp"), "set num_workers: 2 or more"),
        (lambda: LearnerSection(parallel="fsdp", num_workers=2, offload_reference=True), "its share of the reference"),
        (lambda: LearnerSection(offload_optimizer=True).require_accelerator(False), "no GPU here"),
        (lambda: LearnerSection(offload_reference=True).require_accelerator(False), "no GPU here"),
    ],
)
def test_what_means_nothing_is_refused(section: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section()


def test_copies_in_bfloat16_go_with_their_layer() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    states = torch.randn(8, 2048)

    @torch.no_grad()
    def forward() -> int:
        before = resident()
        for _ in range(12):  # as FSDP2's gathered weights: leaves that are there while their layer computes
            weight = torch.nn.Parameter(torch.randn(2048 * 2048).as_strided((2048, 2048), (2048, 1)))
            assert torch.nn.functional.linear(states, weight).dtype == torch.bfloat16
            del weight
        return resident() - before

    learner_parallel.in_bfloat16(forward, "cpu")()  # what the kernels themselves take
    assert (
        learner_parallel.in_bfloat16(forward, "cpu")() < 12 * 2048 * 2048 * 2 / 2
    )  # not twelve copies of two bytes a weight


def test_offloaded_weights_come_back_untouched() -> None:
    first = torch.nn.Linear(3, 3, bias=False)
    first.register_buffer("scale", torch.ones(3))
    second = torch.nn.Linear(3, 3, bias=False)
    second.weight = first.weight  # tied
    model = torch.nn.Sequential(first, second)
    held, scale = first.weight, first.scale
    with pytest.raises(KeyError), learner_offload.weights_on(model, torch.device("meta")):
        assert first.weight.is_meta and first.scale.is_meta and first.weight is second.weight  # type: ignore[union-attr]
        assert not first.weight.requires_grad
        raise KeyError
    assert first.weight is second.weight is held and first.scale is scale and not held.is_meta


def test_offloaded_optimizer_state_is_on_the_device_for_the_step_only() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()

    def places() -> set[str]:
        return {value.device.type for state in optimizer.state.values() for value in state.values() if value.dim()}

    # "meta" stands for a device: what is sent there is gone, so only the places are looked at.
    assert places() == {"cpu"}
    learner_offload.move_state(optimizer, torch.device("meta"))
    assert places() == {"meta"}
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
