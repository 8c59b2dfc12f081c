"""The rollout engine: vLLM behind four calls, `generate`, `prompt_logprobs`, `update_weights` and `version`.

With `speculative_tokens` the checkpoint's multi-token prediction module drafts tokens that the policy verifies: the same
text, in fewer steps where drafts are accepted (`speculation_counts`).

The engine lives in the calling process (a Ray actor in the pipeline, a plain process in tests). Logprobs are those of the
distribution that is sampled from (temperature, top-p and top-k applied): vLLM's default would ignore all three.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    import torch


def engine_environment(num_threads: int, kv_cache_gib: float) -> dict[str, str]:
    """Environment variables that must be set before vLLM is imported in the engine's process."""
    return {
        # The engine is stepped by its caller: half the start-up time, and a crash takes the whole actor down.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # An explicit size skips the memory profiling run. Whole GiB is all that vLLM takes.
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_cache_gib))),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": str(num_threads),
        # The learner shares the cores: idle threads must sleep, not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@dataclass(frozen=True, slots=True)
class SpeculationCount:
    """What became of the tokens drafted for one completion, by vLLM's own count."""

    drafted: int  # verified by the policy
    accepted: int


class Sampler:
    """One vLLM engine that holds one version of the policy.

    Args:
        speculative_tokens: drafted per step by the checkpoint's multi-token prediction module; 0 does without. On CPU
            such a sampler is greedy only, see `require_exact`.

    Raises:
        ValueError: there is no such module.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        trust_remote_code: bool,
        seed: int,
        speculative_tokens: int = 0,
    ) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {}
        self._on_cpu = current_platform.is_cpu()
        if self._on_cpu:
            # vLLM's CPU kernel for interleaved rotary embedding computes wrong queries; its PyTorch code is right.
            settings["compilation_config"] = {"custom_ops": ["none"]}
            settings["enforce_eager"] = True
        else:
            settings["gpu_memory_utilization"] = gpu_memory_utilization
            settings["enable_return_routed_experts"] = True
        if speculative_tokens:
            from posttrain.model.mtp import require_mtp

            require_mtp(model_path)
            settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": speculative_tokens}
            settings["per_request_spec_decode_metrics"] = "summary"
        self._llm = LLM(
            model=model_path,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            trust_remote_code=trust_remote_code,
            seed=seed,
            logprobs_mode="processed_logprobs",
            worker_extension_cls="posttrain.vllm_extension.WorkerExtension",
            **settings,
        )
        self._engine = self._llm.llm_engine
        self._ids = itertools.count()
        self._max_model_len = max_model_len
        self._num_moe_layers = self._rpc("start_routing_capture") if self._on_cpu else 0
        self._speculative_tokens = speculative_tokens
        self._speculation: list[SpeculationCount] = []
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """Sample `params.num_generations` completions of every prompt.

        Returns:
            For each prompt, in order, its completions.

        Raises:
            ValueError: a prompt leaves no room for a single token, or see `require_exact`.
        """
        import vllm

        require_exact(params, self._speculative_tokens, on_cpu=self._on_cpu)
        requests: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            room = self._max_model_len - len(prompt.token_ids) - 1
            if room < 1:
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens and sampler.max_model_len is "
                    f"{self._max_model_len}: no room for an answer; raise sampler.max_model_len or drop the prompt"
                )
            drawn = vllm.SamplingParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=min(params.max_completion_length, room),
                logprobs=0,
            )
            for _ in range(params.num_generations):
                request_id = str(next(self._ids))
                self._engine.add_request(request_id, {"prompt_token_ids": list(prompt.token_ids)}, drawn)
                requests[request_id] = index
        completions: list[list[Completion]] = [[] for _ in prompts]
        finished = self._run(requests)
        self._speculation = [_speculation(finished[request_id].outputs[0]) for request_id in requests]
        for request_id, index in requests.items():
            output = finished[request_id].outputs[0]
            completions[index].append(self._completion(request_id, prompts[index], output))
        return completions

    def speculation_counts(self) -> list[SpeculationCount]:
        """Of each completion of the last `generate`, in order; zeros without speculation."""
        return self._speculation

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], np.ndarray | None]]:
        """Score given tokens at temperature 1.

        Returns:
            For each sequence of T tokens, the T - 1 logprobs of its tokens given those before, and the experts of its
            first T - 1 tokens, int16 [T - 1, L, K] (None for a dense model).
        """
        import vllm

        scored = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
        requests: dict[str, int] = {}
        for index, sequence in enumerate(sequences):
            request_id = str(next(self._ids))
            self._engine.add_request(request_id, {"prompt_token_ids": list(sequence)}, scored)
            requests[request_id] = index
        finished = self._run(requests)
        result = []
        for request_id, index in requests.items():
            output, tokens = finished[request_id], sequences[index][1:]
            logprobs = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens, strict=True)]
            result.append((logprobs, self._experts(request_id, len(tokens), output.outputs[0])))
        return result

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load a whole set of weights (Hugging Face names) in place of the present ones.

        A drafting module keeps the weights it was started with, whatever is given: what is sampled is the new policy's
        all the same, only fewer drafts may be accepted.
        """
        self._rpc("load_weights_in_place", weights)
        self.version = version

    def _run(self, requests: dict[str, int]) -> dict[str, Any]:
        finished: dict[str, Any] = {}
        while len(finished) < len(requests):
            for output in self._engine.step():
                if output.finished:
                    finished[output.request_id] = output
        return finished

    def _completion(self, request_id: str, prompt: Prompt, output: Any) -> Completion:
        tokens = tuple(output.token_ids)
        logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True))
        # The last sampled token was never fed through the model.
        experts = self._experts(request_id, len(prompt.token_ids) + len(tokens) - 1, output)
        return Completion(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            text=output.text,
            policy_version=self.version,
            experts_TLK=experts,
        )

    def _experts(self, request_id: str, num_tokens: int, output: Any) -> np.ndarray | None:
        if self._on_cpu:
            return self._rpc("take_routing", request_id, num_tokens) if self._num_moe_layers else None
        return None if output.routed_experts is None else np.asarray(output.routed_experts, np.int16)[:num_tokens]

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]


def require_exact(params: SamplingParams, speculative_tokens: int, *, on_cpu: bool) -> None:
    """Refuse what vLLM would sample from a wrong distribution, and give wrong logprobs for.

    On CPU, vLLM 0.32 spreads the requests' temperatures over drafted tokens into a copy that it throws away
    (`_expand_kernel_impl` in cpu_triton_utils.py), so drafts are verified at whatever temperature the memory holds.
    Greedy requests need none and are exact.

    Raises:
        ValueError: drafting at a temperature above 0 on CPU.
    """
    if speculative_tokens and on_cpu and params.temperature > 0:
        raise ValueError(
            f"temperature={params.temperature:g} with speculative_tokens={speculative_tokens}: on CPU vLLM verifies drafts "
            f"at a wrong temperature; set temperature 0, or speculative_tokens 0"
        )


def _speculation(output: Any) -> SpeculationCount:
    metrics = output.spec_decode_metrics
    if metrics is None:
        return SpeculationCount(0, 0)
    return SpeculationCount(
        metrics.num_draft_tokens, sum(accepted * steps for accepted, steps in enumerate(metrics.histogram))
    )
