"""The processes that environments run in: one that imports the class, and forks one for each episode.

The first has one thread and runs nothing of the environment but its imports. Over its control socket it gets one byte at a
time: `f` fork (with the episode's end of a socket), `k` kill some episodes with everything they started (a JSON list of
process ids follows); it answers each with a JSON line, and ends with everything when the socket closes.

An episode's process gets the pickled prompt, then texts as JSON strings, and answers each with a JSON object: what
`checked_step` makes of a step, or {"error": status, "detail"}.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from posttrain.environments import EnvironmentSpec, checked_step
from rewards.worker import OUTAGES
from rewards.zygote import PR_SET_CHILD_SUBREAPER, confine, kill_tree, prctl, receive, reply, sweep


def main(number: int) -> None:
    """Serve on the inherited socket `number` until its other end closes."""
    control = socket.socket(fileno=number)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the program that started us
    try:
        spec, memory_bytes = pickle.loads(receive(control))  # from our own pool
        environment = spec.load()
    except BaseException as error:
        reply(control, {"error": "".join(traceback.format_exception_only(error)).strip()})
        return
    reply(control, {"ready": True})
    alive: set[int] = set()
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if command == b"f":
            pid = _fork(control, descriptors[0], environment, spec, memory_bytes)
            alive.add(pid)
            reply(control, {"pid": pid})
        elif command == b"k":
            for pid in json.loads(receive(control)):
                kill_tree(pid)
                alive.discard(pid)
            # What hid from its episode has become a child of this process.
            reply(control, {"strays": sweep(alive)})
        else:  # closed
            sweep(set())
            return


def _fork(
    control: socket.socket, descriptor: int, environment: Any, spec: EnvironmentSpec, memory_bytes: int | None
) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        control.close()
        confine(memory_bytes)
        serve(Connection(descriptor), environment, spec)
    finally:
        os._exit(0)  # not back into the loop of the process that forked, whatever happens


def serve(connection: Connection, environment: Any, spec: EnvironmentSpec) -> None:
    """One episode, until the other end closes."""
    try:
        prompt = pickle.loads(connection.recv_bytes())  # from our own pool
        instance: Any = None

        def start() -> dict[str, Any]:
            nonlocal instance
            instance = environment(**spec.kwargs)
            if (value := instance.reset(prompt)) is not None:
                raise ValueError(
                    f"reset returned a {type(value).__name__}; it must return None: what the policy sees first is the "
                    f"record's prompt"
                )
            return {}

        connection.send_bytes(_answer(start))
        while True:
            text = json.loads(connection.recv_bytes())
            connection.send_bytes(_answer(partial(_step, instance, text)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _step(instance: Any, text: str) -> dict[str, Any]:
    return checked_step(instance.step(text))


def _answer(call: Callable[[], dict[str, Any]]) -> bytes:
    """What came of a call, as JSON."""
    try:
        return json.dumps(call()).encode()
    except BaseException as error:  # also SystemExit: whatever the plugin throws is its own
        return json.dumps(_failure(error)).encode()


def _failure(error: BaseException) -> dict[str, Any]:
    status = "crash"
    if isinstance(error, OUTAGES):
        status = "infrastructure"
    elif isinstance(error, TimeoutError):
        status = "timeout"
    return {"error": status, "detail": f"{type(error).__name__}: {error}"}
