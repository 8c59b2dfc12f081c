"""Several threads asking one vLLM engine: one of them steps it at a time, and weights change between two steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any


class RequestLoop:
    """Requests of an engine that lives in this process and is stepped by those who wait for them.

    One of those who wait steps the engine for everybody; the others leave as soon as their own requests are finished.
    vLLM counts which version of the weights sampled which token (`CompletionOutput.weight_versions`), provided that the
    label is set while no step runs, as `between_steps` allows.

    Args:
        engine: vLLM's.
        run: calls a function, on the thread that the engine's work is to be done on.
    """

    def __init__(self, engine: Any, run: Callable[[Callable[[], Any]], Any] = lambda call: call()) -> None:
        self._engine = engine
        self._run = run
        self._ids = itertools.count()
        self._finished: dict[str, Any] = {}
        self._running = 0  # requests that are not finished
        self._waiting = 0  # threads that want the engine to go on
        self.steps = 0
        self.tokens = 0  # prompt tokens taken in, and one for each running request and step
        self._turn = threading.Condition()
        self._stepping = False  # a thread is inside engine.step, which holds no lock so that others can queue up
        self._interruptions = 0  # threads that want the engine to stand still

    def add(self, token_ids: Sequence[int], params: Any) -> str:
        """Queue a prompt. Returns the id to `wait` for.

        Args:
            token_ids: of the prompt.
            params: vLLM's SamplingParams, which ask for the final output only.
        """
        with self.between_steps():
            request_id = str(next(self._ids))
            self._engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)
            self._running += 1
            self.tokens += len(token_ids)
        return request_id

    def wait(self, request_ids: Sequence[str]) -> dict[str, Any]:
        """Step the engine until these requests are finished. Returns and forgets their outputs."""
        wanted = set(request_ids)
        self.wait_until(lambda: wanted <= self.finished)
        return self.take(request_ids)

    def wait_until(self, enough: Callable[[], bool]) -> None:
        """Step the engine until `enough`, which is asked after each step, is true."""
        with self._turn:
            self._waiting += 1
            try:
                while not enough():
                    if self._stepping or self._interruptions:
                        self._turn.wait()
                    else:
                        self._step()
            finally:
                self._waiting -= 1

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for the engine to go on."""
        return self._waiting > 0

    @property
    def finished(self) -> Set[str]:
        """Requests whose outputs were not taken yet."""
        return self._finished.keys()

    def take(self, request_ids: Sequence[str]) -> dict[str, Any]:
        """The outputs of finished requests, which are forgotten."""
        return {request_id: self._finished.pop(request_id) for request_id in request_ids}

    def _step(self) -> None:
        self._stepping = True
        self._turn.release()
        try:
            outputs = self._run(self._engine.step)
        finally:
            self._turn.acquire()
            self._stepping = False
            self._turn.notify_all()
        finished = {output.request_id: output for output in outputs if output.finished}
        self._finished |= finished
        self.steps += 1
        self.tokens += self._running
        self._running -= len(finished)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """The engine stands still for the length of the block, whatever is being generated. Blocks may be nested.

        A lock alone would not do: the thread that steps would take it again before a waiting one wakes up.
        """
        with self._turn:
            self._interruptions += 1
            try:
                self._turn.wait_for(lambda: not self._stepping)
                yield
            finally:
                self._interruptions -= 1
                self._turn.notify_all()
