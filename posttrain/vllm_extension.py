"""What vLLM lacks on CPU, added inside its worker: an exact in-place weight load and the experts each token was sent to.

vLLM mixes `WorkerExtension` into its worker class (`worker_extension_cls`), so `self.model_runner` is vLLM's own. An engine on
one device has its worker in the engine's process; one on several has a process for each, which gets its weights in buckets
(posttrain/weight_buckets.py) and ends with the engine's.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

from posttrain.shared_names import mapped_names
from posttrain.weight_buckets import Bucket
from posttrain.wire import Digest

_ENGINE = "POSTTRAIN_ENGINE_PROCESS"  # its id, in the environment of worker processes
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerExtension:
    """Methods called through `LLM.collective_rpc`."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def load_weights_in_place(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of the running model.

        Args:
            weights: (Hugging Face parameter name, tensor) pairs of the whole model.
        """
        self._forget_packing()
        self.model_runner.reload_weights(weights_iterator=iter(weights))

    def begin_weights(self) -> None:
        """Expect a whole set of weights in buckets: `reload_weights` in three parts."""
        self._forget_packing()
        self._arrived = Digest()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def load_bucket(self, bucket: Bucket) -> None:
        """Load this worker's part of some tensors. A layer keeps its tensors, and so the bucket, until it has all of them."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(bucket.tensors(self._arrived))

    def end_weights(self) -> str:
        """Use the new weights. Returns the digest of all that this worker was given."""
        runner = self.model_runner
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(runner.get_model(), runner.model_config)
        runner.reset_lora_state()
        runner.reset_encoder_cache()
        runner.reset_mm_cache()
        return self._arrived.hexdigest()

    def shared_names(self) -> list[str]:
        """Files of /dev/shm that this process has mapped."""
        return mapped_names()

    def keep_to_own_experts(self) -> None:
        """Of an engine on CPU whose experts are spread: compute those that this worker holds; others do the rest.

        vLLM's CPU kernel looks up any expert's number among its own, past their end.
        """
        for method in self._moe_methods():
            method.apply = _own_experts(method.apply)

    def start_routing_capture(self) -> int:
        """Record the chosen experts of every token from now on. Returns the number of MoE layers."""
        if self.rank:  # routers are on every device, so the first one's choices are everybody's
            return 0
        runner = self.model_runner
        self._chosen_in_step: list[np.ndarray] = []
        self._routing: dict[str, np.ndarray] = {}
        methods = self._moe_methods()
        for method in methods:
            method.apply = self._recording(method.apply)
        if not methods:
            return 0
        execute_model = runner.execute_model

        def execute_and_collect(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._chosen_in_step.clear()
            output = execute_model(scheduler_output, *args, **kwargs)
            if scheduler_output.total_num_scheduled_tokens:
                self._collect(scheduler_output)
            return output

        runner.execute_model = execute_and_collect
        return len(methods)

    def take_routing(self, request_id: str, num_tokens: int) -> np.ndarray | None:
        """Hand over and forget the experts of a finished request: int16 [num_tokens, MoE layers, K]. None but on the first."""
        return None if self.rank else self._routing.pop(request_id)[:num_tokens]

    def _forget_packing(self) -> None:
        # vLLM repacks expert weights for its CPU kernel only while `moe_kernel` is None, that is on the first load.
        # Left alone, a later load would put unpacked experts where packed ones are expected, without any error.
        for method in self._moe_methods():
            method.moe_kernel = None

    def _moe_methods(self) -> list[Any]:
        modules = self.model_runner.get_model().modules()
        methods = (getattr(module, "quant_method", None) for module in modules)
        return list({id(m): m for m in methods if isinstance(m, UnquantizedFusedMoEMethod)}.values())

    def _recording(self, apply: Any) -> Any:
        def apply_and_record(*args: Any, **kwargs: Any) -> Any:
            chosen = kwargs["topk_ids"] if "topk_ids" in kwargs else args[3]
            self._chosen_in_step.append(chosen.to(torch.int16).cpu().numpy().copy())
            return apply(*args, **kwargs)

        return apply_and_record

    def _collect(self, scheduler_output: Any) -> None:
        """Sort the step's rows, which hold all requests one after the other, by request and position.

        Rows are placed by position, not appended, because a pre-empted request computes its tokens again.
        """
        chosen_TLK = np.stack(self._chosen_in_step, axis=1)
        batch = self.model_runner.input_batch
        first = 0
        for index, internal_id in enumerate(batch.req_ids):
            count = scheduler_output.num_scheduled_tokens.get(internal_id, 0)
            if not count:
                continue
            start = int(batch.num_computed_tokens_cpu[index])
            # vLLM appends a random suffix to the id it was given.
            request_id = internal_id.rpartition("-")[0]
            kept = self._routing.get(request_id)
            if kept is None or len(kept) < start + count:
                grown = np.zeros((max(64, 2 * (start + count)), *chosen_TLK.shape[1:]), np.int16)
                if kept is not None:
                    grown[: len(kept)] = kept
                kept = self._routing[request_id] = grown
            kept[start : start + count] = chosen_TLK[first : first + count]
            first += count


def _own_experts(apply: Any) -> Any:
    def apply_to_own(layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
        own_TK = layer.expert_map[topk_ids.long()]
        is_elsewhere_TK = own_TK < 0
        weights_TK = topk_weights.masked_fill(is_elsewhere_TK, 0.0)  # then any expert will do
        return apply(layer, x, weights_TK, own_TK.clamp(min=0).to(topk_ids.dtype), *args, **kwargs)

    return apply_to_own


def end_with(engine: int) -> None:
    """Have this worker process killed when the engine's ends, whatever it does then: one that waits for a lost one in a
    collective operation would turn in it for ever.

    Args:
        engine: id of that process, this one's parent.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != engine:  # it ended before that
        os._exit(1)


# vLLM imports this file in a new worker process before anything else that is ours; there is no earlier call to hook into.
if int(os.environ.get(_ENGINE, os.getpid())) != os.getpid():
    end_with(int(os.environ[_ENGINE]))
