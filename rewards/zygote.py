"""The process that worker processes are forked from, with the reward's module already imported: a new one takes milliseconds.

It runs no reward itself and has one thread, so forking is safe. Processes that a reward leaves behind become its children
(it is a subreaper), wherever they hid, and are killed.

Over its control socket it gets orders, a letter and a number each: `f` fork the worker of that number (with its end of a
socket, and the tickets of its calls), `k` kill that worker and all its descendants, `s` sweep, `i` import modules that a
worker turned out to need (so many bytes of names follow). It answers each with a JSON line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rewards.processes import children, descendants, is_zombie
from rewards.worker import serve  # here, so that no worker has to import it

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)  # found once: each page that a new worker touches first costs it microseconds
MAX_SECONDS = 10.0  # to get rid of a tree of processes
ORDER = struct.Struct("!cI")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a worker may use."""

    timeout_seconds: float  # of one call
    memory_bytes: int | None  # beyond what the process has when it is forked; None is no limit


def main(number: int) -> None:
    """Serve on the inherited socket `number` until its other end closes."""
    control = socket.socket(fileno=number)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the program that started us
    try:
        function, bounds = pickle.loads(receive(control))
        function.warm_up()
        gc.freeze()
    except BaseException as error:
        reply(control, {"error": "".join(traceback.format_exception_only(error)).strip()})
        return
    reply(control, {"ready": True})
    workers: dict[int, int] = {}  # number -> pid
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, ORDER.size, 2, socket.MSG_WAITALL)
        if len(command) < ORDER.size:  # closed
            for pid in workers.values():
                kill_tree(pid)
            sweep(set())
            return
        letter, number = ORDER.unpack(command)
        if letter == b"f":
            workers[number] = _fork(control, descriptors, function, bounds)
            reply(control, {"pid": workers[number]})
        elif letter == b"k":
            kill_tree(workers.pop(number))
            reap(set(workers.values()))
            reply(control, {})
        elif letter == b"s":
            reply(control, {"strays": sweep(set(workers.values()))})
        elif letter == b"i":
            reply(control, {"imported": _import(json.loads(control.recv(number, socket.MSG_WAITALL)))})


def order(letter: bytes, number: int = 0) -> bytes:
    """What `main` understands."""
    return ORDER.pack(letter, number)


def _import(names: list[str]) -> int:
    """Import what there is; what cannot be imported by name alone, a worker imports by itself as before."""
    count = 0
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # other people's modules may fail in any way
            continue
        count += 1
    gc.freeze()  # else the first collection of each worker writes to, and so copies, all of them
    return count


def receive(control: socket.socket) -> bytes:
    """What was sent with its length (8 bytes) before it."""
    size = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "big")
    return control.recv(size, socket.MSG_WAITALL)


def reply(control: socket.socket, answer: dict[str, Any]) -> None:
    """A JSON line."""
    control.sendall(json.dumps(answer).encode() + b"\n")


def _fork(control: socket.socket, descriptors: list[int], function: Any, bounds: Bounds) -> int:
    connection, tickets = descriptors
    pid = os.fork()
    if pid:
        os.close(connection)
        os.close(tickets)
        return pid
    code = 1
    try:
        control.close()
        confine(bounds.memory_bytes)
        serve(Connection(connection), tickets, function, bounds.timeout_seconds)
        code = 0
    finally:
        os._exit(code)  # not back into the zygote's loop, whatever happens


def confine(memory_bytes: int | None) -> None:
    """Make the calling process a worker: a group of its own, gone when its parent is, and with bounded memory."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        size = int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes,) * 2)


def prctl(option: int, value: int) -> None:
    """Linux's prctl, as far as it takes one number."""
    LIBC.prctl(option, value, 0, 0, 0)


def kill_tree(pid: int) -> None:
    """Stop, then kill, a process and all its descendants. Stopping first keeps them from forking faster than they die."""
    if not pid:
        return
    for number in (signal.SIGSTOP, signal.SIGKILL):
        deadline = time.monotonic() + MAX_SECONDS
        seen: set[int] = set()
        while (tree := {pid, *descendants(pid)} - seen) and time.monotonic() < deadline:
            for one in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, number)
            seen |= tree
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def sweep(workers: set[int]) -> int:
    """Kill and reap children that are not the workers: what plugins left behind. Returns how many still ran."""
    strays: set[int] = set()
    deadline = time.monotonic() + MAX_SECONDS
    reap(workers)
    while (found := set(children(os.getpid())) - workers) and time.monotonic() < deadline:
        for child in found:
            if not is_zombie(child):
                strays.add(child)
            kill_tree(child)
    return len(strays)


def reap(workers: set[int]) -> None:
    """Let go of children that have ended, but for workers: an order to kill may be on its way to those."""
    for child in set(children(os.getpid())) - workers:
        if is_zombie(child):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
