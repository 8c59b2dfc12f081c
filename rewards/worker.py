"""A process that runs a reward function, forked by `rewards.zygote` and watched by `rewards.warden`.

It gets a list of calls at a time and says after each what came of it, so that the one that never ends can be told from the
others. Before each call it draws its number from a pipe, where the warden can draw it too: then the call is another worker's.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from posttrain.types import RewardResult
from rewards.errors import RewardError, Unavailable
from rewards.scoring import Item, RewardFunction

CHUNK = 64  # calls of a plain reward sent to a worker at once
OUTAGES = (Unavailable, ConnectionError)  # nothing is known about the completion


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a reward function.

    Attributes:
        places: [n], of its items in what is being scored.
        items: [n].
    """

    places: tuple[int, ...]
    items: tuple[Item, ...]


def serve(connection: Connection, tickets: int, function: RewardFunction, timeout_seconds: float) -> None:
    """Answer until the other end closes. Requests are pickled lists of calls; answers are JSON objects.

    The calls of a list that are to be made are those whose places in it can be read from `tickets`, a byte each, without
    waiting; of an async reward all.

    For each call {"call", "results": [[score, status, detail], ...]} or {"call", "error", "detail"}; at the end of a list
    {"resident": bytes}. {"imported"} beside it are modules that calls have brought in, for the next worker to have.
    """
    before = set(sys.modules)

    def news() -> dict[str, Any]:
        nonlocal before
        found = sorted(set(sys.modules) - before)
        before = set(sys.modules)
        return {"imported": found} if found else {}

    while True:
        try:
            calls: Sequence[Call] = pickle.loads(connection.recv_bytes())  # from our own warden
        except EOFError:
            return
        if function.form == "async":
            asyncio.run(_serve_async(connection, function, calls, timeout_seconds))
        else:
            while (number := _draw(tickets)) is not None:
                start = time.perf_counter()
                try:
                    answer = _answer(function.score(calls[number].items))
                except BaseException as error:  # also SystemExit: whatever the plugin throws is its own
                    answer = _failure(error)
                _send(connection, {"call": number, **answer, "seconds": time.perf_counter() - start, **news()})
        _send(connection, {"resident": resident_bytes(), **news()})


def _draw(tickets: int) -> int | None:
    """The number of the next call to make; None when there is no more."""
    try:
        return next(iter(os.read(tickets, 1)), None)
    except BlockingIOError:
        return None


async def _serve_async(
    connection: Connection, function: RewardFunction, calls: Sequence[Call], timeout_seconds: float
) -> None:
    async def one(number: int, call: Call) -> None:
        start = time.perf_counter()
        try:
            answer = _answer(await asyncio.wait_for(function.score_async(call.items), timeout_seconds))
        except TimeoutError as error:
            # Ours, or one that the function let through: either way it took too long.
            answer = {"error": "timeout", "detail": str(error)}
        except BaseException as error:
            answer = _failure(error)
        _send(connection, {"call": number, **answer, "seconds": time.perf_counter() - start})

    await asyncio.gather(*(one(number, call) for number, call in enumerate(calls)))


def _answer(results: Sequence[RewardResult]) -> dict[str, Any]:
    return {"results": [[result.score, result.status, result.detail] for result in results]}


def _failure(error: BaseException) -> dict[str, Any]:
    cause = error.__cause__ if isinstance(error, RewardError) and error.__cause__ is not None else error
    if isinstance(cause, OUTAGES):
        return {"error": "infrastructure", "detail": f"{type(cause).__name__}: {cause}"}
    if isinstance(cause, MemoryError):
        return {"error": "memory", "detail": "out of memory"}
    if isinstance(cause, TimeoutError):
        return {"error": "timeout", "detail": str(cause)}
    return {"error": "crash", "detail": str(error) or type(error).__name__}


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def resident_bytes() -> int:
    """Memory of this process that is its own (not shared with what it was forked from)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE")
