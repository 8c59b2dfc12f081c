"""The rollout engine: vLLM behind five calls, `generate`, `collect`, `prompt_logprobs`, `update_weights` and `version`.

With `speculative_tokens` the checkpoint's multi-token prediction module drafts tokens that the policy verifies: the same
text, in fewer steps where drafts are accepted (`speculation_counts`).

The engine lives in the calling process (a Ray actor in the pipeline, a plain process in tests). One on several devices
(`tensor_parallel_size`) has a worker process for each of them, which do not outlive it. Logprobs are those of the
distribution that is sampled from (temperature, top-p and top-k applied): vLLM's default would ignore all three.

Several threads may call: generations of one go on beside those of another, and `update_weights` changes the policy under
them between two tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.decoding import completion_text
from posttrain.health import Pulse
from posttrain.layout import require_layout
from posttrain.request_loop import RequestLoop
from posttrain.shared_names import drop_names, mapped_names
from posttrain.threads import thread_environment
from posttrain.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    import torch
    from vllm.logprobs import FlatLogprobs


# Workers on one node meet on it, and nobody else is to reach them: gloo and vLLM would take the host's address.
_ON_THIS_NODE = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads may hang
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def engine_environment(num_threads: int, kv_cache_gib: float, tensor_parallel_size: int = 1) -> dict[str, str]:
    """Environment variables that must be set before vLLM is imported in the engine's process.

    Args:
        num_threads: OpenMP threads of each device on CPU.
        kv_cache_gib: of each device on CPU.
        tensor_parallel_size: devices.
    """
    return {
        # The engine is stepped by its caller: half the start-up time, and a crash takes the whole actor down.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # An explicit size skips the memory profiling run. Whole GiB is all that vLLM takes.
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_cache_gib))),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **thread_environment(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **(_ON_THIS_NODE if tensor_parallel_size > 1 else {}),
    }


@dataclass(frozen=True, slots=True)
class SpeculationCount:
    """What became of the tokens drafted for one completion, by vLLM's own count."""

    drafted: int  # verified by the policy
    accepted: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Completions of one prompt that were begun."""

    prompt: Prompt
    params: SamplingParams
    request_ids: tuple[str, ...]


class Sampler:
    """One vLLM engine that holds one version of the policy.

    Args:
        speculative_tokens: drafted per step by the checkpoint's multi-token prediction module; 0 does without. On CPU
            such a sampler is greedy only, see `require_exact`.
        max_candidates: the largest top_k that will be asked for.
        tensor_parallel_size: devices of this node that the policy is spread over.
        enable_expert_parallel: whether each of them holds whole experts instead of a part of each.

    Raises:
        ValueError: there is no such module, or the policy cannot be spread like that.
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
        max_candidates: int = 0,
        tensor_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
    ) -> None:
        config = _config(model_path, trust_remote_code=trust_remote_code)
        if tensor_parallel_size > 1:
            require_layout(config, tensor_parallel_size, expert_parallel=enable_expert_parallel)
            if speculative_tokens:
                raise ValueError(
                    f"speculative_tokens={speculative_tokens} with tensor_parallel_size={tensor_parallel_size}: drafts are "
                    f"not supported by a sampler of several devices; set one of the two to its default (0 and 1)"
                )
        from vllm import LLM
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {}
        self._on_cpu = current_platform.is_cpu()
        self._devices = tensor_parallel_size
        if tensor_parallel_size > 1:
            settings["tensor_parallel_size"] = tensor_parallel_size
            settings["enable_expert_parallel"] = enable_expert_parallel
            settings["distributed_executor_backend"] = "mp"
        if self._on_cpu:
            # vLLM's CPU kernel for interleaved rotary embedding computes wrong queries; its PyTorch code is right.
            settings["compilation_config"] = {"custom_ops": ["none"]}
            settings["enforce_eager"] = True
            # Experts are recorded as they are computed, which a cached prefix is not.
            settings["enable_prefix_caching"] = not config.get("num_experts_per_tok")
        else:
            settings["gpu_memory_utilization"] = gpu_memory_utilization
            settings["enable_return_routed_experts"] = True
        if speculative_tokens:
            from posttrain.model.mtp import require_mtp

            require_mtp(model_path)
            settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": speculative_tokens}
            settings["per_request_spec_decode_metrics"] = "summary"
        # Each thread that calls OpenMP code has a team of threads of its own, and more of them than there are cores do
        # not spin: one thread does all the work, whoever asks for it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        with _known_to_workers() if tensor_parallel_size > 1 else nullcontext():
            self._llm = self._run(
                LLM,
                model=model_path,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                trust_remote_code=trust_remote_code,
                seed=seed,
                max_logprobs=max(20, max_candidates),
                # A step that has begun would sample with the old weights and be counted as the new version's.
                async_scheduling=False,
                logprobs_mode="processed_logprobs",
                worker_extension_cls="posttrain.vllm_extension.WorkerExtension",
                **settings,
            )
        if tensor_parallel_size > 1:
            drop_names([*mapped_names(), *(name for names in self._rpc_all("shared_names") for name in names)])
            if enable_expert_parallel and self._on_cpu:
                self._rpc("keep_to_own_experts")
        self._engine = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        self._loop = RequestLoop(self._engine, self._run)
        self._max_model_len = max_model_len
        self._num_moe_layers = self._rpc("start_routing_capture") if self._on_cpu else 0
        self._speculative_tokens = speculative_tokens
        self._speculation: list[SpeculationCount] = []
        self._groups: dict[int, _Group] = {}  # begun by `collect` and not returned yet, by ticket
        self._hurries = 0
        self._loaded = 0  # tensors
        self._set_version(0)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """Sample `params.num_generations` completions of every prompt.

        Returns:
            For each prompt, in order, its completions.

        Raises:
            ValueError: a prompt leaves no room for a single token, or see `require_exact`.
        """
        groups = self._begin(prompts, params)
        finished = self._loop.wait([request_id for group in groups for request_id in group.request_ids])
        self._speculation = [_speculation(output.outputs[0]) for output in finished.values()]
        return [self._completions(group, finished) for group in groups]

    def collect(
        self,
        new: Sequence[tuple[int, Prompt]],
        params: SamplingParams,
        tickets: Collection[int],
        count: int,
        due: Collection[int] = (),
    ) -> list[tuple[int, list[Completion]]]:
        """Begin groups, and sample until enough are finished. The others stay as they are, to be gone on with by a later call.

        Args:
            new: (ticket, prompt) pairs to begin; a ticket is the caller's number for a group.
            params: how to draw them.
            tickets: the groups to choose from, the new ones among them.
            count: of groups to finish; all of them where there are fewer.
            due: groups that are to be finished whatever the count.

        Returns:
            The groups that are finished, by ticket: fewer than were asked for if `hurry` was called.

        Raises:
            ValueError: see `generate`.
        """
        begun = self._begin([prompt for _, prompt in new], params)
        self._groups |= dict(zip((ticket for ticket, _ in new), begun, strict=True))
        hurries, count = self._hurries, min(count, len(tickets))

        def ready() -> list[int]:
            return [ticket for ticket in tickets if self._loop.finished >= set(self._groups[ticket].request_ids)]

        def enough() -> bool:
            found = ready()
            return self._hurries > hurries or (len(found) >= count and set(due) <= set(found))

        self._loop.wait_until(enough)
        groups = [(ticket, self._groups.pop(ticket)) for ticket in ready()]
        return [(ticket, self._completions(group, self._loop.take(group.request_ids))) for ticket, group in groups]

    def hurry(self) -> None:
        """Let every `collect` that runs return after the engine's step."""
        self._hurries += 1

    def _begin(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[_Group]:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        require_exact(params, self._speculative_tokens, on_cpu=self._on_cpu)
        for prompt in prompts:
            if self._max_model_len - len(prompt.token_ids) < 2:
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens and sampler.max_model_len is "
                    f"{self._max_model_len}: no room for an answer; raise sampler.max_model_len or drop the prompt"
                )
        groups = []
        with self._loop.between_steps():  # once, rather than between each two of them
            for prompt in prompts:
                drawn = vllm.SamplingParams(
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    max_tokens=min(params.max_completion_length, self._max_model_len - len(prompt.token_ids) - 1),
                    logprobs=params.top_k if params.is_truncated else 0,
                    # Text token by token, and of each logprob's token, would be a tenth of a small model's step.
                    detokenize=False,
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                request_ids = []
                for number in range(params.num_generations):
                    if params.seed is not None:
                        drawn = drawn.clone()
                        drawn.seed = request_seed(params.seed, prompt.id, self.version, number)
                    request_ids.append(self._loop.add(prompt.token_ids, drawn))
                groups.append(_Group(prompt, params, tuple(request_ids)))
        return groups

    def _completions(self, group: _Group, finished: Mapping[str, Any]) -> list[Completion]:
        return [
            self._completion(request_id, group.prompt, finished[request_id].outputs[0], group.params)
            for request_id in group.request_ids
        ]

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
        from vllm.sampling_params import RequestOutputKind

        scored = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        with self._loop.between_steps():
            requests = {self._loop.add(sequence, scored): index for index, sequence in enumerate(sequences)}
        finished = self._loop.wait(list(requests))
        result = []
        for request_id, index in requests.items():
            output, tokens = finished[request_id], sequences[index][1:]
            logprobs = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens, strict=True)]
            result.append((logprobs, self._experts(request_id, len(tokens), output.outputs[0])))
        return result

    def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, *, recompute: bool = False
    ) -> tuple[str, ...]:
        """Load a whole set of weights (Hugging Face names) in place of the present ones.

        What is being generated meanwhile goes on with the new weights from the next token. A drafting module keeps the
        weights it was started with, whatever is given: what is sampled is the new policy's all the same, only fewer drafts
        may be accepted.

        Args:
            weights: (name, tensor) pairs of the whole model.
            version: what the policy is called from now on.
            recompute: compute the cached keys and values of running requests again, with the new weights. Otherwise they
                stay as the old policy left them.

        Returns:
            The digest (posttrain/wire.py) of what each worker process has loaded; none where the engine has no such processes.
        """
        with self._loop.between_steps():
            if self._devices == 1:
                self._rpc("load_weights_in_place", self._counted(weights))
                digests: tuple[str, ...] = ()
            else:
                digests = self._load_in_buckets(self._counted(weights))
            # Else prompts that come again would find the old policy's keys and values.
            self._engine.reset_prefix_cache(reset_running_requests=recompute)
            self._set_version(version)
        return digests

    def _load_in_buckets(self, weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
        from posttrain.weight_buckets import filled, in_buckets

        self._rpc("begin_weights")
        for tensors in in_buckets(weights):
            with filled(tensors) as bucket:
                self._rpc("load_bucket", bucket)
        return tuple(self._rpc_all("end_weights"))

    def pulse(self, *, loading: bool) -> Pulse:
        """How far it is; answered beside whatever else it does. `loading` says that weights are on their way."""
        steps = self._loop.steps
        return Pulse(loading or self._loop.is_wanted, steps + self._loaded, steps, self._loop.tokens)

    def _counted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for weight in weights:
            self._loaded += 1
            yield weight

    def _set_version(self, version: int) -> None:
        self.version = version
        self._engine.engine_core.set_weight_version(str(version))

    def _completion(self, request_id: str, prompt: Prompt, output: Any, params: SamplingParams) -> Completion:
        tokens = tuple(output.token_ids)
        # Each position's entries begin with the token that was sampled.
        logprobs = tuple(output.logprobs.logprobs[start] for start in output.logprobs.start_indices)
        # The last sampled token was never fed through the model.
        experts = self._experts(request_id, len(prompt.token_ids) + len(tokens) - 1, output)
        versions = tuple(int(span.version) for span in output.weight_versions for _ in range(span.start, span.end))
        return Completion(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            text=completion_text(self._tokenizer, prompt.token_ids, tokens, ended=output.finish_reason == "stop"),
            policy_version=versions[0],
            experts_TLK=experts,
            token_versions=versions if len(set(versions)) > 1 else None,
            candidates_TC=_candidates(output.logprobs) if params.is_truncated else None,
        )

    def _experts(self, request_id: str, num_tokens: int, output: Any) -> np.ndarray | None:
        if self._on_cpu:
            return self._rpc("take_routing", request_id, num_tokens) if self._num_moe_layers else None
        return None if output.routed_experts is None else np.asarray(output.routed_experts, np.int16)[:num_tokens]

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._rpc_all(method, *args)[0]

    def _rpc_all(self, method: str, *args: Any) -> list[Any]:
        """A call on the worker of each device. Returns what they answer, by rank."""
        answers: list[Any] = self._run(self._llm.collective_rpc, method, args=args)
        return answers

    def _run(self, call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        return self._thread.submit(call, *args, **settings).result()


def request_seed(seed: int, prompt_id: str, version: int, number: int) -> int:
    """Of one completion of a prompt: the same on every machine, 0 to 2^63 - 1."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{version}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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


def _candidates(logprobs: FlatLogprobs) -> np.ndarray:
    """int32 [T, C]: the tokens that top-k and top-p left, of each position; -1 fills up."""
    kept = []
    for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
        entries = zip(logprobs.token_ids[start:end], logprobs.logprobs[start:end], strict=True)
        kept.append(list(dict.fromkeys(token for token, logprob in entries if logprob > -math.inf)))
    found = np.full((len(kept), max(len(tokens) for tokens in kept)), -1, np.int32)
    for row, tokens in enumerate(kept):
        found[row, : len(tokens)] = tokens
    return found


def _config(model_path: str, *, trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    values: dict[str, Any] = config.get_text_config().to_dict()
    return values


@contextmanager
def _known_to_workers() -> Iterator[None]:
    """Worker processes that are started in the block end with this process (posttrain/vllm_extension.py)."""
    os.environ["POSTTRAIN_ENGINE_PROCESS"] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ["POSTTRAIN_ENGINE_PROCESS"]
