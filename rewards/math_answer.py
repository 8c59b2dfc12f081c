r"""1.0 when the one final answer is mathematically equal to the reference, by math-verify.

The final answer is extracted first, because math-verify, given a whole text, reads a set of candidates from it. It runs
in a process of its own with a hard time limit (see `rewards.math_worker`), so this works in threads and in async actors.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from posttrain.types import RewardResult
from rewards.extract import final_answer, last_boxed

START_TIMEOUT = 120.0  # seconds; importing sympy takes one to several
MAX_LENGTH = 1000  # characters; no final answer is longer


def score(completion: str, answer: str, timeout_seconds: float = 2.0, **metadata: Any) -> RewardResult:
    r"""1.0 or 0.0; 0.0 with status "timeout" or "crash" when judging took too long or brought the judge down.

    Args:
        completion: the model's text. The final answer is the single answer block, or, in a text without answer tags,
            the last `\boxed{}`. A `\boxed{}` inside the answer block is opened.
        answer: the reference, LaTeX or plain, without `\boxed`.
        timeout_seconds: time before the judge is killed.
        metadata: not used.

    Raises:
        ValueError: math-verify cannot parse the reference.
    """
    text = extract(completion)
    if text is None:
        return RewardResult(0.0, detail="no single final answer")
    if text == answer.strip():
        return RewardResult(1.0, detail="same text")
    if len(text) > MAX_LENGTH:
        return RewardResult(0.0, detail=f"answer of {len(text)} characters")
    verdict = _judge.ask(answer, text, timeout_seconds)
    if verdict == "bad_reference":
        raise ValueError(f"math-verify cannot parse the reference answer {answer!r}; correct the data")
    if verdict == "timeout":
        return RewardResult(0.0, "timeout", f"no verdict within {timeout_seconds} s")
    if verdict == "crash":
        return RewardResult(0.0, "crash", "the judge died")
    return RewardResult(float(verdict == "right"))


def extract(completion: str) -> str | None:
    r"""The one final answer: the answer block's text, or the last `\boxed{}` where there are no answer tags."""
    if "<answer>" in completion or "</answer>" in completion:
        text = final_answer(completion)
        return last_boxed(text) if text is not None and "\\boxed{" in text else text
    return last_boxed(completion)


class _Judge:
    """One worker process, started when first needed, killed when late. Calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process id that started the worker: a forked child needs its own

    def ask(self, reference: str, answer: str, timeout: float) -> str:
        """The worker's verdict, "timeout" or "crash". Raises RuntimeError when no worker can be started."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = self._start(), os.getpid()
            process = self._process
            assert process.stdin is not None
            request = {"reference": reference, "answer": answer, "timeout": timeout}
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                verdict = "crash"
            else:
                verdict = self._reply(process, timeout)
            if verdict in ("timeout", "crash"):
                self._kill(process)
                self._process = None
            return verdict

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("math_worker.py")
        process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._reply(process, START_TIMEOUT) != "ready":
            self._kill(process)
            raise RuntimeError(f"the math-verify process did not start; try: {sys.executable} {script}")
        return process

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], timeout: float) -> str:
        assert process.stdout is not None
        deadline = time.monotonic() + timeout
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return "timeout"
                part = os.read(process.stdout.fileno(), 4096)
                if not part:
                    return "crash"
                line += part
        return str(json.loads(line)["verdict"])

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an unsent request to a dead worker
                    pipe.close()


_judge = _Judge()
