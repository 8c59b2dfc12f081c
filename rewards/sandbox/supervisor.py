"""The first process of a sandbox: forks one confined child per case, watches it, kills it, reports.

Runs inside the sandbox, sent there as text together with `confine` and `values`; standard library only, Python 3.9 or
newer. It talks to `process.Sandbox` outside in frames on file descriptors 0 and 1: four bytes of length, then JSON. A
report is followed by the raw bytes that its `sizes` announce.

    out  {"ready": true}                    the sandbox stands
    in   {"files", "steps", ...}            see `Sandbox.load`
    in   a case                             {"stdin"} or {"function", "args", "kwargs"}; any number, one after the other
    out  {"started": true}                  the child is confined; from here on, what goes wrong is the program's doing
         or {"failed": why}                 it could not be confined
    out  {"exit_code", "ended", "step", "sizes", ...}, stdout, stderr, result

A case has a child for each step: to compile, then to run; the first that does not end well is the last. A step without a
command is the program itself, in this Python.

The expected results are not known here, so a program that takes this process over gains nothing by it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import confine
import values

Message = dict[str, Any]

CHUNK = 1 << 16
SCRATCH = "/tmp"
FD_RESULT = 3  # where a call's result leaves the child; 0, 1 and 2 are the program's
FD_TELL = 100  # where the child says how its confinement went; closed before the program starts
CONFINED = b"confined"


def main() -> Callable[[], None]:
    """Serve cases until the other end closes. Returns only in a child: a function that runs the program."""
    os.closerange(3, 1 << 16)
    confine.forbid_new_privileges()
    confine.hide()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _send({"ready": True})
    setup = _receive()
    while True:
        run = _serve(setup, _receive())
        if run is not None:
            return run


def _send(message: Message, *blobs: bytes) -> None:
    body = json.dumps(message).encode()
    data = b"".join((struct.pack(">I", len(body)), body, *blobs))
    while data:
        data = data[os.write(1, data) :]


def _receive() -> Message:
    message: Message = json.loads(_take(struct.unpack(">I", _take(4))[0]))
    return message


def _take(count: int) -> bytes:
    parts = []
    while count:
        part = os.read(0, min(count, CHUNK))
        if not part:
            os._exit(0)  # nobody is left to report to
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _serve(setup: Message, case: Message) -> Callable[[], None] | None:
    """Run one case and report it; in a child, return what runs the program."""
    namespaces, limits = setup["mode"] == "bubblewrap", setup["limits"]
    if namespaces:
        confine.mount_scratch(SCRATCH, limits["disk_bytes"], limits["files"], setup["execute_scratch"])
    report: Message = {}
    blobs: list[bytes] = []
    for place, step in enumerate(setup["steps"]):
        last = place == len(setup["steps"]) - 1
        # The program's input is not for the compiler.
        outcome = _run_step(setup, step, case if last else {}, place)
        if callable(outcome):
            return outcome
        report, blobs = outcome
        if report.get("exit_code") != 0 or report["ended"]:
            break
    if namespaces:
        os.chdir("/")
        confine.unmount_scratch(SCRATCH)
    _send(report, *blobs)
    return None


def _run_step(
    setup: Message, step: Message, case: Message, place: int
) -> tuple[Message, list[bytes]] | Callable[[], None]:
    """Run one step of a case; its report and stdout, stderr and result. In the child, what runs it."""
    pipes = [os.pipe() for _ in range(5)]
    (stdin, feed), (out, stdout), (err, stderr), (returned, result), (told, tell) = pipes
    child = os.fork()
    if child == 0:
        os.dup2(tell, FD_TELL)
        try:
            _enter(setup, step, (stdin, stdout, stderr, result))
        except BaseException as error:
            os.write(FD_TELL, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os.write(FD_TELL, CONFINED)
        os.close(FD_TELL)
        if step["command"]:
            return partial(_execute, step["command"], setup["environment"], setup["files"] if place == 0 else {})
        return _program(next(iter(setup["files"].values())), case)
    for end in (stdin, stdout, stderr, result, tell):
        os.close(end)
    word = _read_all(told)
    if word == CONFINED:
        if place == 0:
            _send({"started": True})
        data = case.get("stdin", "").encode("utf-8", "surrogatepass")
        watch = _Watch(child, feed, data, (out, err, returned), step["limits"])
        report, blobs = watch.until_end(setup["mode"] == "bubblewrap")
        report["step"] = place
    else:
        os.waitpid(child, 0)
        report = {
            "failed": word.decode("utf-8", "replace") or "the process died while it was confined",
            "ended": "failed",
        }
        blobs = []
        os.close(feed)
    for end in (out, err, returned):
        os.close(end)
    return report, blobs


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, CHUNK):
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts)


def _enter(setup: Message, step: Message, ends: tuple[int, ...]) -> None:
    """Confine this process for good."""
    namespaces, limits = setup["mode"] == "bubblewrap", step["limits"]
    confine.die_with_parent()
    os.setsid()
    # First out of the way, then into place: an end may have the number that another is to get.
    for place, descriptor in enumerate([os.dup2(end, 50 + place) for place, end in enumerate(ends)]):
        os.dup2(descriptor, place)
    os.closerange(len(ends), FD_TELL)
    os.closerange(FD_TELL + 1, 1 << 16)
    os.chdir(SCRATCH if namespaces else "/")
    os.umask(0o077)
    os.environ.clear()
    if namespaces:
        confine.drop_capabilities()
    confine.limit(limits, own_processes=namespaces)
    confine.restrict_files(
        setup["readable"],
        SCRATCH if namespaces else "",
        execute=limits["subprocesses"],
        execute_scratch=setup["execute_scratch"],
    )
    own_pid, marker = struct.pack("=I", os.getpid()), struct.pack("=I", setup["own_pid_marker"])
    confine.filter_system_calls(bytes.fromhex(step["filter"]).replace(marker, own_pid))


def _execute(command: list[str], environment: dict[str, str], files: dict[str, str]) -> None:
    """Write the program's files, then become the command."""
    for name, text in files.items():
        os.makedirs(os.path.dirname(os.path.join(SCRATCH, name)), exist_ok=True)
        with open(os.path.join(SCRATCH, name), "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    os.closerange(FD_RESULT, 1 << 16)
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and who is executed would inherit that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execve(command[0], command, environment)


def _program(source: str, case: Message) -> Callable[[], None]:
    for name in ("supervisor", "confine"):
        sys.modules.pop(name, None)
    sys.argv = ["program.py"]
    sys.path[:] = [path for path in sys.path if path]
    is_call = "function" in case
    module = types.ModuleType("solution" if is_call else "__main__")
    sys.modules[module.__name__] = module

    def run() -> None:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)

    def call() -> None:
        arguments, named = values.decode(case["args"]), values.decode(case["kwargs"])
        run()
        value = _find(module, case["function"])(*arguments, **dict(named))
        data = values.encode(value).encode()
        while data:
            data = data[os.write(FD_RESULT, data) :]

    return partial(_run_to_the_end, call if is_call else run)


def _run_to_the_end(program: Callable[[], None]) -> None:
    """Run a script and end the process as the interpreter would, but without taking its modules apart (5 ms)."""
    code: Any = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit((code or 0) & 0xFF)


def _find(module: types.ModuleType, name: str) -> Any:
    if not hasattr(module, name) and hasattr(module, "Solution"):
        return getattr(module.Solution(), name)
    return getattr(module, name)


class _Watch:
    """A running child: feeds it, collects what it writes up to the limit, and sees to its end."""

    def __init__(self, child: int, feed: int, data: bytes, outputs: tuple[int, ...], limits: Message) -> None:
        self.child, self.feed, self.data, self.limits = child, feed, memoryview(data), limits
        self.collected = {descriptor: bytearray() for descriptor in outputs}
        self.open = set(outputs)
        self.ended = ""  # why it was killed
        self.fed = False
        self.begin = time.monotonic()
        self.poll = select.poll()
        self.pidfd = os.pidfd_open(child)
        self.poll.register(self.pidfd, select.POLLIN)
        self.poll.register(0, 0)  # hang-up of the other end only
        for descriptor in outputs:
            os.set_blocking(descriptor, False)
            self.poll.register(descriptor, select.POLLIN)
        os.set_blocking(feed, False)
        self.poll.register(feed, select.POLLOUT)

    def until_end(self, namespaces: bool) -> tuple[Message, list[bytes]]:
        """The report of a case, and its stdout, stderr and result."""
        alive = True
        while alive and not self.ended:
            left = self.begin + self.limits["seconds"] - time.monotonic()
            if left <= 0:
                self.ended = "timeout"
                break
            for descriptor, event in self.poll.poll(left * 1000 + 1):
                if descriptor == self.pidfd:
                    alive = False
                else:
                    self._handle(descriptor, event)
        seconds = time.monotonic() - self.begin
        if namespaces:
            self._kill(-1)  # everything in the namespace but this process
        else:
            self._kill(self.child)
        _, status, usage = os.wait4(self.child, 0)
        self._reap()
        os.close(self.pidfd)
        if not self.fed:
            os.close(self.feed)
        for descriptor in tuple(self.open):
            self._handle(descriptor, select.POLLIN)
        report = {
            "exit_code": os.waitstatus_to_exitcode(status),
            "ended": self.ended,
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
        }
        blobs = [bytes(data) for data in self.collected.values()]
        return {**report, "sizes": [len(blob) for blob in blobs]}, blobs

    def _handle(self, descriptor: int, event: int) -> None:
        if descriptor == 0:
            self._kill(self.child)
            os.waitpid(self.child, 0)
            os._exit(0)  # nobody is left to report to
        if descriptor == self.feed:
            self._feed()
            return
        collected, bound = self.collected[descriptor], self.limits["output_bytes"]
        while descriptor in self.open and len(collected) <= bound:
            try:
                part = os.read(descriptor, CHUNK)
            except BlockingIOError:
                return
            if not part:
                self.open.discard(descriptor)
                self.poll.unregister(descriptor)
            collected += part
        if len(collected) > bound:
            del collected[bound:]
            self.open.discard(descriptor)
            self.ended = self.ended or "output"

    def _feed(self) -> None:
        try:
            while self.data:
                self.data = self.data[os.write(self.feed, self.data[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            pass  # it does not want to read the rest
        self.poll.unregister(self.feed)
        os.close(self.feed)  # the program sees the end of its input
        self.fed = True

    @staticmethod
    def _kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
