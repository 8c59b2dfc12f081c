"""What vLLM lacks on CPU, added inside its worker: an exact in-place weight load and the experts each token was sent to.

vLLM mixes `WorkerExtension` into its worker class (`worker_extension_cls`), so `self.model_runner` is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


class WorkerExtension:
    """Methods called through `LLM.collective_rpc`."""

    model_runner: Any

    def load_weights_in_place(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of the running model.

        Args:
            weights: (Hugging Face parameter name, tensor) pairs of the whole model.
        """
        # vLLM repacks expert weights for its CPU kernel only while `moe_kernel` is None, that is on the first load.
        # Left alone, a later load would put unpacked experts where packed ones are expected, without any error.
        for method in self._moe_methods():
            method.moe_kernel = None
        self.model_runner.reload_weights(weights_iterator=iter(weights))

    def start_routing_capture(self) -> int:
        """Record the chosen experts of every token from now on. Returns the number of MoE layers."""
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

    def take_routing(self, request_id: str, num_tokens: int) -> np.ndarray:
        """Hand over and forget the experts of a finished request: int16 [num_tokens, MoE layers, K]."""
        return self._routing.pop(request_id)[:num_tokens]

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
