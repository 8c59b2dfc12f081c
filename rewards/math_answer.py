r"""1.0 when the one final answer is mathematically equal to the reference, by math-verify.

The final answer is extracted first, because math-verify, given a whole text, reads a set of candidates from it; then it
is prepared and checked by small rules (see `rewards.math_equal`). That runs in a process of its own with a hard time
limit (see `rewards.math_worker`), so this works in threads, in forked processes and in async actors.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.types import RewardResult
from rewards.extract import after_thinking, boxed, final_answer, last_boxed, last_expression

Extract = Literal["boxed", "last_expression"]

START_TIMEOUT = 120.0  # seconds; importing sympy takes one to several
MAX_LENGTH = 1000  # characters; no final answer is longer
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")


def score(
    completion: str, answer: str, timeout_seconds: float = 2.0, extract: Extract = "boxed", **metadata: Any
) -> RewardResult:
    r"""1.0 or 0.0; 0.0 with status "timeout" or "crash" when judging took too long or brought the judge down.

    Args:
        completion: the model's text. The final answer is the single answer block, or, in a text without answer tags,
            the last `\boxed{}` after the reasoning. A `\boxed{}` inside the answer block is opened.
        answer: the reference, LaTeX or plain, without `\boxed`.
        timeout_seconds: time before the judge is killed.
        extract: where a text without answer tags has its answer: "boxed", or "last_expression" for the last formula or
            number where there is no box.
        metadata: not used.

    Raises:
        ValueError: math-verify cannot parse the reference, or `extract` is none of the two.
    """
    if extract not in get_args(Extract):
        raise ValueError(f"extract must be one of {', '.join(get_args(Extract))}, got {extract!r}")
    text = extract_answer(completion, extract)
    if text is None:
        return RewardResult(0.0, detail="no single final answer")
    if text == answer.strip():
        return RewardResult(1.0, detail="same text")
    if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(answer.strip()):
        return RewardResult(float(int(text) == int(answer)), detail="integers")  # needs no judge
    if len(text) > MAX_LENGTH:
        return RewardResult(0.0, detail=f"answer of {len(text)} characters")
    verdict = _judge_of(os.getpid()).ask(answer, text, timeout_seconds)
    if verdict == "bad_reference":
        raise ValueError(f"math-verify cannot parse the reference answer {answer!r}; correct the data")
    if verdict == "timeout":
        return RewardResult(0.0, "timeout", f"no verdict within {timeout_seconds} s")
    if verdict == "crash":
        return RewardResult(0.0, "crash", "the judge died")
    return RewardResult(float(verdict == "right"))


def extract_answer(completion: str, extract: Extract = "boxed") -> str | None:
    r"""The one final answer of a text, or None.

    With answer tags: the text of the single answer block, or of the box in it; None for boxes that differ. Without: the
    last box after the reasoning, or, with `last_expression`, the last expression where there is no box.
    """
    if "<answer>" in completion or "</answer>" in completion:
        text = final_answer(completion)
        boxes = {last_boxed(box) or box for box in boxed(text or "")}
        return text if not boxes else boxes.pop() if len(boxes) == 1 else None
    text = after_thinking(completion)
    if text is None:
        return None
    if extract == "last_expression" and "\\boxed" not in text:
        return last_expression(text)
    return last_boxed(text)


class _Judge:
    """One worker process, started when first needed, killed when late. Calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, answer: str, timeout: float) -> str:
        """The worker's verdict, "timeout" or "crash". Raises RuntimeError when no worker can be started."""
        with self._lock:
            if self._process is None:
                self._process = self._start()
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
        command = [sys.executable, "-m", "rewards.math_worker"]
        root = str(Path(__file__).parent.parent)  # the worker finds this package wherever the caller was started
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._reply(process, START_TIMEOUT) != "ready":
            self._kill(process)
            raise RuntimeError(f"the math-verify process did not start; try: {' '.join(command)}")
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


_judges: dict[int, _Judge] = {}


def _judge_of(process: int) -> _Judge:
    """The judge of a process by its id: a forked child needs its own, lock included."""
    return _judges.setdefault(process, _Judge())
