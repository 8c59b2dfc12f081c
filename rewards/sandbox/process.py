"""One sandbox seen from outside: start it, hand it a program, run cases, end it with everything in it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rewards.sandbox import launch
from rewards.sandbox.launch import Interpreter
from rewards.sandbox.limits import Call, Limits, Mode, Outcome, Status, Stdin, Step
from rewards.sandbox.seccomp import OWN_PID, build_filter
from rewards.sandbox.toolchain import ENVIRONMENT, Toolchain
from rewards.sandbox.values import encode

START_SECONDS = 30.0  # for bubblewrap and Python to start; a machine that needs longer is overloaded
GRACE_SECONDS = 2.0  # beyond a case's own time, for the supervisor inside to kill it and report
MAX_HEADER = 1 << 16  # bytes
COMPILING = Limits(seconds=60.0, cpu_seconds=40, memory_bytes=4 * 2**30)  # the rest is as for the program


class SandboxGoneError(Exception):
    """The other end closed, is late, or talks nonsense."""


class Sandbox:
    """A started sandbox. Serves the cases of one program, then is thrown away. For one thread at a time.

    Args:
        mode: "bubblewrap" or "landlock".
        interpreter: of the sandbox itself, and of Python programs.
        toolchain: of programs in another language.

    Raises:
        SandboxUnavailableError: bubblewrap or a usable Python is missing.
        OSError: no process can be started.
    """

    def __init__(self, mode: Mode, interpreter: Interpreter, toolchain: Toolchain | None = None) -> None:
        info, info_end = os.pipe()
        readable = None if toolchain is None else toolchain.readable
        try:
            self._process = subprocess.Popen(
                launch.command(mode, interpreter, info_end, readable),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={} if mode == "bubblewrap" else launch.ENVIRONMENT,  # bubblewrap's own can be read from inside
                cwd="/",
                pass_fds=(info_end,) if mode == "bubblewrap" else (),
                start_new_session=True,
                **launch.credentials(),
            )  # type: ignore[call-overload]
        except BaseException:
            os.close(info)
            raise
        finally:
            os.close(info_end)
        self._mode, self._interpreter, self._toolchain, self._info = mode, interpreter, toolchain, info
        self._steps: list[tuple[Step, Limits]] = []  # with the limits of each
        self._first: int | None = None  # a pidfd of the sandbox's first process; bubblewrap only
        self._limits = Limits()
        self._begin = time.monotonic()
        self._has_run = False
        self._last: Outcome | None = None  # of every case from now on, because the sandbox is lost
        try:
            self._write(launch.sources(), START_SECONDS)
        except SandboxGoneError as error:
            self._lose(error)

    def load(self, program: str | Mapping[str, str], limits: Limits) -> None:
        """Wait until the sandbox stands and hand it the program. Failures show in the outcomes of `run`.

        Args:
            program: its text; or its files by their names, the language's own file among them.
            limits: of the program. Compiling has time and memory of its own.

        Raises:
            ValueError: limits that the mode cannot keep, or no file that the language runs.
        """
        if limits.subprocesses and self._mode == "landlock":
            raise ValueError(
                'limit subprocesses must be false with sandbox "landlock": it could not be held; use bubblewrap'
            )
        name = "program.py" if self._toolchain is None else self._toolchain.language.file
        files = {name: program} if isinstance(program, str) else dict(program)
        if name not in files or (self._toolchain is None and len(files) > 1):
            raise ValueError(f"the program must have a file {name}; it has {', '.join(files)}")
        self._limits = limits
        setup = {
            "mode": self._mode,
            "limits": asdict(limits),
            "files": files,
            "steps": self._plan(limits),
            "environment": ENVIRONMENT,
            "execute_scratch": self._toolchain is not None and self._toolchain.language.is_native,
            "own_pid_marker": OWN_PID,
            "readable": [*self._interpreter.readable, *(self._toolchain.readable if self._toolchain else ())],
        }
        try:
            if self._last is None:
                self._read_message(START_SECONDS)
                self._learn_first()
                self._write_message(setup, START_SECONDS)
        except SandboxGoneError as error:
            self._lose(error)
        self._begin = time.monotonic()

    def _plan(self, limits: Limits) -> list[dict[str, Any]]:
        """The steps of a case as the supervisor reads them."""
        if self._toolchain is None:
            self._steps = [("run", limits)]
            commands: list[list[str]] = [[]]
        else:
            language = self._toolchain.language
            own = replace(limits, memory_bytes=limits.memory_bytes + language.reserve_bytes, subprocesses=True)
            self._steps = [("run", own)]
            commands = [self._toolchain.command(language.run, limits.memory_bytes)]
            if language.compile:
                needed = {name: getattr(COMPILING, name) for name in ("seconds", "cpu_seconds", "memory_bytes")}
                self._steps.insert(0, ("compile", replace(own, **needed)))
                commands.insert(0, self._toolchain.command(language.compile, limits.memory_bytes))
        return [
            {"command": command, "limits": asdict(bounds), "filter": build_filter(self._mode, bounds).hex()}
            for command, (_, bounds) in zip(commands, self._steps, strict=True)
        ]

    def run(self, case: Stdin | Call) -> Outcome:
        """Run one case, after those before it. After one that took the sandbox down, the others fail like it.

        Raises:
            ValueError: a `Call` of a program that is not Python.
        """
        if isinstance(case, Call) and self._toolchain is not None:
            raise ValueError(f"a Call needs a Python program; run one in {self._toolchain.language.title} with Stdin")
        if self._last is not None:
            return self._last
        left = self._begin + self._limits.total_seconds - time.monotonic()
        if left <= 0:
            return Outcome("timeout", detail=f"no time left of {self._limits.total_seconds} s for all cases")
        try:
            self._write_message(_describe(case), START_SECONDS)
            word = self._read_message(START_SECONDS)
            if "started" not in word:
                raise SandboxGoneError(f"the program could not be confined: {word.get('failed')}")
        except SandboxGoneError as error:
            if not self._has_run:
                return self._lose(error)
            self._last = Outcome("crash", detail=f"left its sandbox unusable: {error}")
            return self._last
        # From here on whatever goes wrong counts as the program's doing: breaking the sandbox must not pay.
        self._has_run = True
        try:
            return self._finish(min(left, sum(bounds.seconds for _, bounds in self._steps) + GRACE_SECONDS))
        except SandboxGoneError as error:
            status: Status = "timeout" if isinstance(error, SandboxLateError) else "crash"
            self._last = Outcome(status, detail=f"took its sandbox down: {error}")
            return self._last

    def close(self) -> None:
        """Kill everything in the sandbox and wait for its end. May be called twice."""
        if self._process.returncode is None:
            self._learn_first()  # killing bubblewrap alone, while it sets up, would leave its child waiting for ever
            assert self._process.stdin is not None
            self._process.stdin.close()  # without namespaces, the supervisor then kills its child and ends
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                if self._first is not None:
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)  # bubblewrap reaps it, then ends itself
                if self._first is not None or self._mode == "landlock":
                    self._process.wait(GRACE_SECONDS)
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        for descriptor in (self._info, self._first):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._info, self._first = -1, None

    def _finish(self, seconds: float) -> Outcome:
        deadline = time.monotonic() + seconds
        report = self._read_message(seconds)
        bound = self._limits.output_bytes
        sizes = report.get("sizes")
        if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(n) is int and 0 <= n <= bound for n in sizes):
            raise SandboxGoneError(f"malformed report {str(report)[:200]}")
        place = report.get("step")
        if type(place) is not int or not 0 <= place < len(self._steps):
            raise SandboxGoneError(f"malformed report {str(report)[:200]}")
        step, limits = self._steps[place]
        stdout, stderr, result = (self._read(size, deadline).decode("utf-8", "replace") for size in sizes)
        status = _status(report, stderr, limits)
        said = _first_error(stderr) if step == "compile" else _last_line(stderr)
        return Outcome(
            status,
            stdout,
            stderr,
            result or None,
            exit_code=int(report["exit_code"]),
            seconds=float(report["seconds"]),
            cpu_seconds=float(report["cpu_seconds"]),
            peak_bytes=int(report["peak_bytes"]),
            step=step,
            detail="" if status == "ok" else said or f"exit code {report['exit_code']}",
        )

    def _learn_first(self) -> None:
        """Take hold of the sandbox's first process, which bubblewrap names as soon as it exists."""
        if self._mode != "bubblewrap" or self._first is not None:
            return
        deadline, text = time.monotonic() + START_SECONDS, b""
        while b"}" not in text and _wait(self._info, select.POLLIN, deadline):  # it writes the object in pieces
            part = os.read(self._info, 4096)
            if not part:
                return  # bubblewrap gave up before there was a process
            text += part
        if b"}" in text:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and bubblewrap with it
                self._first = os.pidfd_open(int(json.loads(text)["child-pid"]))

    def _lose(self, error: SandboxGoneError) -> Outcome:
        """The sandbox failed by itself; the reason, with what bubblewrap or Python said last, is every case's outcome."""
        stderr = self._process.stderr
        assert stderr is not None
        said = b""
        if _wait(stderr.fileno(), select.POLLIN, time.monotonic() + 0.2):
            said = os.read(stderr.fileno(), 4096)
        detail = f"{error}: {_last_line(said.decode('utf-8', 'replace'))}".removesuffix(": ")
        self._last = Outcome("infrastructure", detail=detail)
        return self._last

    def _write_message(self, message: dict[str, Any], seconds: float) -> None:
        body = json.dumps(message).encode()
        self._write(struct.pack(">I", len(body)) + body, seconds)

    def _read_message(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        size = struct.unpack(">I", self._read(4, deadline))[0]
        if size > MAX_HEADER:
            raise SandboxGoneError(f"a message of {size} bytes came out")
        try:
            message = json.loads(self._read(size, deadline))
        except ValueError as error:
            raise SandboxGoneError(f"malformed message: {error}") from error
        if not isinstance(message, dict):
            raise SandboxGoneError(f"malformed message {message!r}")
        return message

    def _write(self, data: bytes, seconds: float) -> None:
        assert self._process.stdin is not None
        descriptor, deadline, view = self._process.stdin.fileno(), time.monotonic() + seconds, memoryview(data)
        os.set_blocking(descriptor, False)
        while view:
            if not _wait(descriptor, select.POLLOUT, deadline):
                raise SandboxLateError(f"it did not read within {seconds:.1f} s")
            try:
                view = view[os.write(descriptor, view[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise SandboxGoneError("it ended before it read its input") from error

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        data = bytearray()
        while len(data) < count:
            if not _wait(self._process.stdout.fileno(), select.POLLIN, deadline):
                raise SandboxLateError("it did not answer in time")
            part = os.read(self._process.stdout.fileno(), min(count - len(data), 1 << 16))
            if not part:
                raise SandboxGoneError("it ended without an answer")
            data += part
        return bytes(data)


class SandboxLateError(SandboxGoneError):
    """The other end did not answer in time."""


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    # poll, because select() refuses descriptors above 1023, which long runs do reach.
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _describe(case: Stdin | Call) -> dict[str, Any]:
    if isinstance(case, Stdin):
        return {"stdin": case.text}
    return {"function": case.function, "args": encode(list(case.args)), "kwargs": encode(list(case.kwargs))}


def _status(report: dict[str, Any], stderr: str, limits: Limits) -> Status:
    code = report.get("exit_code")
    if not all(
        isinstance(report.get(key), int | float) for key in ("exit_code", "seconds", "cpu_seconds", "peak_bytes")
    ):
        raise SandboxGoneError(f"malformed report {str(report)[:200]}")
    if report.get("ended") in ("timeout", "output"):
        return "timeout" if report["ended"] == "timeout" else "output"
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu_seconds"] >= limits.cpu_seconds - 0.5):
        return "timeout"
    if code == 0:
        return "ok"
    return "memory" if _last_line(stderr).startswith("MemoryError") else "crash"


def _first_error(text: str) -> str:
    """What a compiler says first that is wrong."""
    lines = text.rstrip().splitlines()
    return next((line[:200] for line in lines if "error:" in line), lines[-1][:200] if lines else "")


def _last_line(text: str) -> str:
    lines = text.rstrip().splitlines()
    return lines[-1][:200] if lines else ""
