"""A sampler of two devices: vLLM's own worker processes, on a CPU, against one device and transformers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sampler import in_a_process

from posttrain.errors import ParityError
from posttrain.sampler import engine_environment
from posttrain.wire import digest_of_all

# Both engines in one process: that on one device computes in it, the other one in two worker processes.
TWO = """
from posttrain.shared_names import mapped_names
from posttrain.wire import Digest, WireTensor

def processes():
    found = []
    for task in os.listdir(f"/proc/{os.getpid()}/task"):
        found += open(f"/proc/{os.getpid()}/task/{task}/children").read().split()
    return [int(child) for child in found if b"VLLM::Worker" in open(f"/proc/{child}/cmdline", "rb").read()]

def digest(weights):
    found = Digest()
    found.add([WireTensor.of(name, tensor) for name, tensor in weights])
    return found.hexdigest()

several = Sampler(
    path, dtype="float32", max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.5, trust_remote_code=False, seed=0,
    tensor_parallel_size=2, enable_expert_parallel=EXPERTS,
)
params, prompt = SamplingParams(24, num_generations=4), Prompt("a", (), ids[:9])
def shared():
    return [*mapped_names(), *(name for names in several._rpc_all("shared_names") for name in names)]

found = {"processes": len(processes()), "names": shared()}

def same(ours_TLK, theirs_TLK):
    return ours_TLK.shape == theirs_TLK.shape and ours_TLK.shape[1:] == (1, 2) and not (ours_TLK - theirs_TLK).any()

def compared(model):
    completions = several.generate([prompt], params)[0]
    rows = [(*ids[:9], *c.token_ids) for c in completions]
    one = sampler.prompt_logprobs(rows)
    two = several.prompt_logprobs(rows)
    return {
        "transformers": max(gap(model, ids[:9], c) for c in completions),
        "one_device": max(abs(a - b) for (ours, _), (theirs, _) in zip(one, two) for a, b in zip(ours, theirs)),
        "experts": [same(ours, theirs) for (_, ours), (_, theirs) in zip(one, two)],
        "sampled_experts": [same(c.experts_TLK, theirs) for c, (_, theirs) in zip(completions, two)],
        "version": [c.policy_version for c in completions],
    }

found["before"] = compared(policy)
other = changed(1.2)
weights = list(checkpoint_tensors(other))
sampler.update_weights(weights, 1)
found["digests"], found["sent"] = several.update_weights(iter(weights), 1), digest(weights)
found["after"] = compared(other)
found["stale"] = gap(policy, ids[:9], several.generate([prompt], params)[0][0])
"""

REST = """
# A publication between two steps of what is being generated.
models = [policy, other, changed(1.4)]
engine, count, reached = several._llm.llm_engine, iter(range(10**6)), threading.Event()
one_step = engine.step
def step():
    outputs = one_step()
    if next(count) == 10:
        reached.set()
        while not several._loop._interruptions:
            time.sleep(0.001)
    return outputs
engine.step = step
result = []
thread = threading.Thread(target=lambda: result.extend(several.generate([prompt], SamplingParams(60, num_generations=8))[0]))
thread.start()
assert reached.wait(60)
several.update_weights(checkpoint_tensors(models[2]), 2, recompute=True)
thread.join()
engine.step = one_step
found["in_flight"] = replayed(result, models)

# One worker that misses a publication; the other one has it.
def deafen(worker):
    if worker.rank == 1:
        worker.worker.load_bucket = lambda bucket: None
several._llm.collective_rpc(deafen)
found["missed"], found["new"] = several.update_weights(checkpoint_tensors(policy), 3), digest(list(checkpoint_tensors(policy)))
"""

END = """
found["workers"] = processes()
print(json.dumps(found), flush=True)
"""

# The worker that missed the publication fails in the first step, and the other one waits for it in a collective operation.
KILLED = """
threading.Thread(target=lambda: several.generate([prompt], SamplingParams(400, num_generations=8))).start()
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def found(policy_path: Path) -> Any:
    code = TWO.replace("EXPERTS", "False") + REST + END + KILLED
    return in_a_process(policy_path, code, engine_environment(1, 1, 2), status=-signal.SIGKILL)


def check_agreement(found: dict[str, Any]) -> None:
    assert found["processes"] == 2 and found["names"] == []  # in /dev/shm, which nobody can leave behind then
    for when, version in (("before", 0), ("after", 1)):
        there = found[when]
        assert there["transformers"] < 1e-5 and there["one_device"] < 1e-5, there
        assert all(there["experts"]) and all(there["sampled_experts"]), there
        assert set(there["version"]) == {version}
    assert found["digests"] == [found["sent"]] * 2
    assert found["stale"] > 1e-3


def test_two_devices_agree_with_one_before_and_after_a_publication(found: dict[str, Any]) -> None:
    check_agreement(found)


def test_a_publication_comes_between_two_steps_of_all_workers(found: dict[str, Any]) -> None:
    versions = {version for one in found["in_flight"] for version in one["versions"]}
    assert versions == {1, 2}
    for one in found["in_flight"]:
        assert max(one["gaps"].values()) < 1e-4


def test_a_worker_that_missed_a_publication_is_seen(found: dict[str, Any]) -> None:
    first, second = found["missed"]
    assert first == found["new"] != second
    assert digest_of_all(found["new"], found["new"], found["missed"]) == second  # so the receipt is not valid


def test_nothing_is_left_of_a_killed_sampler(found: dict[str, Any]) -> None:
    assert len(found["workers"]) == 2
    wait_for(lambda: not any(map(is_running, found["workers"])), 20)


def is_running(pid: int) -> bool:
    """Not gone, and not waiting for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_publications_to_a_sampler_of_two_devices_in_ray(policy_path: Path) -> None:
    """A learner's weights with receipt and canary, a publication that is skipped, an actor that is killed and replaced."""
    from test_cluster import NEAR_TIE, Parts

    from posttrain.cluster import session

    names = set(Path("/dev/shm").glob("psm_*"))
    with session(None, 4):
        parts = Parts(policy_path, skip_version=2, tensor_parallel_size=2)
        parts.publisher.publish(0)
        for version in (1, 2):
            parts.step(parts.rollout())
            if version == 2:
                with pytest.raises(ParityError, match="answers exactly as version 1 did: version 2 was never loaded"):
                    parts.publisher.publish(2)
            else:
                parts.publisher.publish(1)
        (receipt,) = parts.publisher.publish(3)
        assert receipt.valid and receipt.canary.gap_max < 1e-4
        parity = parts.learner.score(parts.rollout(), near_tie_margin=NEAR_TIE).parity
        assert parity.gap_max < 1e-4 and parity.routing_agreement >= 0.9999
        workers = our_workers()
        assert len(workers) == 2
        os.kill(parent_of(workers[0]), signal.SIGKILL)
        wait_for(lambda: not any(map(is_running, workers)), 30)
        wait_for(lambda: parts.samplers.fleet.restarts == 1 and parts.samplers.fleet.num_serving == 1, 280)
        assert parts.learner.score(parts.rollout(), near_tie_margin=NEAR_TIE).parity.gap_max < 1e-4
    wait_for(lambda: not our_workers(), 30)
    wait_for(lambda: set(Path("/dev/shm").glob("psm_*")) <= names, 30)


def our_workers() -> list[int]:
    """vLLM's worker processes below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(path.parent.name)
        try:
            if path.read_bytes().startswith(b"VLLM::Worker"):
                ancestor = pid
                while ancestor not in (0, os.getpid()):
                    ancestor = parent_of(ancestor)
                found += [pid] if ancestor else []
        except FileNotFoundError:
            continue
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)


@pytest.mark.slow
def test_whole_experts_on_each_device(policy_path: Path) -> None:
    check_agreement(in_a_process(policy_path, TWO.replace("EXPERTS", "True") + END, engine_environment(1, 1, 2)))
