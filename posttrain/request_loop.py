"""Several threads asking one vLLM engine: one of them steps it at a time, and weights change between two steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class RequestLoop:
    """Requests of an engine that lives in this process and is stepped by those who wait for them.

    Whoever waits steps the engine for everybody. vLLM counts which version of the weights sampled which token
    (`CompletionOutput.weight_versions`), provided that the label is set while no step runs, as `between_steps` allows.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._ids = itertools.count()
        self._finished: dict[str, Any] = {}
        self._pending: set[str] = set()
        self._turn = threading.Condition()
        self._interruptions = 0  # threads that want the engine to stand still

    def add(self, token_ids: Sequence[int], params: Any) -> str:
        """Queue a prompt. Returns the id to `wait` for.

        Args:
            token_ids: of the prompt.
            params: vLLM's SamplingParams, which ask for the final output only.
        """
        with self._turn:
            request_id = str(next(self._ids))
            self._pending.add(request_id)
            self._engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)
        return request_id

    def wait(self, request_ids: Sequence[str]) -> dict[str, Any]:
        """Step the engine until these requests are finished. Returns and forgets their outputs."""
        wanted = set(request_ids)
        while True:
            with self._turn:
                self._turn.wait_for(lambda: not self._interruptions)
                if wanted <= self._finished.keys():
                    return {request_id: self._finished.pop(request_id) for request_id in request_ids}
                for output in self._engine.step():
                    if output.finished:
                        self._pending.discard(output.request_id)
                        self._finished[output.request_id] = output

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """The engine stands still for the length of the block, whatever is being generated.

        A lock alone would not do: the thread that steps takes it again before a waiting one wakes up.
        """
        self._interruptions += 1
        try:
            with self._turn:
                yield
        finally:
            with self._turn:
                self._interruptions -= 1
                self._turn.notify_all()

    @property
    def num_pending(self) -> int:
        """Requests that are not finished."""
        return len(self._pending)
