"""A server that judges by one rule, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class FakeJudge(BaseHTTPRequestHandler):
    """A server that judges by one rule: the reference's text, or else the word "good", makes an answer good."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        rules, asked = (message["content"] for message in request["messages"])
        word = re.search(r"Verdict (\w+):", rules)[1]  # type: ignore[index]
        texts = re.findall(rf"<{word}>\n(.*?)\n<{word}>", asked, re.DOTALL)
        reference = re.search(r"Reference answer:\n(.*?)\n\n", asked, re.DOTALL)
        good = [(reference[1] if reference else "good") in text for text in texts]
        if len(texts) == 1:
            verdict = str(int(good[0]))
        elif any(good):
            verdict = "TIE" if all(good) else "FIRST" if good[0] else "SECOND"
        else:  # the baseline beats what is plainly bad
            bad = ["bad" in text for text in texts]
            verdict = "TIE" if bad[0] == bad[1] else "SECOND" if bad[0] else "FIRST"
        message = {"role": "assistant", "content": f"I compared them.\nVerdict {word}: {verdict}"}
        body = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "judge",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        ).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[str]:
    """Its address, for as long as the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
