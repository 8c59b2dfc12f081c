"""The sampler pool: actors with a vLLM engine each, which come and go (posttrain/fleet.py)."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from posttrain.cluster.calls import LOSSES, first_line
from posttrain.cluster.connection import pools
from posttrain.cluster.places import Places
from posttrain.dispatch import Dispatcher, Finished, SamplerLost
from posttrain.errors import RunInterrupted, RunStopped
from posttrain.fault_log import FaultLog
from posttrain.fleet import Fleet
from posttrain.health import Pulse
from posttrain.metrics import Metric
from posttrain.recipe import (
    FaultsSection,
    ModelSection,
    RolloutSection,
    SamplerSection,
)
from posttrain.types import Completion, Prompt, SamplingParams
from posttrain.wire import Digest, LoadReport, WeightSnapshot, WireTensor, canary_sample, digest_of_all

# Rollouts and an evaluation, a load with its canary, those who hurry a sampler and those who feel its pulse.
_CALLS_AT_ONCE = 12


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
            tensor_parallel_size=section.tensor_parallel_size,
            enable_expert_parallel=section.enable_expert_parallel,
        )
        self._in_buckets = section.tensor_parallel_size > 1
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
        is_skipped, noise = snapshot.version == self._faults.skip_publication, self._noise(snapshot.version)
        # Worker processes hash what they load; a deliberate fault is to be found by the canary, so then it is done here too.
        arrived, given = (None, None) if self._in_buckets and not (is_skipped or noise) else (Digest(), Digest())
        weights: Iterable[tuple[str, Any]] = self._fetched(snapshot, noise, arrived, given)
        if self._in_buckets:
            self._bring(snapshot)
        else:
            weights = list(weights)
        loaded: tuple[str, ...] = ()
        if not is_skipped:
            loaded = self._sampler.update_weights(weights, snapshot.version, recompute=self._recompute)
        for _ in weights:  # what was skipped arrives all the same
            pass
        seconds = time.perf_counter() - start
        digest = digest_of_all(
            arrived.hexdigest() if arrived else snapshot.digest, given.hexdigest() if given else snapshot.digest, loaded
        )
        if digest != snapshot.digest:
            # What it would answer proves nothing, and workers with different weights may wait for each other without end.
            return LoadReport(snapshot.version, digest, seconds, ())
        scored = self._sampler.prompt_logprobs(canary)
        samples = tuple(
            canary_sample(sequence, logprobs, experts)
            for sequence, (logprobs, experts) in zip(canary, scored, strict=True)
        )
        return LoadReport(snapshot.version, digest, seconds, samples)

    def _noise(self, version: int) -> float:
        """Of the routers, in a publication that is to be spoilt; else 0."""
        return (self._faults.router_noise or 0.0) if version in (self._faults.noisy_versions or (version,)) else 0.0

    def _bring(self, snapshot: WeightSnapshot) -> None:
        """Have the weights on this node before the engine stands still for them."""
        missing = list(snapshot.chunks)
        while missing:
            _, missing = ray.wait(missing, num_returns=1, fetch_local=True)
            self._chunks += 1

    def _fetched(
        self, snapshot: WeightSnapshot, noise: float, arrived: Digest | None, given: Digest | None
    ) -> Iterator[tuple[str, Any]]:
        """The tensors of a snapshot, chunk by chunk; the digests are told what arrives and what leaves here."""
        for handle in snapshot.chunks:
            chunk = ray.get(handle)
            self._chunks += 1
            if arrived is not None:
                arrived.add(chunk)
            for wire in chunk:
                tensor = wire.tensor()
                if noise and wire.name.endswith("gate.weight"):
                    tensor = noisy(tensor, noise)
                if given is not None and self._in_buckets:
                    given.add([WireTensor.of(wire.name, tensor)])
                yield wire.name, tensor


@contextmanager
def _engine_failures() -> Iterator[None]:
    """Whatever an engine raises, other than about what it was asked for, is its end: a device that failed stays failed."""
    try:
        yield
    except (ValueError, RunStopped, ray.exceptions.RayError):  # the last: the weights are gone, not the engine
        raise
    except Exception as error:
        traceback.print_exc()
        raise SamplerLost(f"its engine failed: {first_line(error)}") from error


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
        self._environment = engine_environment(section.num_threads, section.kv_cache_gib, section.tensor_parallel_size)

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
            elif isinstance(error, ray.exceptions.RayTaskError) and isinstance(error, LOSSES):
                answer.set_exception(RunInterrupted("published weights are gone with the learner; go on with --resume"))
            elif isinstance(error, LOSSES):
                answer.set_exception(SamplerLost(first_line(error)))
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

        gpus = section.tensor_parallel_size if ray.cluster_resources().get("GPU", 0) else 0
        self._places = Places("sampler", section, section.cpus_of_one, gpus)
        workers = _SamplerWorkers(section, self._places.options, start)
        self.fleet = Fleet(workers, section, report or FaultLog())
        self._dispatcher = Dispatcher(_SamplerCalls(self.fleet), section.max_num_seqs // rollout.num_generations)
        self._max_carries = rollout.max_carries
        self._in_flight_updates = rollout.in_flight_updates
        self._timeout = section.start_timeout_seconds
        pools.add(self)

    @property
    def version(self) -> int:
        """That the samplers have proved to hold."""
        return self.fleet.version

    def wait_until_ready(self) -> list[str]:
        """Wait for the engines, and look after them from then on. Returns the Ray node id of each.

        Raises:
            RunStopped: an engine did not start, or not in time.
            RunInterrupted: one was lost while it started.
        """
        workers = self.fleet.workers()
        try:
            nodes: list[str] = ray.get([worker.ready.remote() for worker in workers], timeout=self._timeout)
        except ray.exceptions.GetTimeoutError:
            raise RunStopped(
                f"a sampler was not ready after {self._timeout:g} s: raise sampler.start_timeout_seconds, or look at "
                f"the actor's log in Ray's session directory; is there room for {len(workers)} sampler(s)?"
            ) from None
        except LOSSES as error:
            if getattr(error, "actor_init_failed", False):  # by an error of its own, which another try would meet too
                raise RunStopped(f"a sampler did not start: {error}") from error
            raise RunInterrupted(
                f"a sampler was lost while it started: {first_line(error)}; go on with --resume"
            ) from error
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
