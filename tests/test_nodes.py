"""Two learner ranks and two samplers over two Ray nodes: the gradient of one rank, and a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.ray_network import ALLOWED
from posttrain.recipe import AlgorithmSection, GrpoRecipe, LearnerSection
from posttrain.recipe_file import load_recipe
from posttrain.types import Sample
from tests.stage_commands import GRPO, REWARD

PLACES = [
    f"{role}.{change}"
    for role in ("learner", "sampler")
    for change in ("num_workers=2", "placement=strict_spread", "resources={slots: 0.5}")
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two Ray nodes with raylets of their own on the loopback network."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "resources": {"slots": 1}}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def recipe(cluster: Any, policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> GrpoRecipe:
    path = tmp_path_factory.mktemp("nodes")
    (path / "reward.py").write_text(REWARD)
    (path / "grpo.yaml").write_text(GRPO % (policy_path, path / "reward.py"))
    found = load_recipe(
        path / "grpo.yaml",
        [*PLACES, f"ray_address={cluster.address}", f"output_dir={path / 'run'}", "max_steps=2"],
    )
    assert isinstance(found, GrpoRecipe)
    return found


@pytest.mark.slow
def test_two_ranks_and_two_samplers_on_two_nodes(
    recipe: GrpoRecipe, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOWED, "1")  # both nodes are this machine, and the cluster lives as long as the test
    from posttrain import grpo, grpo_setup
    from posttrain.interrupt import graceful_stop
    from posttrain.progress import Progress

    algorithm = AlgorithmSection(beta=0.05)
    with graceful_stop() as stop, grpo_setup.start(recipe, resume=False) as job:
        samples = scored(job, sampled(job))
        job.learner.forward_backward(samples, algorithm)
        spread = job.learner.gradients()
        job.learner._on_all("drop_gradients")
        with Progress("grpo", recipe.max_steps) as progress:
            grpo.train(job, stop, progress)
        job.finish(None, None)
    alone = gradients_of_one_rank(recipe, policy_path, samples, algorithm)
    assert spread.keys() == alone.keys()
    for name, expected in alone.items():
        assert float((spread[name] - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-3), name

    run = recipe.run_dir
    nodes = json.loads((run / "environment.json").read_text())["nodes"]
    assert len(set(nodes["learner"])) == len(set(nodes["sampler"])) == 2
    assert set(nodes["learner"]) == set(nodes["sampler"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 2
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert metrics["parity/logprob_abs_max"] < 1e-4 and metrics["optim/grad_norm"] > 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learner"]["resources"] == {"slots": 0.5}


def sampled(job: Any) -> list[Sample]:
    """Completions of both samplers."""
    prompts = job.take_prompts(6)
    groups = job.generate(prompts, replace(job.sampling, seed=None))
    return [
        Sample(prompt.token_ids, c.token_ids, c.logprobs, (-1.0) ** index, c.experts_TLK)
        for prompt, group in zip(prompts, groups, strict=True)
        for index, c in enumerate(group)
    ]


def scored(job: Any, samples: list[Sample]) -> list[Sample]:
    scores = job.learner.score(samples, near_tie_margin=1e-5)
    assert scores.parity.gap_max < 1e-4
    return [
        replace(sample, old_logprobs=scores.logprobs[index], ref_logprobs=scores.ref_logprobs[index])
        for index, sample in enumerate(samples)
    ]


def gradients_of_one_rank(
    recipe: GrpoRecipe, policy_path: Path, samples: list[Sample], algorithm: AlgorithmSection
) -> dict[str, Any]:
    from posttrain.learner import Learner
    from posttrain.packing import pack

    learner = Learner(
        recipe.model,
        recipe.optimizer,
        LearnerSection(num_threads=1),
        reference_path=str(policy_path),
        router_section=recipe.router,
        temperature=recipe.rollout.temperature,
        max_completion_length=recipe.rollout.max_completion_length,
        total_steps=1,
        seed=0,
    )
    (batch,) = pack(samples, world_size=1, max_tokens_per_microbatch=4096, row_length=128, pad_token_id=0)
    learner.forward_backward(batch, algorithm)
    return learner.gradients()
