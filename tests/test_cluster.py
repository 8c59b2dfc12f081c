"""Real Ray, real vLLM, real accelerate: rollouts, scoring, publication and its proof, over several Ray nodes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from posttrain.errors import ParityError
from posttrain.metrics import Metric
from posttrain.recipe import (
    AlgorithmSection,
    FaultsSection,
    GrpoRouterSection,
    LearnerSection,
    ModelSection,
    OptimizerSection,
    ParitySection,
    SamplerSection,
)
from posttrain.types import Prompt, Sample, SamplingParams

NEAR_TIE = 1e-5


class Parts:
    """A sampler and two learner ranks, each on a Ray node of its own."""

    def __init__(self, path: Path, skip_version: int | None, tensor_parallel_size: int = 1) -> None:
        from posttrain.cluster import LearnerGroup, SamplerPool
        from posttrain.weights import Publisher, canary_sequences

        model = ModelSection(model_name_or_path=str(path))
        self.learner = LearnerGroup(
            LearnerSection(num_workers=2, num_threads=1, row_length=128, max_tokens_per_microbatch=512),
            model=model,
            optimizer=OptimizerSection(learning_rate=1e-3),
            reference_path=str(path),
            router_section=GrpoRouterSection(bias_update_speed=0.01),
            temperature=0.8,
            max_completion_length=24,
            total_steps=100,
            seed=0,
        )
        self.samplers = SamplerPool(
            model,
            SamplerSection(max_model_len=128, num_threads=1, tensor_parallel_size=tensor_parallel_size),
            0,
            FaultsSection(skip_publication=skip_version),
        )
        self.nodes = set(self.learner.wait_until_ready()), set(self.samplers.wait_until_ready())
        self.publisher = Publisher(self.learner, self.samplers, ParitySection(), canary_sequences(107, 4, 32, seed=0))

    def step(self, samples: list[Sample]) -> None:
        """One optimizer step that changes every weight."""
        scores = self.learner.score(samples, near_tie_margin=NEAR_TIE)
        trained = [
            replace(s, advantage=(-1.0) ** i, old_logprobs=scores.logprobs[i], ref_logprobs=scores.ref_logprobs[i])
            for i, s in enumerate(samples)
        ]
        self.learner.forward_backward(trained, AlgorithmSection())
        self.learner.optim_step()

    def rollout(self, seed_text: str = "e in sleep?") -> list[Sample]:
        """Completions of a few prompts as samples."""
        prompts = [prompt(f"{letter}{seed_text[1:]}") for letter in "aelps"]
        groups = self.samplers.generate(prompts, SamplingParams(24, temperature=0.8, num_generations=4))
        return [
            Sample(p.token_ids, c.token_ids, c.logprobs, 0.0, c.experts_TLK)
            for p, group in zip(prompts, groups, strict=True)
            for c in group
        ]


def prompt(text: str) -> Prompt:
    from data.chat import build_tokenizer, render_prompt

    messages = ({"role": "user", "content": text},)
    return Prompt(text, messages, render_prompt(build_tokenizer(), messages))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three Ray nodes of one CPU: one for each learner rank and one for the sampler."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def parts(cluster: Any, policy_path: Path) -> Iterator[Parts]:
    from posttrain.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_ALLOW_OPEN_RAY", "1")  # the cluster of the fixture has no token
        with session(cluster.address, num_cpus=3):
            yield Parts(policy_path, skip_version=4)


def test_sampler_and_learner_ranks_are_on_different_nodes(parts: Parts) -> None:
    learners, samplers = parts.nodes
    assert len(learners) == 2 and len(samplers) == 1 and not learners & samplers


def test_the_first_publication_proves_the_start(parts: Parts) -> None:
    (receipt,) = parts.publisher.publish(0)
    assert receipt.valid and receipt.version == 0
    assert receipt.canary.tokens > 0 and receipt.canary.gap_max < 1e-4


def test_ray_exports_what_a_step_took(parts: Parts) -> None:
    import ray

    from posttrain.cluster import StepGauges

    gauges = StepGauges("made")
    gauges.show(3, {"time/rollout": Metric(1.5, "mean"), "throughput/tokens_per_second": Metric(200.0, "mean")})
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    wanted = {"ray_posttrain_step": "3.0", "ray_posttrain_phase_seconds": "1.5", "ray_posttrain_throughput": "200.0"}
    found: dict[str, str] = {}
    end = time.monotonic() + 60  # Ray exports every ten seconds
    while found != wanted and time.monotonic() < end:
        time.sleep(0.5)
        for port in ports:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = [line for line in answer.read().decode().splitlines() if 'run="made"' in line]
                found |= {line.partition("{")[0]: line.rpartition(" ")[2] for line in lines}
    assert found == wanted


def test_rollouts_are_what_the_learner_computes(parts: Parts) -> None:
    samples = parts.rollout()
    parity = parts.learner.score(samples, near_tie_margin=NEAR_TIE).parity
    assert parity.tokens == sum(len(s.completion_ids) for s in samples)
    assert parity.gap_max < 1e-4
    assert parity.routing_agreement >= 0.9999
    # One MoE layer; every token but the last sampled one was routed.
    assert parity.decisions == sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in samples)


def test_two_ranks_give_the_gradient_of_one(parts: Parts, policy_path: Path) -> None:
    from posttrain.learner import Learner
    from posttrain.packing import pack

    samples = parts.rollout()
    scores = parts.learner.score(samples, near_tie_margin=NEAR_TIE)
    trained = [
        replace(s, advantage=(-1.0) ** i, old_logprobs=scores.logprobs[i], ref_logprobs=scores.ref_logprobs[i])
        for i, s in enumerate(samples)
    ]
    algorithm = AlgorithmSection(beta=0.05)
    parts.learner.forward_backward(trained, algorithm)
    found = parts.learner.gradients()
    parts.learner.optim_step()
    alone = Learner(
        ModelSection(model_name_or_path=str(policy_path)),
        OptimizerSection(),
        LearnerSection(),
        reference_path=str(policy_path),
        router_section=GrpoRouterSection(),
        temperature=0.8,
        max_completion_length=24,
        total_steps=1,
        seed=0,
    )
    (batch,) = pack(trained, world_size=1, max_tokens_per_microbatch=4096, row_length=128, pad_token_id=0)
    alone.forward_backward(batch, algorithm)
    for name, expected in alone.gradients().items():
        assert float((found[name] - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-3), name


def test_every_version_is_published_exactly_bias_included(parts: Parts) -> None:
    for version in (1, 2, 3):
        before = parts.publisher.receipts[0].digest
        parts.step(parts.rollout())
        (receipt,) = parts.publisher.publish(version)
        assert receipt.valid and receipt.digest != before
        assert receipt.canary.gap_max < 1e-4 and receipt.canary.routing_agreement >= 0.999
    samples = parts.rollout()
    assert parts.learner.score(samples, near_tie_margin=NEAR_TIE).parity.gap_max < 1e-4


def test_a_stale_sampler_is_caught_named_and_shut_out(parts: Parts) -> None:
    parts.step(parts.rollout())
    with pytest.raises(ParityError, match="answers exactly as version 3 did: version 4 was never loaded"):
        parts.publisher.publish(4)
    with pytest.raises(ParityError, match="none may generate"):
        parts.rollout()
    # The next version is loaded, and the sampler is back.
    parts.publisher.publish(5)
    assert parts.learner.score(parts.rollout(), near_tie_margin=NEAR_TIE).parity.gap_max < 1e-4


def test_a_saved_policy_loads_in_transformers_and_in_vllm(parts: Parts, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    parts.learner.save(str(tmp_path))
    samples = parts.rollout()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for sample in samples[:5]:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0] / 0.8, dim=-1)
        first = len(sample.prompt_ids)
        found = [float(logprobs[t - 1, ids[0, t]]) for t in range(first, ids.shape[1])]
        assert found == pytest.approx(sample.sampler_logprobs, abs=1e-4)
    # A vLLM engine on the saved files, with no help of ours but the settings that CPU needs.
    from posttrain.cluster import SamplerPool

    parts.samplers.stop()
    fresh = SamplerPool(ModelSection(model_name_or_path=str(tmp_path)), SamplerSection(max_model_len=128), 0)
    fresh.wait_until_ready()
    ((completion,),) = fresh.generate([prompt("e in sleep?")], SamplingParams(16, temperature=0.0))
    sample = Sample(
        prompt("e in sleep?").token_ids, completion.token_ids, completion.logprobs, 0.0, completion.experts_TLK
    )
    assert completion.token_ids
    greedy = parts.learner.score([sample], near_tie_margin=NEAR_TIE, temperature=1.0).parity
    assert greedy.routing_agreement == 1.0
    fresh.stop()
