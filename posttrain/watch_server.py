"""The server behind `posttrain.watch`: the report page, what is new since a browser asked last, and the run's files to read.

Every request is checked before it is looked at: the host it names (a page elsewhere must not reach us under a name of its
own), then the token, in constant time. The token comes once in the address, and from then on in a cookie that scripts cannot
read, or as `Authorization: Bearer`. Files are opened below the run directory only, links followed first.
"""

from __future__ import annotations

import hmac
import http.cookies
import json
import os
import socket
import stat
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eval.report import page_of
from eval.report_page import content_policy
from eval.report_run import columns, read_run, router_columns, stage_directories
from eval.report_samples import Budget, other_files, read_files, sample_files
from posttrain.metrics import LogReader

NEWS_BUDGET = Budget(samples=5_000, characters=8_000_000, tokens=100_000)  # of one answer
MOST_FILES = 2_000  # that are listed
_PART = 1 << 20  # bytes
NOT_LISTED = ("checkpoints", "trainer", "references")
SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class WatchServer(ThreadingHTTPServer):
    """A server of one run directory; it never writes.

    Args:
        run_dir: of a stage, or of a pipeline.
        token: what requests must know.
        host: to listen at.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, run_dir: Path, token: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.run_dir = run_dir.resolve()
        self.token = token
        self.logs = LogReader()
        self.policy = content_policy(is_live=True)
        self.host = host
        self.port = int(self.server_address[1])
        self.cookie = f"posttrain_watch_{self.port}"  # cookies do not tell ports apart

    @property
    def address(self) -> str:
        """What to open in a browser."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.host, self.host)
        return f"http://{shown}:{self.port}/?token={self.token}"

    def knows(self, given: str | None) -> bool:
        """Whether that is the token; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest((given or "").encode(), self.token.encode())

    def is_named(self, host_header: str | None) -> bool:
        """Whether a request is meant for us: not when a foreign name was made to lead here."""
        if self.host in ("0.0.0.0", "::"):
            return True
        return host_header in {f"{name}:{self.port}" for name in (self.host, "127.0.0.1", "localhost", "[::1]")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def page(self) -> str:
        """The report as it stands."""
        directories = stage_directories(self.run_dir)
        kind = "run" if directories == [self.run_dir] else "pipeline"
        return page_of(self.run_dir.name, kind, directories, Budget(), is_live=True)

    def news(self, seen: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What a page lacks.

        Args:
            seen: for each stage the last step of its metrics, of its router log and of its samples that the page has, and
                how many files of other samples.

        Returns:
            `runs`, an entry for each stage; or `reset`: the page must be loaded anew, since a stage has begun, an evaluation
            has come, or a run went back to an earlier step.
        """
        directories = stage_directories(self.run_dir)
        if len(directories) != len(seen):
            return {"reset": True}
        runs = [self._news_of(directory, *steps) for directory, steps in zip(directories, seen, strict=True)]
        return {"reset": True} if None in runs else {"reset": False, "runs": runs}

    def _news_of(
        self, directory: Path, step: int, router_step: int, sample_step: int, num_others: int
    ) -> dict[str, Any] | None:
        files = sample_files(directory / "samples")
        rollouts = [file for file in files if file.stem.startswith("step-")]
        metrics = self.logs.read(directory / "metrics.jsonl")
        router = self.logs.read(directory / "router.jsonl")
        if other_files(directory / "samples") != num_others or (metrics[-1]["step"] if metrics else 0) < step:
            return None
        new = read_files([file for file in rollouts if int(file.stem.removeprefix("step-")) > sample_step], NEWS_BUDGET)
        return {
            **read_run(directory, self.logs.read),
            "metrics": columns([line for line in metrics if line["step"] > step]),
            "router": router_columns([line for line in router if line["step"] > router_step]),
            "blocks": [{"rows": block.rows, "texts": block.texts, "tokens": block.tokens} for block in new.blocks],
        }

    def files(self) -> list[str]:
        """Files of the run that may be read, checkpoints left out."""
        found = []
        for place, folders, names in os.walk(self.run_dir):
            folders[:] = sorted(name for name in folders if name not in NOT_LISTED)
            found += [str((Path(place) / name).relative_to(self.run_dir)) for name in sorted(names)]
        return [name for name in found[:MOST_FILES] if self.file(name) is not None]

    def file(self, name: str) -> Path | None:
        """The regular file of that name below the run directory, links followed; None where there is none."""
        try:
            path = (self.run_dir / name).resolve(strict=True)
            is_regular = stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError, RuntimeError):  # nothing there, a null byte, links in a circle
            return None
        return path if is_regular and path.is_relative_to(self.run_dir) else None


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: WatchServer
    server_version = "posttrain"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """The page, what is new, the list of files, or a file."""
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if not self.server.is_named(self.headers.get("Host")):
            return self._refuse(HTTPStatus.FORBIDDEN, "this server does not go by that name")
        given = query.get("token", [None])[0]
        if given is not None and self.server.knows(given):
            return self._enter()
        if not self._is_known():
            return self._refuse(HTTPStatus.FORBIDDEN, "open the address with the token that posttrain.watch printed")
        if url.path == "/":
            return self._send(
                "text/html; charset=utf-8", self.server.page().encode(), {"Content-Security-Policy": self.server.policy}
            )
        if url.path == "/news":
            return self._news(query.get("seen", ["[]"])[0])
        if url.path == "/files":
            return self._json({"files": self.server.files()})
        if url.path.startswith("/files/"):
            return self._file(urllib.parse.unquote(url.path.removeprefix("/files/")))
        return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _only_reads(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "this server only answers GET")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = _only_reads

    def _is_known(self) -> bool:
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.server.knows(bearer):
            return True
        try:
            cookie = http.cookies.SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except http.cookies.CookieError:
            return False
        return cookie is not None and self.server.knows(cookie.value)

    def _enter(self) -> None:
        """The token is right: keep it in a cookie, and take it out of the address."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self._end(0)

    def _news(self, text: str) -> None:
        try:
            seen = json.loads(text)
            is_right = isinstance(seen, list) and all(
                isinstance(row, list) and len(row) == 4 and all(type(value) is int for value in row) for row in seen
            )
        except (ValueError, RecursionError):  # no JSON, or brackets without end
            is_right = False
        if not is_right:
            return self._refuse(HTTPStatus.BAD_REQUEST, "seen: give a JSON list of four whole numbers for each stage")
        return self._json(self.server.news(seen))

    def _file(self, name: str) -> None:
        path = self.server.file(name)
        if path is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "there is no such file in the run directory")
        # It was resolved: a link in its place has come since.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Disposition", "attachment")
            self._end(size)
            while size and (part := file.read(min(size, _PART))):  # no more than announced: it may be growing
                self.wfile.write(part)
                size -= len(part)
        return None

    def _json(self, value: Any) -> None:
        self._send("application/json", json.dumps(value, allow_nan=False).encode("utf-8", errors="replace"))

    def _send(self, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._end(len(body))
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        body = f"{status.value}: {why}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self._end(len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _end(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        for name, value in SAFE_HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""
