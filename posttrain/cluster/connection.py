"""A connection to Ray for the length of a run, and what ends a run when Ray does."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from posttrain.disk import warn
from posttrain.errors import EXIT_TRY_AGAIN, RunInterrupted, RunStopped
from posttrain.process_logs import gather, point_to
from posttrain.ray_network import CLUSTER_SWITCH, LOOPBACK, require_closed

# What has threads of its own that must end before Ray does.
pools: weakref.WeakSet[Any] = weakref.WeakSet()
_STARTS = 3


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: `ray.init` puts one of its own in its place, which ends without saving."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _start(num_cpus: float) -> None:
    """Start a Ray of this process's own. A machine that is too busy for it within Ray's 30 seconds is asked again.

    Raises:
        RunInterrupted: it never was less busy.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",  # without it Ray would join any cluster that was ever started on this machine
                num_cpus=max(os.cpu_count() or 1, int(num_cpus + 0.999)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
            return
        except Exception as error:  # it has no type of its own
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == _STARTS:
                raise RunInterrupted(
                    f"Ray did not start within 30 seconds, {_STARTS} times: the machine is very busy; try again when it is "
                    f"less so (--max-restarts N does that by itself)"
                ) from error
            warn(f"Ray did not start within 30 seconds: the machine is very busy; start {attempt + 1} of {_STARTS}")


@contextmanager
def _only_this_machine() -> Iterator[None]:
    """A Ray that is started in the block listens on 127.0.0.1 alone, all its services and later workers.

    It is Ray's own behaviour on desktops, where no cluster is formed. On Linux its metrics port would otherwise be open to
    everybody, and every other one to whoever has the token.
    """
    constants = ray._private.ray_constants
    before, environment = constants.ENABLE_RAY_CLUSTER, dict(os.environ)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ.update({**LOOPBACK, **{name: value for name, value in environment.items() if name != CLUSTER_SWITCH}})
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        for name in LOOPBACK.keys() - environment.keys():
            os.environ.pop(name, None)
        os.environ.update(environment)


@contextmanager
def session(address: str | None, num_cpus: float, logs: Path | None = None) -> Iterator[None]:
    """A connection to Ray for the length of the block.

    Joins the cluster at `address`, or that of the surrounding Ray job, or starts a local one that is shut down at the
    end with all its processes.

    Args:
        address: of a running cluster; None as said above.
        num_cpus: what the actors will reserve, so that a local Ray has at least that.
        logs: the run directory's `logs`, where the logs of its actors are gathered at the end; None leaves them to Ray.

    Raises:
        RunStopped: the cluster has too few CPUs for the actors, or others can reach it without a token.
        RunInterrupted: the machine was too busy to start Ray.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    require_closed(address, os.environ)
    # Ray announces its token authentication as a warning; it is what we want.
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _own_sigterm():
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            with _only_this_machine():
                _start(num_cpus)
    over = threading.Event()
    try:
        _watch_raylet(over)
        available = ray.cluster_resources().get("CPU", 0)
        if available < num_cpus:
            raise RunStopped(
                f"the Ray cluster has {available:g} CPUs and this recipe reserves {num_cpus:g}; add nodes, or lower "
                f"sampler.num_workers, sampler.num_cpus or learner.num_workers"
            )
        if logs is not None:
            point_to(_log_directory(), logs / "ray")
        yield
    finally:
        over.set()
        for pool in list(pools):
            pool.close()
        try:
            if logs is not None:
                gather(_log_directory(), logs / "ray", ray.get_runtime_context().get_job_id())
        except Exception as error:  # a full disk, or a Ray that is gone, must not hide what happened
            print(f"warning: the logs of Ray's processes were not gathered: {error}", file=sys.stderr)
        finally:
            ray.shutdown()


def _log_directory() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _watch_raylet(over: threading.Event) -> None:
    """End this process with a message when Ray's process on this machine dies before `over` is set.

    Without it the next object that is put would end it without a word. What a run needs to go on is on disk at any moment.
    """
    raylet = _raylet()
    if raylet is None or sys.platform != "linux":
        return
    descriptor = os.pidfd_open(raylet)

    def wait() -> None:
        while not over.is_set():
            if select.select([descriptor], [], [], 1.0)[0] and not over.is_set():
                print(
                    "stopped: the raylet, Ray's process on this machine, died (logs: Ray's session directory); start it "
                    "again if it is a cluster's, and go on with --resume",
                    file=sys.stderr,
                    flush=True,
                )
                sys.stdout.flush()
                os._exit(EXIT_TRY_AGAIN)
        os.close(descriptor)

    threading.Thread(target=wait, name="raylet", daemon=True).start()


def _raylet() -> int | None:
    """Process id of Ray's process on this machine, if it can be seen."""
    node = ray._private.worker._global_node
    if node is None:  # reached over the network
        return None
    socket_name = f"--raylet_socket_name={node.raylet_socket_name}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # processes come and go
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"/raylet") and socket_name in words:
                return int(path.parent.name)
    return None
