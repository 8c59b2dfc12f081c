"""Threads that share one engine. The engine is scripted: which thread goes when is what is tested."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.request_loop import RequestLoop


class CountingEngine:
    """A request of n tokens is finished after n steps. Notes what happens, in order."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.events: list[str] = []
        self.begun = threading.Event()

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert not self.stepping
        self.left[request_id] = len(prompt["prompt_token_ids"])

    stepping = False

    def step(self) -> list[SimpleNamespace]:
        assert not self.stepping, "two threads step at once"
        self.stepping = True
        self.begun.set()
        time.sleep(0.0005)  # as a kernel does, it lets other threads run
        self.left = {request_id: count - 1 for request_id, count in self.left.items()}
        done = [request_id for request_id, count in self.left.items() if not count]
        for request_id in done:
            del self.left[request_id]
        self.events.append("step")
        self.stepping = False
        return [SimpleNamespace(request_id=request_id, finished=True) for request_id in done]


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    engine = CountingEngine()
    loop = RequestLoop(engine)
    long = loop.add([0] * 1_000, None)
    thread = threading.Thread(target=lambda: (loop.wait([long]), engine.events.append("long")))
    thread.start()
    assert engine.begun.wait(10)
    for _ in range(20):
        short = loop.add([0, 0], None)
        assert loop.wait([short])[short].finished
        engine.events.append("short")
    thread.join()
    assert engine.events[-1] == "long" and engine.events.count("short") == 20
    assert engine.events.count("step") == 1_000


def test_the_engine_stands_still_between_steps_even_nested() -> None:
    engine = CountingEngine()
    loop = RequestLoop(engine)
    long = loop.add([0] * 500, None)
    thread = threading.Thread(target=loop.wait, args=([long],))
    thread.start()
    assert engine.begun.wait(10)
    for _ in range(20):
        with loop.between_steps(), loop.between_steps():
            before = len(engine.events)
            assert not thread.join(0.01)
            assert len(engine.events) == before
    thread.join()


def test_an_engine_that_fails_leaves_no_thread_behind() -> None:
    engine = CountingEngine()
    loop = RequestLoop(engine)
    request = loop.add([0], None)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    engine.step = fail  # type: ignore[method-assign, assignment]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is gone"):
            loop.wait([request])
