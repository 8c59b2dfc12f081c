"""OpenAI-compatible servers for tests: one that answers as a function says, vLLM's own, and a proxy that fails on purpose."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stage_commands import ROOT

KEY = "sk-secret-1234567890"
Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes]]


def body(text: str, finish: str = "stop", model: str = "m") -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}
    ).encode()


class Scripted:
    """A server that answers as a function says; it is given the request and its number."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._port = 0
        scripted, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    scripted.requests.append(request)
                    scripted.keys.append(self.headers["Authorization"])
                    number = len(scripted.requests)
                status, headers, content = answer(request, number)
                if status == 0:
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                scripted.answered(request, status)

            def log_message(self, *_: Any) -> None:
                pass

        self._handler = Handler
        self.open()

    def answered(self, request: dict[str, Any], status: int) -> None:
        """Called once an answer is on its way."""

    def open(self) -> None:
        """Listen, at the same address as before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FaultyProxy(Scripted):
    """Passes requests on to a server, but for those that get an error, or no answer at all, and counts what was delivered.

    Args:
        upstream: the server's address.
        faults: of the n-th request, a status to answer with, "hang" for no answer, or None.
    """

    def __init__(self, upstream: str, faults: Callable[[int], int | str | None]) -> None:
        self.delivered: Counter[tuple[str, int]] = Counter()  # (messages, seed) -> completions
        self.tokens: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._upstream, self._faults = upstream, faults
        self._lock = threading.Lock()
        super().__init__(self._pass_on)

    def _pass_on(self, request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        fault = self._faults(number)
        if fault is not None:
            with self._lock:
                self.injected[str(fault)] += 1
            if fault == "hang":
                time.sleep(4.0)
                return 0, {}, b""
            return int(fault), {"retry-after": "0.05"}, b'{"error": {"message": "on purpose"}}'
        headers = {"Content-Type": "application/json", "Authorization": self.keys[number - 1]}
        asked = urllib.request.Request(f"{self._upstream}/chat/completions", json.dumps(request).encode(), headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as found:
                return found.status, {}, found.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()
        except OSError:
            return 502, {}, b'{"error": {"message": "the server is away"}}'

    def answered(self, request: dict[str, Any], status: int) -> None:
        if status == 200:
            with self._lock:
                self.delivered[json.dumps(request["messages"]), request.get("seed", 0)] += 1


@contextmanager
def vllm_server(path: Path, name: str, *flags: str) -> Iterator[str]:
    """A checkpoint behind `posttrain.serve`, with `KEY`. Gives the address; SIGTERM ends the server at the end.

    Args:
        flags: of posttrain.serve; without any, nothing is taken for reasoning.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["posttrain.serve", str(path), "--served-model-name", name, "--port", str(port)]
    words += [*(flags or ("--reasoning-parser", "none")), "--", "--gpu-memory-utilization", "0.5"]
    log = (path / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "VLLM_API_KEY": KEY},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < end, (path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.close()
