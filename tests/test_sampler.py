"""The vLLM engine on its own: what it samples from, and what happens when weights change under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stage_commands import ROOT

# vLLM keeps its memory until its process ends, so each engine gets one.
PRELUDE = """
import json, os, sys, threading, time
import torch
from posttrain.sampler import Sampler, engine_environment
os.environ.update(engine_environment(1, 1))
from transformers import AutoModelForCausalLM
from posttrain.losses import token_logprobs
from posttrain.model.load import checkpoint_tensors
from posttrain.types import Prompt, SamplingParams

path = sys.argv[1]
sampler = Sampler(
    path, dtype="float32", max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.5, trust_remote_code=False, seed=0,
    max_candidates=8,
)
policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

def changed(scale):
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(scale)
    return other

@torch.no_grad()
def learner(model, prompt, completion, temperature=1.0, candidates=None):
    ids_RW = torch.tensor([[*prompt, *completion.token_ids]])
    if candidates is not None:
        blank = torch.full((1, len(prompt), candidates.shape[1]), -1, dtype=torch.int32)
        candidates = torch.cat([blank, torch.from_numpy(candidates)[None]], dim=1)
    logprobs_RW, _ = token_logprobs(model(ids_RW, use_cache=False).logits, ids_RW, temperature, candidates_RWC=candidates)
    return logprobs_RW[0, len(prompt):]

def gap(model, prompt, completion, **settings):
    return float((learner(model, prompt, completion, **settings) - torch.tensor(completion.logprobs)).abs().max())

def replayed(completions, models):
    # Each token's logprob under the version that is said to have sampled it.
    answer = []
    for c in completions:
        versions = torch.tensor(c.token_versions or (c.policy_version,) * len(c.token_ids))
        of_version = torch.stack([learner(model, ids[:9], c) for model in models])
        theirs = torch.tensor(c.logprobs)
        gaps = {int(v): float((of_version[v] - theirs)[versions == v].abs().max()) for v in versions.unique()}
        # The token before or after a change, under the other version.
        changes = (versions[1:] != versions[:-1]).nonzero().flatten() + 1
        crossed = [float((of_version[versions[i - 1], i] - theirs[i]).abs()) for i in changes.tolist()]
        answer.append({"versions": versions.tolist(), "first": c.policy_version, "gaps": gaps, "crossed": crossed,
                       "experts": list(c.experts_TLK.shape)})
    return answer

ids = tuple(int(x) for x in torch.randint(4, 90, (200,), generator=torch.Generator().manual_seed(0)))
"""


def in_a_process(path: Path, code: str, environment: Mapping[str, str] | None = None, status: int = 0) -> Any:
    words = [sys.executable, "-c", PRELUDE + code, str(path)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == status, done.stderr
    # Behind it may be what vLLM's worker processes had to say.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith(("{", "["))))


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which vLLM caches prefixes on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data.chat import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_truncated_sampling_is_scored_as_it_was_sampled(policy_path: Path) -> None:
    found = in_a_process(
        policy_path,
        """
params = SamplingParams(24, temperature=0.7, top_p=0.8, top_k=8, num_generations=4)
completions = sampler.generate([Prompt("a", (), ids[:9])], params)[0]
seeded = SamplingParams(12, num_generations=3, seed=5)
alone = sampler.generate([Prompt("b", (), ids[:9])], seeded)[0]
beside = sampler.generate([Prompt("a", (), ids[:9]), Prompt("b", (), ids[:9])], seeded)
assert [c.token_ids for c in alone] == [c.token_ids for c in beside[1]] != [c.token_ids for c in beside[0]]
assert len({c.token_ids for c in alone}) == 3
print(json.dumps({
    "with": max(gap(policy, ids[:9], c, temperature=0.7, candidates=c.candidates_TC) for c in completions),
    "without": max(gap(policy, ids[:9], c, temperature=0.7) for c in completions),
    "sizes": [int((row >= 0).sum()) for c in completions for row in c.candidates_TC],
    "sampled": all(t in row for c in completions for t, row in zip(c.token_ids, c.candidates_TC)),
}))
""",
    )
    assert found["with"] < 1e-4 < 0.1 < found["without"]
    assert found["sampled"] and max(found["sizes"]) <= 8 and len(set(found["sizes"])) > 1


def test_new_weights_meet_no_old_cache(dense_path: Path) -> None:
    """The same long prompt before and after an update: a cached prefix would be the old policy's."""
    found = in_a_process(
        dense_path,
        """
params, prompt = SamplingParams(8, num_generations=2), Prompt("a", (), ids)
before = [gap(policy, ids, c) for _ in range(2) for c in sampler.generate([prompt], params)[0]]
other = changed(1.3)
sampler.update_weights(list(checkpoint_tensors(other)), 1)
after = sampler.generate([prompt], params)[0]
cached = sampler._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
print(json.dumps([max(before), max(gap(other, ids, c) for c in after), max(gap(policy, ids, c) for c in after), cached]))
""",
    )
    assert found[3], "the model was to be one whose prefixes are cached"
    assert found[0] < 1e-4 and found[1] < 1e-4 < 1e-2 < found[2]


@pytest.mark.parametrize("recompute", [True, False])
def test_an_update_while_sampling_leaves_every_token_its_version(policy_path: Path, recompute: bool) -> None:
    found = in_a_process(
        policy_path,
        f"""
recompute = {recompute}
"""
        """
params = SamplingParams(400, num_generations=8)
sampler.generate([Prompt("warm", (), ids[:9])], SamplingParams(4))
models = [policy, changed(1.2), changed(1.4)]
# The engine waits for each update at a step of its own, however fast it samples.
engine, steps, sampled, updating = sampler._llm.llm_engine, iter(range(10**6)), threading.Semaphore(0), threading.Event()
one_step = engine.step
def step():
    outputs = one_step()
    if not updating.is_set() and next(steps) in (10, 20):
        sampled.release()
        while not sampler._loop._interruptions:
            time.sleep(0.001)
    return outputs
engine.step = step
result = []
thread = threading.Thread(target=lambda: result.extend(sampler.generate([Prompt("a", (), ids[:9])], params)[0]))
thread.start()
for version in (1, 2):
    assert sampled.acquire(timeout=60)
    updating.set()
    sampler.update_weights(list(checkpoint_tensors(models[version])), version, recompute=recompute)
    assert sampler.prompt_logprobs([ids[:20]])[0][1].shape[0] == 19  # a canary, beside what is generated
    updating.clear()
thread.join()
print(json.dumps(replayed(result, models)))
""",
    )
    check_versions(found, recompute)


@pytest.mark.parametrize("recompute", [True, False])
def test_groups_that_are_carried_over_publications(policy_path: Path, recompute: bool) -> None:
    """Two groups are begun and hurried after ten steps, twice; the policy changes while the engine stands still."""
    found = in_a_process(
        policy_path,
        f"""
recompute = {recompute}
"""
        """
params = SamplingParams(60, num_generations=3)
models = [policy, changed(1.2), changed(1.4)]
engine, steps = sampler._llm.llm_engine, 0
one_step = engine.step
def step():
    global steps
    steps += 1
    if steps in (10, 20):
        sampler.hurry()
    return one_step()
engine.step = step
new, result = [(7, Prompt("a", (), ids[:9])), (8, Prompt("b", (), ids[:9]))], {}
for version in (1, 2):
    result |= dict(sampler.collect(new, params, {7, 8} - result.keys(), 2))
    assert steps == 10 * version
    sampler.update_weights(list(checkpoint_tensors(models[version])), version, recompute=recompute)
    new = []
left = {7, 8} - result.keys()
first = dict(sampler.collect([(9, Prompt("c", (), ids[:9]))], params, {*left, 9}, 1, due=left))
assert left <= first.keys()
result |= first | dict(sampler.collect([], params, {7, 8, 9} - result.keys() - first.keys(), 1))
assert not sampler._groups and not sampler._loop.finished and result.keys() == {7, 8, 9}
assert all(c.policy_version == 2 for c in result.pop(9))
print(json.dumps(replayed([c for group in result.values() for c in group], models)))
""",
    )
    check_versions(found, recompute)


def check_versions(found: list[dict[str, Any]], recompute: bool) -> None:
    assert any(len(set(one["versions"])) == 3 for one in found), "no update came while sampling"
    for one in found:
        assert one["versions"] == sorted(one["versions"]) and one["first"] == one["versions"][0] == 0
        assert one["experts"][0] == 9 + len(one["versions"]) - 1
        for version, value in one["gaps"].items():
            if recompute or version == "0":
                assert value < 1e-4, (version, value)
            else:
                assert value > 1e-4  # the cache still is the old policy's
    if recompute:
        assert max(value for one in found for value in one["crossed"]) > 1e-3  # a token more or less would be seen
