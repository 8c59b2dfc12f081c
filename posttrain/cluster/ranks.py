"""Ranks of the learner and of the critic, each a model in training in an actor."""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import reduce
from importlib import import_module
from operator import add, or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from posttrain.cluster.calls import get
from posttrain.cluster.places import Places
from posttrain.errors import RunStopped
from posttrain.fault_log import FaultLog
from posttrain.memory import is_out_of_memory
from posttrain.metrics import Metric, merge
from posttrain.packing import pack
from posttrain.placement import interface_of
from posttrain.ray_network import is_loopback
from posttrain.recipe import (
    AlgorithmSection,
    LearnerSection,
)
from posttrain.threads import thread_environment
from posttrain.types import Sample, TrainBatch
from posttrain.wire import Digest, SnapshotPart, WeightSnapshot, join_parts, to_chunks

if TYPE_CHECKING:
    from posttrain.learner_scores import Scores
    from posttrain.parity import Agreement


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

    def export_weights(self) -> SnapshotPart:
        digest = Digest()
        handles = []
        for chunk in to_chunks(self._model.checkpoint_tensors()):
            digest.add(chunk)
            handles.append(ray.put(chunk))
        return SnapshotPart(tuple(digest.parts), digest.num_bytes, tuple(handles))


class _RankGroup:
    """The ranks of a model in training behind one set of calls. How samples are laid out in memory is decided here."""

    made_by: str  # module:class of a rank
    _who = "a rank of the learner"
    with_experts = shares_prompts = False

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
        places = Places("learner", learner, learner.num_cpus, gpus)
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
            found: tuple[str, int] = get(self._actors[0].address.remote(), self._who, timeout)
        except ray.exceptions.GetTimeoutError:
            raise RunStopped(
                f"the first learner rank had no room for {timeout:g} s: end what else reserves the nodes, or raise "
                f"learner.start_timeout_seconds"
            ) from None
        return found

    def wait_until_ready(self) -> list[str]:
        """Wait for the ranks. Returns the Ray node id of each."""
        nodes: list[str] = get(self._starts, self._who)
        return nodes

    def require_shared(self, directory: str) -> None:
        """Refuse a run directory that ranks which write checkpoints do not see: the first, or all if weights are spread.

        Raises:
            RunStopped: it is on another node, and the directory on a disk of this one.
        """
        writers = self._actors if self._section.parallel == "fsdp" else self._actors[:1]
        for rank, seen in enumerate(get([actor.sees.remote(directory) for actor in writers], self._who)):
            if not seen:
                raise RunStopped(
                    f"output_dir: {directory} is not there on the node of learner rank {rank}, which writes checkpoints; "
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
                found: list[Any] = get([call(actor, batch) for actor, batch in batches], self._who)
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
        found: list[Any] = get([actor.call.remote(method, *args) for actor in self._actors], self._who)
        return found

    def _pack(self, samples: Sequence[Sample]) -> list[TrainBatch]:
        sharing = self._section.context_parallel_size
        batches = pack(
            samples,
            world_size=self.world_size // sharing,
            max_tokens_per_microbatch=self._max_tokens,
            row_length=self._section.row_length,
            pad_token_id=0,
            with_experts=self.with_experts,
            share_prompts=self.shares_prompts,
        )
        return [batch for batch in batches for _ in range(sharing)]


class LearnerGroup(_RankGroup):
    """The policy in training: ranks of `posttrain.learner.Learner`."""

    made_by = "posttrain.learner:Learner"

    def __init__(self, learner: LearnerSection, **arguments: Any) -> None:
        self.with_experts = arguments["router_section"].replay
        self.shares_prompts = learner.share_prompts
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
        """Where the samplers find the present weights: each rank gives its part of them, or the first one all."""
        return join_parts(version, get([actor.export_weights.remote() for actor in self._actors], self._who))

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
