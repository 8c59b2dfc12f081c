"""What the doctor tries out, each in a process of its own with a time limit: `python -m posttrain.doctor_probes NAME`.

    libraries   torch, transformers and TRL are imported; does torch see the GPU?
    ray         a local Ray (or that of RAY_ADDRESS) starts an actor whose reward judges one answer
    parity      a tiny DeepSeek-V3 in vLLM and in transformers: the logprobs of the same tokens
    sandbox     python -m rewards.sandbox: programs run, and what they must not do is stopped

A probe prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from posttrain.doctor_machine import Finding, gpus
from posttrain.recipe import Recipe

SECONDS = {"libraries": 120, "ray": 120, "parity": 300, "sandbox": 60}
MAX_GAP = 1e-3  # nats; a wrong kernel is apart by 0.1 and more, rounding by 1e-5
TINY = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
CODE_REWARDS = ("code_tests", "rewards.sandbox")


def probes(recipe: Recipe | None) -> Iterator[Finding]:
    """Run all of them, the one after the other.

    Args:
        recipe: says whether the sandbox is needed; None: it may be missing.
    """
    yield _libraries()
    yield _ray()
    yield _parity()
    yield _sandbox(needed=recipe is not None and any(name in repr(recipe) for name in CODE_REWARDS))


def _libraries() -> Finding:
    found, problem = _run("libraries")
    if found is None:
        return Finding("fail", "libraries", problem, "make setup; if torchvision is named, uninstall it")
    if gpus() and not found["cuda"]:
        return Finding("fail", "libraries", f"torch {found['torch']} sees no GPU", "make setup PLATFORM=cuda")
    device = "sees the GPU" if found["cuda"] else "on the CPU"
    return Finding("ok", "libraries", f"torch {found['torch']} {device}, transformers {found['transformers']}")


def _ray() -> Finding:
    found, problem = _run("ray")
    if found is None:
        return Finding(
            "fail", "ray", problem, "look at /dev/shm, free memory and RAY_ADDRESS above; see docs/trouble.md"
        )
    return Finding("ok", "ray", f"an actor judged an answer, {found['seconds']:.1f} s")


def _parity() -> Finding:
    found, problem = _run("parity")
    if found is None:
        return Finding(
            "fail", "vllm starts", problem, "make setup; free memory (1 GiB of KV cache); see docs/trouble.md"
        )
    text = f"{found['seconds']:.1f} s, largest gap to transformers {found['gap']:.1e} nats"
    if found["gap"] > MAX_GAP:
        return Finding(
            "fail", "vllm starts", text, "this vLLM computes another policy here: install the pinned version"
        )
    return Finding("ok", "vllm starts", text)


def _sandbox(*, needed: bool) -> Finding:
    words = [sys.executable, "-m", "rewards.sandbox"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=SECONDS["sandbox"], cwd=_root()
        )
        problem = "" if done.returncode == 0 else (_last(done.stderr) or _last(done.stdout))
    except subprocess.TimeoutExpired:
        problem = f"no answer within {SECONDS['sandbox']} s"
    if not problem:
        return Finding("ok", "sandbox", "programs run, and what they must not do is stopped")
    cure = "apt-get install bubblewrap; see docs/sandbox.md"
    if needed:
        return Finding("fail", "sandbox", problem, cure)
    return Finding("warn", "sandbox", f"{problem} (only rewards that run programs need it)", cure)


def _run(name: str) -> tuple[dict[str, Any] | None, str]:
    """What a probe printed, or None and why there is nothing."""
    words = [sys.executable, "-m", "posttrain.doctor_probes", name]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=SECONDS[name], cwd=_root(), env=_environment()
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS[name]} s"
    if done.returncode:
        return None, _last(done.stderr) or f"ended with exit code {done.returncode}"
    try:
        found: dict[str, Any] = json.loads(_last(done.stdout))
    except ValueError:
        return None, f"printed {_last(done.stdout)!r:.80}"
    return found, ""


def _environment() -> dict[str, str]:
    from posttrain.cli import QUIET

    return {**QUIET, **os.environ}


def _last(text: str) -> str:
    """The last line with something in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


# --- in the probe's process -------------------------------------------------------------------------------------------


def try_libraries() -> dict[str, Any]:
    """Import what every stage stands on."""
    import torch
    import transformers
    import trl

    assert transformers.DeepseekV3ForCausalLM and trl.SFTTrainer
    return {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "transformers": transformers.__version__}


def try_ray() -> dict[str, Any]:
    """Connect, start an actor and its warden, judge an answer, stop."""
    from posttrain.cluster import session
    from posttrain.recipe import RewardSection
    from posttrain.reward_pool import RewardPool
    from posttrain.types import Completion, Prompt

    start = time.perf_counter()
    with session(None, 1):
        pool = RewardPool([RewardSection(func="rewards.exact:score", kwargs={"answer_tags": False})])
        prompt = Prompt("doctor", ({"role": "user", "content": "1+1="},), (1,), "2")
        scored = pool.score([prompt], [[Completion((1,), (0.0,), "stop", "2", 0)]])
        pool.stop()
    if scored.groups[0].rewards != (1.0,):
        raise SystemExit(f"the reward of a right answer came back as {scored.groups[0].rewards}")
    return {"seconds": time.perf_counter() - start}


def try_parity() -> dict[str, Any]:
    """Logprobs of the same tokens by vLLM and by transformers."""
    from posttrain.sampler import Sampler, engine_environment

    os.environ.update(engine_environment(1, 1))  # before anything imports vLLM or torch
    import torch

    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, save_policy
    from posttrain.sections import BuildSection

    start = time.perf_counter()
    tokenizer = build_tokenizer()
    policy = build_policy(BuildSection.model_validate(TINY).model_dump(), tokenizer, seed=0)
    with TemporaryDirectory() as path:
        save_policy(policy, tokenizer, path)
        sampler = Sampler(
            path,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=4,
            gpu_memory_utilization=0.1,
            trust_remote_code=False,
            seed=0,
        )
        ids = torch.randint(11, len(tokenizer), (4, 32), generator=torch.Generator().manual_seed(0))
        theirs = torch.tensor([logprobs for logprobs, _ in sampler.prompt_logprobs(ids.tolist())])
    with torch.no_grad():
        logprobs = torch.log_softmax(policy.float()(ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    ours = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    return {"gap": float((ours - theirs).abs().max()), "seconds": time.perf_counter() - start}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {"libraries": try_libraries, "ray": try_ray, "parity": try_parity}


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
