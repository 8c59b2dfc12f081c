"""Memory of one vLLM engine, and how long it takes to generate completions of given lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.architectures import Architecture
from posttrain.planning.hardware import Hardware
from posttrain.planning.quantities import Quantity, count, size
from posttrain.planning.work import expert_parameters, flops_per_token

BYTES = {"float32": 4, "bfloat16": 2}
_LEAST_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Attributes:
        shape: of the policy.
        dtype: of weights and cache.
        gpus: that its weights are spread over (tensor and expert parallel).
        utilization: share of a GPU's memory that it may use.
        max_num_seqs: sequences that it decodes together at most.
        max_model_len: tokens of a sequence at most.
        hardware: what it runs on.
    """

    shape: Architecture
    dtype: str
    gpus: int
    utilization: float
    max_num_seqs: int
    max_model_len: int
    hardware: Hardware

    @property
    def weights_bytes(self) -> float:
        """On one GPU."""
        return self.shape.parameters * BYTES[self.dtype] / self.gpus

    @property
    def token_bytes(self) -> float:
        """KV cache of a token on one GPU. MLA's latent belongs to all heads, so each GPU keeps it whole."""
        whole = self.shape.cache_bytes * BYTES[self.dtype] / 2
        if self.shape.model_type == "deepseek_v3":
            return whole
        return whole / min(self.gpus, self.shape.num_key_value_heads)

    @property
    def cache_bytes(self) -> float:
        """What is left for the cache on one GPU; below 0 the weights do not fit."""
        hardware = self.hardware
        return hardware.memory_gb * 1e9 * self.utilization - hardware.runtime_gb * 1e9 - self.weights_bytes

    def sequences(self, tokens: float) -> int:
        """Sequences of so many tokens that are decoded together."""
        return max(0, min(self.max_num_seqs, int(self.cache_bytes / (self.token_bytes * tokens))))

    def weights_read(self, batch: int) -> float:
        """Bytes of weights that a decoding step of so many sequences reads on one GPU: experts that any of them chose."""
        experts = expert_parameters(self.shape)
        other = self.shape.parameters - experts
        missed = (1 - self.shape.num_experts_per_tok / self.shape.num_experts) ** batch if experts else 0.0
        return (other + experts * (1 - missed)) * BYTES[self.dtype] / self.gpus

    def step_seconds(self, batch: int, context: float) -> float:
        """Of one decoding step: the longer of memory and arithmetic, and what each layer costs however small."""
        hardware = self.hardware
        read = self.weights_read(batch) + batch * context * self.token_bytes
        by_memory = read / (hardware.memory_gbps * 1e9 * hardware.decode_efficiency)
        work = batch * flops_per_token(self.shape, 1, 1.0) / self.gpus
        by_arithmetic = work / (hardware.flops(self.dtype) * hardware.prefill_efficiency)
        return max(by_memory, by_arithmetic) + self.shape.num_hidden_layers * hardware.layer_overhead_us * 1e-6

    def prefill_seconds(self, prompt_tokens: float, prompts: float) -> float:
        """Of reading so many prompts."""
        work = prompts * prompt_tokens * flops_per_token(self.shape, round(prompt_tokens), 0.0) / self.gpus
        return work / (self.hardware.flops(self.dtype) * self.hardware.prefill_efficiency)


def smallest_engine(engine: Engine) -> Engine:
    """The engine on as few GPUs, a power of two, as hold its weights and a cache for a few of the longest sequences."""
    while engine.gpus < 1024 and engine.sequences(engine.max_model_len) < min(_LEAST_SEQUENCES, engine.max_num_seqs):
        engine = replace(engine, gpus=2 * engine.gpus)
    return engine


def engine_memory(engine: Engine, mean_tokens: float) -> list[Quantity]:
    """Bytes on one GPU of the engine, and what they are good for."""
    shape, hardware, bytes_each = engine.shape, engine.hardware, BYTES[engine.dtype]
    if shape.model_type == "deepseek_v3":
        layers, latent = shape.num_hidden_layers, shape.kv_lora_rank + shape.qk_rope_head_dim
        per_token = (
            f"{layers} layers x ({shape.kv_lora_rank} latent + {shape.qk_rope_head_dim} rotary = {latent}) x {bytes_each}, "
            f"whole on each GPU"
        )
    else:
        per_token = (
            f"2 x {shape.num_hidden_layers} layers x {shape.num_key_value_heads} heads x {shape.head_dim} x {bytes_each} / "
            f"{min(engine.gpus, shape.num_key_value_heads)} GPUs"
        )
    cache = max(0.0, engine.cache_bytes)
    fits = engine.sequences(mean_tokens)
    return [
        Quantity(
            "weights", engine.weights_bytes, "bytes",
            f"{count(shape.parameters)} parameters x {bytes_each} / {engine.gpus} GPUs", f"sampler dtype {engine.dtype}",
        ),
        Quantity("KV cache of a token", engine.token_bytes, "bytes", per_token, "posttrain/architectures.py"),
        Quantity(
            "KV cache", cache, "bytes",
            f"{hardware.memory_gb:g} GB x {engine.utilization:g} - runtime {hardware.runtime_gb:g} GB - weights",
            f"sampler.gpu_memory_utilization; {hardware.source('memory_gb')}",
        ),
        Quantity(
            "sequences at once", fits, "count",
            f"min(max_num_seqs {engine.max_num_seqs}, {size(cache)} / ({size(engine.token_bytes)} x {mean_tokens:,.0f}))",
            "mean length, prompt included",
        ),
    ]  # fmt: skip


def generation_seconds(engine: Engine, lengths: Sequence[int], prompt_tokens: float) -> float:
    """Of completions of these lengths on one engine, begun together: as one ends the next begins.

    Between two ends the number of sequences is constant, so the time is a sum of stretches.
    """
    if not lengths:
        return 0.0
    mean = prompt_tokens + sum(lengths) / len(lengths)
    slots = engine.sequences(mean)
    if slots < 1:
        return float("inf")
    waiting = list(lengths)[::-1]
    # Each running sequence by the number of the decoding step at which it ends.
    running: list[int] = []
    step, seconds = 0, engine.prefill_seconds(prompt_tokens, len(lengths))
    starts: dict[int, int] = {}
    context_sum = 0.0  # of the running sequences, at `step`
    while waiting or running:
        while waiting and len(running) < slots:
            length = waiting.pop()
            heapq.heappush(running, step + length)
            starts[step + length] = starts.get(step + length, 0) + length
            context_sum += prompt_tokens
        end = running[0]
        batch, steps = len(running), end - step
        context = context_sum / batch + steps / 2
        seconds += steps * engine.step_seconds(batch, context)
        context_sum += steps * batch
        step = end
        ended = 0
        while running and running[0] == end:
            heapq.heappop(running)
            ended += 1
        context_sum -= ended * prompt_tokens + starts.pop(end)
    return seconds
