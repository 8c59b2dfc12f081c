"""Ray: sessions, the sampler pool and the learner group. The only file that imports ray.

Algorithms see four verbs: `SamplerPool.generate`, `LearnerGroup.forward_backward`, `LearnerGroup.optim_step` and
`posttrain.weights.Publisher.publish`.

What may be lost, a sampler, is replaced (posttrain/fleet.py); what may not, a learner or this machine's Ray, ends the run with
RunInterrupted or its exit code, and --resume goes on.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import reduce
from importlib import import_module
from operator import add, or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.dispatch import Dispatcher, Finished, SamplerLost
from posttrain.errors import EXIT_TRY_AGAIN, RunInterrupted, RunStopped
from posttrain.fault_log import FaultLog
from posttrain.fleet import Fleet
from posttrain.health import Pulse
from posttrain.memory import is_out_of_memory
from posttrain.metrics import Metric, merge
from posttrain.packing import pack
from posttrain.placement import bundle, interface_of, require_room
from posttrain.process_logs import gather, point_to
from posttrain.ray_network import CLUSTER_SWITCH, LOOPBACK, is_loopback, require_closed
from posttrain.recipe import (
    AlgorithmSection,
    FaultsSection,
    LearnerSection,
    ModelSection,
    RolloutSection,
    SamplerSection,
)
from posttrain.threads import thread_environment
from posttrain.types import Completion, Prompt, Sample, SamplingParams, TrainBatch
from posttrain.wire import Digest, LoadReport, WeightSnapshot, canary_sample, to_chunks

if TYPE_CHECKING:
    from posttrain.learner_scores import Scores
    from posttrain.parity import Agreement
    from rewards.scoring import Item, RewardFunction
    from rewards.warden import Limits, Report


# Of a sampler: rollouts and an evaluation, a load with its canary, those who hurry them and those who feel its pulse.
_CALLS_AT_ONCE = 12
_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # of the machine: Ray ended a process before the kernel would
)
_pools: weakref.WeakSet[SamplerPool] = weakref.WeakSet()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: `ray.init` puts one of its own in its place, which ends without saving."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


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
                ray.init(
                    address="local",  # without it Ray would join any cluster that was ever started on this machine
                    num_cpus=max(os.cpu_count() or 1, int(num_cpus + 0.999)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
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
        for pool in list(_pools):
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


def _get(calls: Any, who: str, timeout: float | None = None) -> Any:
    """What actors answer that the run cannot do without.

    Raises:
        RunInterrupted: one of them is gone.
        ray.exceptions.GetTimeoutError: no answer for so many seconds.
    """
    try:
        return ray.get(calls, timeout=timeout)
    except _LOSSES as error:
        raise RunInterrupted(
            f"{who} was lost: {_first_line(error)} (its log: Ray's session directory); go on from the last checkpoint with "
            f"--resume"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# --- placement ------------------------------------------------------------------------------------------------------


class _Places:
    """Room for the workers of one role, as the recipe places them.

    Attributes:
        options: of each worker's actor.
    """

    def __init__(self, role: str, section: LearnerSection | SamplerSection, num_gpus: float) -> None:
        count = section.num_workers
        needed = bundle(section.num_cpus, num_gpus, section.resources)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        require_room(role, count, needed, section.placement, nodes)
        reserved = {"num_cpus": section.num_cpus, "num_gpus": num_gpus, "resources": dict(section.resources)}
        self.options: list[dict[str, Any]] = [dict(reserved) for _ in range(count)]
        self._group = None
        if section.placement == "any" or not needed:
            return
        self._group = ray.util.placement_group([needed] * count, strategy=section.placement.upper())
        try:
            ray.get(self._group.ready(), timeout=section.start_timeout_seconds)
        except ray.exceptions.GetTimeoutError:
            self.release()
            raise RunStopped(
                f"{role}.placement: {section.placement}: after {section.start_timeout_seconds:g} s the nodes have no free "
                f"room for {count} workers of {needed}; end what runs there, or raise {role}.start_timeout_seconds"
            ) from None
        for index, options in enumerate(self.options):
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            )

    def release(self) -> None:
        """Give the room back."""
        if self._group is not None:
            ray.util.remove_placement_group(self._group)


# --- samplers -------------------------------------------------------------------------------------------------------


class _SamplerActor:
    """A `posttrain.sampler.Sampler` in a process of its own."""

    def __init__(
        self,
        model: ModelSection,
        section: SamplerSection,
        seed: int,
        faults: FaultsSection,
        rollout: RolloutSection,
    ) -> None:
        from posttrain.sampler import Sampler

        assert model.model_name_or_path is not None
        self._sampler = Sampler(
            model.model_name_or_path,
            dtype=section.dtype or model.dtype,
            max_model_len=section.max_model_len,
            max_num_seqs=section.max_num_seqs,
            gpu_memory_utilization=section.gpu_memory_utilization,
            trust_remote_code=model.trust_remote_code,
            seed=seed,
            max_candidates=rollout.top_k,
        )
        self._faults = faults
        self._recompute = rollout.cache_on_update == "recompute"
        self._loading = False
        self._chunks = 0  # of weights that were fetched

    def ready(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def collect(self, *arguments: Any) -> Finished:
        with _engine_failures():
            return self._sampler.collect(*arguments)

    def hurry(self) -> None:
        self._sampler.hurry()

    def pulse(self) -> Pulse:
        pulse = self._sampler.pulse(loading=self._loading)
        return replace(pulse, progress=pulse.progress + self._chunks)

    def load_weights(self, snapshot: WeightSnapshot, canary: Sequence[tuple[int, ...]]) -> LoadReport:
        self._loading = True
        try:
            with _engine_failures():
                return self._load_weights(snapshot, canary)
        finally:
            self._loading = False

    def _load_weights(self, snapshot: WeightSnapshot, canary: Sequence[tuple[int, ...]]) -> LoadReport:
        start = time.perf_counter()
        digest = Digest()
        tensors: list[Any] = []
        for handle in snapshot.chunks:
            chunk = ray.get(handle)
            self._chunks += 1
            digest.add(chunk)
            tensors.extend((wire.name, wire.tensor()) for wire in chunk)
        if self._faults.router_noise and snapshot.version in (self._faults.noisy_versions or (snapshot.version,)):
            tensors = [
                (name, noisy(tensor, self._faults.router_noise) if name.endswith("gate.weight") else tensor)
                for name, tensor in tensors
            ]
        if snapshot.version != self._faults.skip_publication:
            self._sampler.update_weights(tensors, snapshot.version, recompute=self._recompute)
        seconds = time.perf_counter() - start
        scored = self._sampler.prompt_logprobs(canary)
        samples = tuple(
            canary_sample(sequence, logprobs, experts)
            for sequence, (logprobs, experts) in zip(canary, scored, strict=True)
        )
        return LoadReport(snapshot.version, digest.hexdigest(), seconds, samples)


@contextmanager
def _engine_failures() -> Iterator[None]:
    """Whatever an engine raises, other than about what it was asked for, is its end: a device that failed stays failed."""
    try:
        yield
    except (ValueError, RunStopped, ray.exceptions.RayError):  # the last: the weights are gone, not the engine
        raise
    except Exception as error:
        traceback.print_exc()
        raise SamplerLost(f"its engine failed: {_first_line(error)}") from error


def noisy(tensor: Any, deviation: float) -> Any:
    """With normal noise, always the same for the same shape: a deliberate fault."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tensor + (deviation * torch.randn(tensor.shape, generator=generator)).to(tensor)


class _SamplerWorkers:
    """What a `Fleet` asks of Ray."""

    def __init__(
        self, section: SamplerSection, options: Sequence[Mapping[str, Any]], start: Callable[[Any, int, bool], Any]
    ) -> None:
        from posttrain.sampler import engine_environment

        self._start, self._options = start, options
        self._environment = engine_environment(section.num_threads, section.kv_cache_gib)

    def start(self, number: int, place: int, *, replaces: bool) -> Any:
        actor = ray.remote(_SamplerActor).options(
            **self._options[place],
            max_concurrency=_CALLS_AT_ONCE,
            runtime_env={"env_vars": self._environment},
        )
        return self._start(actor, number, replaces)

    def call(self, worker: Any, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()

        def take(call: Future[Any]) -> None:
            error = call.exception()
            if error is None:
                answer.set_result(call.result())
            elif isinstance(error, SamplerLost):  # raised in the actor: the text of Ray's would be a traceback
                answer.set_exception(SamplerLost(str(getattr(error, "cause", error))))
            elif isinstance(error, ray.exceptions.RayTaskError) and isinstance(error, _LOSSES):
                answer.set_exception(RunInterrupted("published weights are gone with the learner; go on with --resume"))
            elif isinstance(error, _LOSSES):
                answer.set_exception(SamplerLost(_first_line(error)))
            else:
                answer.set_exception(error)

        getattr(worker, method).remote(*arguments).future().add_done_callback(take)
        return answer

    def end(self, worker: Any) -> None:
        ray.kill(worker)  # with SIGKILL after 5 seconds, if it does not answer


class _SamplerCalls:
    """What a `Dispatcher` asks of the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self, sampler: int, *arguments: Any) -> Future[Finished]:
        return self._fleet.call(sampler, "collect", *arguments)

    def hurry(self, sampler: int) -> None:
        self._fleet.call(sampler, "hurry")

    def serving(self) -> list[int]:
        return self._fleet.serving()

    def is_lost(self, sampler: int) -> bool:
        return self._fleet.is_lost(sampler)


class SamplerPool:
    """The samplers. Prompts go only to those whose receipt for the current version is valid.

    One thread may generate while another loads weights: prompts wait for the receipts. A load waits for what is being
    generated, or with `rollout.in_flight_updates` comes in between. A sampler that is lost is replaced meanwhile.

    Args:
        model: what they load at the start.
        section, seed, faults, rollout: of the recipe.
        origin: what those load that are started later; the checkpoint that a resumed run began with may be deleted by then.
            None takes `model`.
        report: hears of samplers that are lost and replaced.
    """

    def __init__(
        self,
        model: ModelSection,
        section: SamplerSection,
        seed: int,
        faults: FaultsSection | None = None,
        rollout: RolloutSection | None = None,
        *,
        origin: ModelSection | None = None,
        report: FaultLog | None = None,
    ) -> None:
        faults, rollout = faults or FaultsSection(), rollout or RolloutSection()

        def start(actor: Any, number: int, replaces: bool) -> Any:
            source = (origin or model) if replaces else model
            return actor.remote(source, section, seed + number, faults, rollout)

        self._places = _Places("sampler", section, 1 if ray.cluster_resources().get("GPU", 0) else 0)
        workers = _SamplerWorkers(section, self._places.options, start)
        self.fleet = Fleet(workers, section, report or FaultLog())
        self._dispatcher = Dispatcher(_SamplerCalls(self.fleet), section.max_num_seqs // rollout.num_generations)
        self._max_carries = rollout.max_carries
        self._in_flight_updates = rollout.in_flight_updates
        self._timeout = section.start_timeout_seconds
        _pools.add(self)

    @property
    def version(self) -> int:
        """That the samplers have proved to hold."""
        return self.fleet.version

    def wait_until_ready(self) -> list[str]:
        """Wait for the engines, and look after them from then on. Returns the Ray node id of each.

        Raises:
            RunStopped: an engine did not start, or not in time.
        """
        workers = self.fleet.workers()
        try:
            nodes: list[str] = ray.get([worker.ready.remote() for worker in workers], timeout=self._timeout)
        except ray.exceptions.GetTimeoutError:
            raise RunStopped(
                f"a sampler was not ready after {self._timeout:g} s: raise sampler.start_timeout_seconds, or look at "
                f"the actor's log in Ray's session directory; is there room for {len(workers)} sampler(s)?"
            ) from None
        except _LOSSES as error:
            raise RunStopped(f"a sampler did not start: {error}") from error
        self.fleet.watch()
        return nodes

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """Sample on all admitted samplers; completions come in the order of the prompts.

        Raises:
            ParityError: no sampler holds a proved copy of the current policy.
            RunInterrupted: no sampler is left.
        """
        with self.fleet.generating():
            return self._dispatcher.everything(prompts, params, self.version)

    def generate_enough(
        self, prompts: Sequence[Prompt], params: SamplingParams, count: int
    ) -> list[tuple[Prompt, list[Completion]]]:
        """Begin these prompts beside those carried, and return as soon as `count` groups are finished.

        The others are carried: the next call goes on with them, by the weights of then. Those that have been carried
        `rollout.max_carries` times are finished whatever the count.

        Raises:
            ParityError, RunInterrupted: see `generate`.
        """
        with self.fleet.generating():
            return self._dispatcher.enough(prompts, params, self.version, count=count, max_carries=self._max_carries)

    @property
    def carried(self) -> list[Prompt]:
        """Prompts that were given to `generate_enough` and whose groups it has not returned."""
        return self._dispatcher.carried

    def load_weights(self, snapshot: WeightSnapshot, canary: Sequence[tuple[int, ...]]) -> dict[int, LoadReport]:
        """Load a snapshot on every sampler, by number. None begins to generate until `admit`."""
        return self.fleet.load(snapshot, canary, in_flight=self._in_flight_updates)

    def metrics(self) -> dict[str, Metric]:
        """How the samplers fare: those that serve, and what has happened since the start."""
        return {
            "sampler/serving": Metric(self.fleet.num_serving, "last"),
            "sampler/restarts": Metric(self.fleet.restarts, "last"),
            "sampler/requeued_groups": Metric(self._dispatcher.requeued, "last"),
        }

    def close(self) -> None:
        """Let go of the engines: whoever ends from now on is not missed."""
        self.fleet.close()

    def stop(self) -> None:
        """End the engines and give back their memory."""
        self.close()
        for worker in self.fleet.workers():
            ray.kill(worker)
        self._places.release()


# --- learner --------------------------------------------------------------------------------------------------------


class _RankActor:
    """A rank of a model in training, in a process of its own."""

    def __init__(self) -> None:
        self._model: Any = None

    def address(self) -> tuple[str, int]:
        """Where this process can be reached, and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, environment: dict[str, str], made_by: str, arguments: dict[str, Any]) -> str:
        os.environ.update(environment)
        # Without it gloo takes the address of the host's name, which on many systems is one that other nodes cannot reach.
        network = interface_of(ray.util.get_node_ip_address())
        if network is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        if is_loopback(environment.get("MASTER_ADDR", "")) and not torch.cuda.is_available():
            # Ranks of one machine meet in a file: torch's TCPStore listens on every interface, and to everybody.
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{environment['RENDEZVOUS_FILE']}",
                rank=int(environment["RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
            )
        module, _, name = made_by.partition(":")
        self._model = getattr(import_module(module), name)(**arguments)
        return ray.get_runtime_context().get_node_id()

    def sees(self, path: str) -> bool:
        return os.path.exists(path)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._model, method)(*args, **kwargs)

    def call_with_samples(
        self, method: str, batch: TrainBatch, samples: Sequence[Sample], *args: Any, **settings: Any
    ) -> Any:
        # Samples are an argument of their own, so that Ray fetches them once for all ranks.
        return getattr(self._model, method)(batch, samples, *args, **settings)

    def export_weights(self, version: int) -> WeightSnapshot:
        digest = Digest()
        handles = []
        for chunk in to_chunks(self._model.checkpoint_tensors()):
            digest.add(chunk)
            handles.append(ray.put(chunk))
        return WeightSnapshot(version, digest.hexdigest(), digest.num_bytes, tuple(handles))


class _RankGroup:
    """The ranks of a model in training behind one set of calls. How samples are laid out in memory is decided here."""

    made_by: str  # module:class of a rank
    _who = "a rank of the learner"
    with_experts = False

    def __init__(self, learner: LearnerSection, **arguments: Any) -> None:
        gpus = learner.num_gpus
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        learner.require_accelerator(bool(gpus))
        self.world_size = learner.num_workers
        self._section = learner
        self._max_tokens = learner.max_tokens_per_microbatch
        self.report = FaultLog()  # hears of what is out of memory
        threads = thread_environment(learner.num_threads)
        # torch reads its thread settings when it is imported, which unpickling may do before `start` runs.
        quiet = {**threads, "TOKENIZERS_PARALLELISM": "false"}
        actor = ray.remote(_RankActor)
        places = _Places("learner", learner, gpus)
        self._actors = [
            actor.options(**options, runtime_env={"env_vars": quiet}).remote() for options in places.options
        ]
        host, port = self._rendezvous(learner.start_timeout_seconds)
        meeting = Path(tempfile.gettempdir()) / f"posttrain-ranks-{uuid.uuid4().hex}"
        starts = []
        for rank, handle in enumerate(self._actors):
            environment = dict(threads)
            if self.world_size > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(self.world_size),
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": host,
                    "MASTER_PORT": str(port),
                    "RENDEZVOUS_FILE": str(meeting),
                }
            starts.append(handle.start.remote(environment, self.made_by, {"learner": learner, **arguments}))
        self._starts = starts

    def _rendezvous(self, timeout: float) -> tuple[str, int]:
        """Where the ranks meet: host of the first one and a port."""
        try:
            found: tuple[str, int] = _get(self._actors[0].address.remote(), self._who, timeout)
        except ray.exceptions.GetTimeoutError:
            raise RunStopped(
                f"the first learner rank had no room for {timeout:g} s: end what else reserves the nodes, or raise "
                f"learner.start_timeout_seconds"
            ) from None
        return found

    def wait_until_ready(self) -> list[str]:
        """Wait for the ranks. Returns the Ray node id of each."""
        nodes: list[str] = _get(self._starts, self._who)
        return nodes

    def require_shared(self, directory: str) -> None:
        """Refuse a run directory that the first rank, which writes checkpoints, does not see.

        Raises:
            RunStopped: it is on another node, and the directory on a disk of this one.
        """
        if not ray.get(self._actors[0].sees.remote(directory)):
            raise RunStopped(
                f"output_dir: {directory} is not there on the node of the first learner rank, which writes the checkpoints; "
                f"give a directory on a file system that all nodes share"
            )

    def optim_step(self) -> dict[str, Metric]:
        """Clip and step on every rank."""
        return self._on_all("optim_step")[0]

    def save(self, path: str) -> None:
        """Write the checkpoint files into an existing directory."""
        self._on_all("save", path)

    def restore(self, path: str) -> None:
        """Take optimizer and schedule of a checkpoint."""
        self._on_all("restore", path)

    def gradients(self) -> dict[str, Any]:
        """The first rank's accumulated gradient, by parameter name."""
        return self._on_all("gradients")[0]  # weights may be spread over the ranks

    def _forward_backward(self, samples: Sequence[Sample], *args: Any) -> dict[str, Metric]:
        parts = self._on_packed(samples, lambda actor, batch: actor.call.remote("forward_backward", batch, *args))
        return _sum_of_parts(parts)

    def _with_samples(self, method: str, samples: Sequence[Sample], *args: Any, **settings: Any) -> list[Any]:
        shared = ray.put(tuple(samples))
        return self._on_packed(
            samples,
            lambda actor, batch: actor.call_with_samples.remote(method, batch, shared, *args, **settings),
        )

    def _on_packed(self, samples: Sequence[Sample], call: Callable[[Any, TrainBatch], Any]) -> list[Any]:
        """A call on every rank with its part of a minibatch; in smaller microbatches from now on if memory does not suffice.

        Losses are sums over one global denominator, so the gradient is that of the larger ones. What was accumulated before
        is dropped: a minibatch is one call.
        """
        while True:
            batches = zip(self._actors, self._pack(samples), strict=True)
            try:
                found: list[Any] = _get([call(actor, batch) for actor, batch in batches], self._who)
                return found
            except Exception as error:
                if not is_out_of_memory(getattr(error, "cause", error)):  # Ray's error is about the actor's own
                    raise
                self._take_less(error)

    def _take_less(self, error: Exception) -> None:
        """Halve the microbatches.

        Raises:
            RunStopped: they are single rows already, or other ranks are left waiting in a collective call.
        """
        before, row = self._max_tokens, self._section.row_length
        cure = (
            "lower learner.max_tokens_per_microbatch or learner.row_length, or set learner.gradient_checkpointing or "
            "learner.logits_chunk, and go on with --resume"
        )
        if self.world_size > 1 or before < 2 * row:
            why = "several ranks cannot go back together" if self.world_size > 1 else "a microbatch is one row already"
            raise RunStopped(
                f"{self._who} is out of memory at {before} tokens a microbatch, and {why}; {cure}"
            ) from error
        self._max_tokens = before // 2
        self._on_all("drop_gradients")
        self.report(
            "out_of_memory",
            f"{self._who} is out of memory: microbatches of {self._max_tokens} instead of {before} tokens from now on, which "
            f"changes no gradient; set learner.max_tokens_per_microbatch={self._max_tokens} next time",
            max_tokens_per_microbatch=self._max_tokens,
        )

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        found: list[Any] = _get([actor.call.remote(method, *args) for actor in self._actors], self._who)
        return found

    def _pack(self, samples: Sequence[Sample]) -> list[TrainBatch]:
        return pack(
            samples,
            world_size=self.world_size,
            max_tokens_per_microbatch=self._max_tokens,
            row_length=self._section.row_length,
            pad_token_id=0,
            with_experts=self.with_experts,
        )


class LearnerGroup(_RankGroup):
    """The policy in training: ranks of `posttrain.learner.Learner`."""

    made_by = "posttrain.learner:Learner"

    def __init__(self, learner: LearnerSection, **arguments: Any) -> None:
        self.with_experts = arguments["router_section"].replay
        super().__init__(learner, **arguments)

    def forward_backward(self, samples: Sequence[Sample], algorithm: AlgorithmSection) -> dict[str, Metric]:
        """Pack a minibatch for the ranks and accumulate its gradient. Means over the whole minibatch."""
        return self._forward_backward(samples, algorithm)

    def forward_backward_compared(
        self, samples: Sequence[Sample], algorithm: AlgorithmSection, *, near_tie_margin: float
    ) -> tuple[dict[str, Metric], Agreement]:
        """`forward_backward`, and how far the sampler is from what the learner computed in it."""
        parts = self._with_samples("forward_backward_compared", samples, algorithm, near_tie_margin=near_tie_margin)
        parity, apart = zip(*(agreement for _, agreement in parts), strict=True)
        return _sum_of_parts([metrics for metrics, _ in parts]), (reduce(add, parity), reduce(add, apart))

    def score(self, samples: Sequence[Sample], **settings: Any) -> Scores:
        """`Learner.score` of all ranks together."""
        return reduce(add, self._with_samples("score", samples, **settings))

    def export_weights(self, version: int) -> WeightSnapshot:
        # Only the first rank sends anything, but weights may be spread over all.
        snapshots = _get([actor.export_weights.remote(version) for actor in self._actors], self._who)
        return snapshots[0]

    def roll_back(self, path: str) -> None:
        """Take weights, optimizer and schedule of an earlier checkpoint, on every rank."""
        self._on_all("roll_back", path)

    def renew_reference(self) -> None:
        """The policy as it is becomes the reference, on every rank."""
        self._on_all("renew_reference")

    def take_expert_loads(self) -> list[list[int]]:
        """[L][E] tokens that each expert got since this was last asked; empty for a dense model."""
        return self._on_all("take_expert_loads")[0]


class CriticGroup(_RankGroup):
    """The critic in training: ranks of `posttrain.critic.Critic`."""

    made_by = "posttrain.critic:Critic"
    _who = "a rank of the critic"

    def values(self, samples: Sequence[Sample]) -> dict[int, tuple[float, ...]]:
        """What is expected before each token, by sample."""
        return reduce(or_, self._with_samples("values", samples))

    def forward_backward(self, samples: Sequence[Sample]) -> dict[str, Metric]:
        """Pack a minibatch, whose samples carry values and returns, and accumulate its gradient."""
        return self._forward_backward(samples)


def _sum_of_parts(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    # Each rank returns its part of the mean.
    return {name: Metric(metric.value, "mean") for name, metric in merge(parts).items()}


# --- what Ray shows ---------------------------------------------------------------------------------------------------


class StepGauges:
    """Numbers of a run's last step for Ray's dashboard, and for a Prometheus that scrapes what Ray exports.

    Ray puts `ray_` before the names.

    Args:
        run: its name, the tag `run` of each number.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._step = Gauge("posttrain_step", "steps that are done", tag_keys=("run",))
        self._seconds = Gauge("posttrain_phase_seconds", "seconds of the last step's phases", tag_keys=("run", "phase"))
        self._throughput = Gauge(
            "posttrain_throughput", "what the last step generated per second", tag_keys=("run", "unit")
        )

    def show(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Show a finished step: the metrics `time/<phase>` and `throughput/<unit>_per_second`."""
        self._step.set(step, {"run": self._run})
        for name, metric in metrics.items():
            family, _, rest = name.partition("/")
            if family == "time":
                self._seconds.set(metric.value, {"run": self._run, "phase": rest})
            elif family == "throughput":
                self._throughput.set(metric.value, {"run": self._run, "unit": rest.removesuffix("_per_second")})


# --- rewards --------------------------------------------------------------------------------------------------------


class _RewardActor:
    """A `rewards.warden.Warden` on some node of the cluster."""

    def __init__(self, function: RewardFunction, limits: Limits, directory: str) -> None:
        from rewards.warden import Warden

        if os.path.isdir(directory):  # options of a reward may be paths, relative to where the run was started
            os.chdir(directory)
        self._warden = Warden(function, limits)

    def score(self, groups: Sequence[Sequence[Item]]) -> Report:
        return self._warden.score(groups)

    def close(self) -> None:
        self._warden.close()


class RewardActors:
    """The actors of one reward.

    Args:
        function: what they run.
        limits: what it may do.
        num_workers: how many there are.
        num_cpus, num_gpus: what Ray reserves for one.
    """

    def __init__(
        self, function: RewardFunction, limits: Limits, num_workers: int, num_cpus: float, num_gpus: float
    ) -> None:
        # Ray starts an actor that died again; what it was doing then is sent again by those who wait for it.
        actor = ray.remote(_RewardActor).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1)
        self._actors = [actor.remote(function, limits, os.getcwd()) for _ in range(num_workers)]
        self._next = 0

    def submit(self, groups: Sequence[Sequence[Item]]) -> list[tuple[list[int], Any]]:
        """Spread whole groups over the actors. Returns for each part the places of its groups, and what to `wait` for."""
        count = len(self._actors)
        parts = [list(range(turn, len(groups), count)) for turn in range(count)]
        return [(part, self.submit_to_any([groups[place] for place in part])) for part in parts if part]

    def submit_to_any(self, groups: Sequence[Sequence[Item]]) -> Any:
        """Give groups to the actor whose turn it is."""
        self._next += 1
        return self._actors[self._next % len(self._actors)].score.remote(groups)

    def wait(self, call: Any) -> tuple[Report | None, str]:
        """The report of a submitted part, or None and why there is none: the actor is gone."""
        try:
            return ray.get(call), ""
        except (
            ray.exceptions.ActorDiedError,
            ray.exceptions.ActorUnavailableError,
            ray.exceptions.NodeDiedError,
        ) as error:
            return None, f"its actor was lost: {str(error).splitlines()[0]}"

    def stop(self) -> None:
        """End the actors, and before that the processes that they started."""
        closing = [actor.close.remote() for actor in self._actors]
        ray.wait(closing, num_returns=len(closing), timeout=30)
        for actor in self._actors:
            ray.kill(actor)


__all__ = ["CriticGroup", "LearnerGroup", "RewardActors", "SamplerPool", "StepGauges", "session"]
