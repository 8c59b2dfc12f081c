"""Real Ray, vLLM and accelerate, and processes of theirs that are killed, stopped or out of memory while they work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from stage_commands import Command, metrics, wait_for_step, write_grpo_recipe

from posttrain.errors import EXIT_TRY_AGAIN, RunInterrupted, RunStopped
from posttrain.fault_log import FaultLog
from posttrain.learner import Learner
from posttrain.recipe import (
    AlgorithmSection,
    GrpoRouterSection,
    LearnerSection,
    ModelSection,
    OptimizerSection,
    ParitySection,
    SamplerSection,
)
from posttrain.types import Completion, Prompt, Sample, SamplingParams

pytestmark = pytest.mark.slow

PARAMS = SamplingParams(160, num_generations=4, seed=5)


class Tight(Learner):
    """A learner on a device with little memory: microbatches beyond a limit fail when some gradient is there already."""

    limit = 10**9  # tokens

    def set_limit(self, tokens: int) -> None:
        self.limit = tokens

    def forward_backward(self, batch: Any, algorithm: Any) -> Any:
        found = super().forward_backward(batch, algorithm)
        if any(microbatch.input_ids_RW.numel() > self.limit for microbatch in batch.microbatches):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found


class Parts:
    """Two samplers, a learner and what is said of faults."""

    def __init__(self, path: Path, directory: Path) -> None:
        from posttrain.cluster import LearnerGroup, SamplerPool
        from posttrain.weights import Publisher, canary_sequences

        class TightGroup(LearnerGroup):
            made_by = "test_faults:Tight"

        model = ModelSection(model_name_or_path=str(path))
        self.log = directory / "faults.jsonl"
        section = SamplerSection(num_workers=2, max_model_len=256, num_threads=1, timeout_seconds=25, slow_factor=0)
        self.samplers = SamplerPool(model, section, 0, report=FaultLog(directory))
        self.learner = TightGroup(
            LearnerSection(num_threads=1, row_length=256, max_tokens_per_microbatch=1024),
            model=model,
            optimizer=OptimizerSection(),
            reference_path=None,
            router_section=GrpoRouterSection(),
            temperature=1.0,
            max_completion_length=160,
            total_steps=1,
            seed=0,
        )
        self.learner.wait_until_ready()
        self.samplers.wait_until_ready()
        canary = canary_sequences(107, 4, 32, seed=0)
        self.publisher = Publisher(self.learner, self.samplers, ParitySection(), canary)
        self.publisher.publish(0)
        self.prompts = [prompt(f"e in sl{'e' * n}p?") for n in range(10)]
        start = time.monotonic()
        self.calm = self.samplers.generate(self.prompts, PARAMS)
        self.seconds = time.monotonic() - start

    def generate_while(self, fault: Callable[[], None]) -> list[list[Completion]]:
        """The same prompts, and a fault in the midst of it."""
        timer = threading.Timer(0.3 * self.seconds, fault)
        timer.start()
        found = self.samplers.generate(self.prompts, PARAMS)
        timer.join()
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, name: str, count: int) -> dict[str, Any]:
        end = time.monotonic() + 120
        while len(self.events(name)) < count:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)
        return self.events(name)[-1]


def prompt(text: str) -> Prompt:
    from data.chat import build_tokenizer, render_prompt

    messages = ({"role": "user", "content": text},)
    return Prompt(text, messages, render_prompt(build_tokenizer(), messages))


def processes(name: str) -> list[psutil.Process]:
    """Of this test's own Ray, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # those that have ended just now, too
            if name in " ".join(process.cmdline()):
                found.append((process.create_time(), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def tokens(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.fixture(scope="module")
def parts(policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    from posttrain.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where workers find `Tight`
        with session(None, num_cpus=3):
            yield Parts(policy_path, tmp_path_factory.mktemp("faults"))


def test_a_killed_sampler_costs_no_sample_and_its_successor_proves_itself(parts: Parts) -> None:
    killed = []

    def kill() -> None:
        killed.append(time.time())
        processes("_SamplerActor")[0].kill()

    assert tokens(parts.generate_while(kill)) == tokens(parts.calm)
    (lost,) = parts.events("sampler_lost")
    assert lost["time"] - killed[0] < 10 and len(lost["serving"]) == 1
    values = parts.samplers.metrics()
    assert values["sampler/requeued_groups"].value >= 1 and values["sampler/restarts"].value == 1

    joined = parts.wait_for("sampler_joined", 1)
    assert joined["sampler"] == 2 and "proved weights of version 0" in joined["text"]
    assert len(parts.samplers.fleet.serving()) == 2
    assert tokens(parts.samplers.generate(parts.prompts, PARAMS)) == tokens(parts.calm)
    receipts = parts.publisher.publish(1)
    assert len(receipts) == 2 and all(receipt.valid and receipt.version == 1 for receipt in receipts)


def test_a_hung_sampler_is_given_up_and_its_prompts_are_done(parts: Parts) -> None:
    parts.publisher.publish(0)
    found = parts.generate_while(lambda: processes("_SamplerActor")[0].send_signal(signal.SIGSTOP))
    assert tokens(found) == tokens(parts.calm)
    assert "has not answered" in parts.events("sampler_lost")[-1]["text"]


def test_a_learner_out_of_memory_takes_less_at_a_time_and_learns_the_same(parts: Parts) -> None:
    samples = [
        Sample(p.token_ids, c.token_ids, c.logprobs, (-1.0) ** n, c.experts_TLK, old_logprobs=c.logprobs)
        for p, group in zip(parts.prompts, parts.calm, strict=True)
        for n, c in enumerate(group)
    ]
    algorithm = AlgorithmSection(beta=0.0)
    parts.learner.forward_backward(samples, algorithm)
    expected = parts.learner.gradients()
    parts.learner._on_all("drop_gradients")
    parts.learner._on_all("set_limit", 600)
    parts.learner.report = FaultLog(parts.log.parent)
    parts.learner.forward_backward(samples, algorithm)
    for name, gradient in parts.learner.gradients().items():
        assert float((gradient - expected[name]).norm()) <= 1e-5 * max(float(expected[name].norm()), 1e-3), name
    (event,) = parts.events("out_of_memory")
    assert event["max_tokens_per_microbatch"] == 512 and "changes no gradient" in event["text"]
    parts.learner._on_all("set_limit", 10)
    with pytest.raises(RunStopped, match="one row already; lower learner.max_tokens_per_microbatch"):
        parts.learner.forward_backward([replace(sample, advantage=1.0) for sample in samples], algorithm)


def test_a_learner_that_is_killed_ends_the_run_in_one_line(parts: Parts) -> None:
    (learner,) = processes("_RankActor")
    threading.Timer(0.5, learner.kill).start()
    time.sleep(1.0)
    with pytest.raises(RunInterrupted, match="a rank of the learner was lost: ActorDiedError.*--resume"):
        parts.publisher.publish(2)


def test_a_sampler_that_is_killed_while_it_starts_interrupts_the_run_and_one_that_cannot_start_ends_it(
    parts: Parts, policy_path: Path
) -> None:
    from posttrain.cluster import SamplerPool

    parts.samplers.stop()  # one of them is starting, in the place of the hung one
    end = time.monotonic() + 60
    while processes("_SamplerActor"):
        assert time.monotonic() < end, processes("_SamplerActor")
        time.sleep(0.1)
    model = ModelSection(model_name_or_path=str(policy_path))
    starting = SamplerPool(model, SamplerSection(max_model_len=256, num_threads=1), 0)
    end = time.monotonic() + 60
    while not (found := processes("_SamplerActor")):
        assert time.monotonic() < end
        time.sleep(0.1)
    threading.Timer(0.5, found[0].kill).start()
    with pytest.raises(RunInterrupted, match="a sampler was lost while it started: ActorDiedError.*--resume"):
        starting.wait_until_ready()
    starting.stop()
    broken = SamplerPool(
        ModelSection(model_name_or_path=str(policy_path / "nowhere")), SamplerSection(num_threads=1), 0
    )
    with pytest.raises(RunStopped, match="(?s)a sampler did not start: .*nowhere"):
        broken.wait_until_ready()
    broken.stop()


def test_a_run_whose_raylet_is_killed_is_restarted_and_ends_as_an_unbroken_one(
    policy_path: Path, tmp_path: Path
) -> None:
    recipe = write_grpo_recipe(tmp_path, policy_path)
    words = ["posttrain.grpo", str(recipe), "rollout.request_seeds=true"]
    code, output = Command(*words, f"output_dir={tmp_path / 'calm'}").finish()
    assert code == 0, output
    out = tmp_path / "broken"
    command = Command(*words, f"output_dir={out}", "--max-restarts", "1")
    wait_for_step(out, command.process)
    raylets = [p for p in psutil.Process(command.process.pid).children(recursive=True) if p.name() == "raylet"]
    os.kill(raylets[0].pid, signal.SIGKILL)
    code, output = command.finish()
    assert code == 0, output
    assert f"exit code {EXIT_TRY_AGAIN}; started again (1 of 1)" in output  # who saw it first, we or Ray, is chance
    assert command.left_behind() == []
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    weights = [directory / "checkpoints/latest/model.safetensors" for directory in (out, tmp_path / "calm")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
