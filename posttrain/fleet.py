"""Samplers that may be lost: who may be given prompts, who is lost and replaced, and how a newcomer proves its weights.

The rules alone, on threads and futures: `posttrain.cluster` starts the workers and calls them.

A sampler that dies, hangs or is far too slow (posttrain/health.py) is given up at once: its calls end with `SamplerLost`, so
that its prompts go to the others, and another one is started in the background under a new number. It gets prompts when it
holds the current weights and has proved that, with all others at the next publication or by itself before that.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.dispatch import SamplerLost
from posttrain.errors import ParityError, RunInterrupted
from posttrain.fault_log import FaultLog
from posttrain.health import Health, Pulse, slow_samplers

if TYPE_CHECKING:
    from posttrain.recipe import SamplerSection
    from posttrain.weights import Receipt
    from posttrain.wire import LoadReport, WeightSnapshot

PULSE_SECONDS = 1.0

Canary = Sequence[tuple[int, ...]]


class Workers(Protocol):
    """What a fleet asks of the cluster."""

    def start(self, number: int, place: int, *, replaces: bool) -> Any:
        """Start a worker at one of `num_workers` places, and return at once."""

    def call(self, worker: Any, method: str, *arguments: Any) -> Future[Any]:
        """A method of `posttrain.cluster.samplers._SamplerActor`. Raises SamplerLost there if the worker is gone."""

    def end(self, worker: Any) -> None:
        """End a worker, also one that does not answer."""


class Fleet:
    """The samplers of a run. Several threads may call.

    Args:
        workers: the calls.
        section: how many, and when one is given up.
        report: hears of what is lost and of what replaces it.
    """

    def __init__(self, workers: Workers, section: SamplerSection, report: FaultLog) -> None:
        self.version = -1  # that the admitted samplers have proved to hold
        self.prove: Callable[[int, WeightSnapshot, LoadReport], Receipt] | None = None  # of a newcomer
        self._workers, self._section, self._report = workers, section, report
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # By number. A place in the fleet has one number after the other.
        self._live: dict[int, Any] = {}  # that hold weights, or are being given them
        self._starting: dict[int, Any] = {}  # in the place of a lost one
        self._newcomers: set[int] = set()  # of these, that have started and wait for a publication's weights
        self._place: dict[int, int] = {}
        self._health: dict[int, Health] = {}
        self._calls: dict[int, set[Future[Any]]] = {}
        self._admitted: list[int] = []
        self._coming: set[int] = set()  # places whose sampler was lost and is being replaced
        self._restarts: Counter[int] = Counter()  # by place
        self._last_loss = ""
        self._latest: tuple[WeightSnapshot, Canary] | None = None
        self._loading = self._transferring = False  # a publication: wanted, and under way
        self._welcoming = 0  # newcomers that are being given the weights of the last publication
        self._generating = 0
        self._closed = threading.Event()
        for place in range(section.num_workers):
            number = next(self._numbers)
            self._place[number] = place
            self._live[number] = workers.start(number, place, replaces=False)
            self._calls[number] = set()
            self._admitted.append(number)

    # --- what the dispatcher asks for -----------------------------------------------------------------------------------

    def call(self, number: int, method: str, *arguments: Any) -> Future[Any]:
        """Call a sampler. The future raises SamplerLost as soon as the sampler is given up, whatever it does later."""
        promise: Future[Any] = Future()
        with self._changed:
            worker = self._live.get(number)
            if worker is not None:
                self._calls[number].add(promise)
        if worker is None:
            promise.set_exception(SamplerLost(f"sampler {number} is lost"))
        else:
            self._workers.call(worker, method, *arguments).add_done_callback(partial(self._answer, number, promise))
        return promise

    def is_lost(self, number: int) -> bool:
        with self._changed:
            return number not in self._live

    def serving(self) -> list[int]:
        """Those that may be given prompts now; waits while there is none but one will come.

        Raises:
            RunInterrupted: none is left.
            ParityError: none has proved its weights.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._admitted or not (self._coming or self._transferring) or self._closed.is_set()
            )
            return list(self._admitted) or self._fail()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """For the length of the block prompts are given out. It begins when a publication that is due is over.

        Raises:
            RunInterrupted, ParityError: as `serving`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (not self._loading and (self._admitted or not self._coming)) or self._closed.is_set()
            )
            if not self._admitted:
                self._fail()
            self._generating += 1
        try:
            yield
        finally:
            with self._changed:
                self._generating -= 1
                self._changed.notify_all()

    @property
    def num_serving(self) -> int:
        return len(self._admitted)

    @property
    def restarts(self) -> int:
        """How many samplers were started in the place of another."""
        return sum(self._restarts.values())

    def _fail(self) -> list[int]:
        if self._live and not self._coming:
            raise ParityError("no sampler has a valid receipt for the current version, so none may generate")
        raise RunInterrupted(
            f"no sampler is left: {self._last_loss or 'the fleet was closed'}; sampler.max_restarts="
            f"{self._section.max_restarts} are used up in each place; look at faults.jsonl and go on with --resume"
        )

    # --- publications ---------------------------------------------------------------------------------------------------

    def load(self, snapshot: WeightSnapshot, canary: Canary, *, in_flight: bool) -> dict[int, LoadReport]:
        """Load a snapshot on every sampler, newcomers included; one that is lost meanwhile is left out.

        Nobody begins to generate until `admit`. What is being generated is waited for unless `in_flight`.

        Raises:
            RunInterrupted: none is left.
        """
        with self._changed:
            self._loading = True
            self._changed.wait_for(lambda: (in_flight or not self._generating) and not self._welcoming)
            self._transferring = True
            # Kept for newcomers: as many bytes in the object store as the policy has.
            self._latest = (snapshot, canary) if self._section.max_restarts else None
        try:
            while True:
                calls = {number: self.call(number, "load_weights", snapshot, canary) for number in self._recipients()}
                reports: dict[int, LoadReport] = {}
                for number, call in calls.items():
                    with suppress(SamplerLost):
                        reports[number] = call.result()
                if reports:
                    return reports
        except BaseException:
            self.give_up()
            raise

    def admit(self, version: int, samplers: Sequence[int]) -> None:
        """These samplers have proved that they hold `version`; the publication is over."""
        with self._changed:
            self._admitted = [number for number in samplers if number in self._live]
            self._loading = self._transferring = False
            self.version = version
            self._changed.notify_all()

    def give_up(self) -> None:
        """The publication failed: nobody may generate, and those who wait for it hear of it."""
        self.admit(self.version, ())

    def _recipients(self) -> list[int]:
        with self._changed:
            self._changed.wait_for(lambda: self._live or self._newcomers or not self._coming or self._closed.is_set())
            for number in tuple(self._newcomers):
                self._enlist(number)
            return list(self._live) or self._fail()

    def _enlist(self, number: int) -> None:
        """A newcomer is one of the samplers. Under the lock."""
        self._live[number] = self._starting.pop(number)
        self._newcomers.discard(number)
        self._calls[number] = set()
        self._health[number] = Health(self._section.timeout_seconds, time.monotonic())
        self._coming.discard(self._place[number])
        self._changed.notify_all()

    # --- losses ---------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look after the samplers from now on; to be called when all have started."""
        now = time.monotonic()
        self._health = {number: Health(self._section.timeout_seconds, now) for number in self._live}
        threading.Thread(target=self._look_after, name="samplers", daemon=True).start()

    def close(self) -> None:
        """Stop looking after them: whoever ends from now on is not missed."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    def workers(self) -> list[Any]:
        """Every one that was started and not given up, those that have not proved themselves included."""
        with self._changed:
            return [*self._live.values(), *self._starting.values()]

    def _look_after(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(PULSE_SECONDS):
            now = time.monotonic()
            healths = self._ask()
            stood_still = now - last - 2 * PULSE_SECONDS  # this process itself: stopped, or without a processor
            for health in healths.values() if stood_still > 0 else ():
                health.forgive(stood_still)
            last = now
            for number, health in healths.items():
                if why := health.fault(now):
                    self._lose(number, why)
            for number, why in slow_samplers(healths, self._section.slow_factor).items():
                if self._restarts[self._place[number]] < self._section.max_restarts:
                    self._lose(number, why)

    def _ask(self) -> dict[int, Health]:
        """Ask each sampler that is not being asked for its pulse. Returns what is known of them."""
        with self._changed:
            healths = {number: self._health[number] for number in self._live}
            asked = {number: self._live[number] for number, health in healths.items() if not health.asked}
        for number, worker in asked.items():
            healths[number].asked = True
            self._workers.call(worker, "pulse").add_done_callback(partial(self._hear, number, healths[number]))
        return healths

    def _hear(self, number: int, health: Health, answer: Future[Pulse]) -> None:
        error = answer.exception()
        if error is None:
            health.hear(answer.result(), time.monotonic())
        else:
            self._lose(number, str(error))

    def _answer(self, number: int, promise: Future[Any], answer: Future[Any]) -> None:
        error = answer.exception()
        if isinstance(error, SamplerLost):
            self._lose(number, str(error))
        with self._changed:  # whoever takes a promise out keeps it
            is_ours = promise in self._calls.get(number, ())
            if is_ours:
                self._calls[number].discard(promise)
        if is_ours and error is not None:
            promise.set_exception(error)
        elif is_ours:
            promise.set_result(answer.result())

    def _lose(self, number: int, why: str) -> None:
        """Give a sampler up, and start another one if that is allowed."""
        with self._changed:
            if self._closed.is_set() or number not in self._live:
                return
            worker, place = self._live.pop(number), self._place[number]
            self._admitted = [other for other in self._admitted if other != number]
            self._health.pop(number, None)
            broken = self._calls.pop(number)
            self._last_loss = f"sampler {number} was lost: {why}"
            replaced = self._may_restart(place)
            self._changed.notify_all()
        for promise in broken:
            promise.set_exception(SamplerLost(why))
        then = "another one is started" if replaced else f"no more: max_restarts={self._section.max_restarts}"
        self._report(
            "sampler_lost", f"sampler {number} was lost: {why}; {then}", sampler=number, serving=self._admitted
        )
        target = partial(self._replace, worker, place) if replaced else partial(self._workers.end, worker)
        threading.Thread(target=target, name=f"replaces-sampler-{number}", daemon=True).start()

    def _may_restart(self, place: int) -> bool:
        """Count a restart, unless all are used up. Under the lock."""
        if self._restarts[place] >= self._section.max_restarts:
            self._coming.discard(place)
            self._changed.notify_all()
            return False
        self._restarts[place] += 1
        self._coming.add(place)
        return True

    def _replace(self, worker: Any, place: int) -> None:
        """End a lost worker and start others, until one has proved itself or no more may be started."""
        start = time.monotonic()
        while True:
            self._workers.end(worker)
            with self._changed:  # so that whoever closes the fleet finds this worker, or none is started
                if self._closed.is_set():
                    return
                number = next(self._numbers)
                worker = self._starting[number] = self._workers.start(number, place, replaces=True)
            try:
                self._workers.call(worker, "ready").result(self._section.start_timeout_seconds)
                self._welcome(number, place, worker)
            except Exception as error:  # whatever keeps an engine from starting
                with self._changed:
                    self._newcomers.discard(number)
                    self._starting.pop(number, None)
                    if self._closed.is_set():  # it was ended with the fleet
                        return
                    again = self._may_restart(place)
                    self._last_loss = f"sampler {number} did not start: {type(error).__name__}: {error}"
                self._report("sampler_not_started", self._last_loss, sampler=number)
                if not again:
                    self._workers.end(worker)
                    return
                continue
            seconds = time.monotonic() - start
            proved = f", with the proved weights of version {self.version}" if self._latest else ""
            text = f"sampler {number} serves after {seconds:.1f} s{proved}"
            self._report("sampler_joined", text, sampler=number, seconds=seconds, version=self.version)
            return

    def _welcome(self, number: int, place: int, worker: Any) -> None:
        """Let a newcomer serve: with the next publication if one is under way, else with the weights of the last one.

        Raises:
            ParityError: it does not hold what it was sent.
        """
        with self._changed:
            self._place[number] = place
            self._newcomers.add(number)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: number not in self._newcomers or not self._transferring or self._closed.is_set()
            )
            if number not in self._newcomers:  # a publication took it along, and judges it as the others
                self._changed.wait_for(lambda: not self._transferring or self._closed.is_set())
                return
            latest = self._latest
            if latest is None:  # nothing was published: what it loaded is what all have
                self._enlist(number)
                self._admitted.append(number)
                return
            self._newcomers.remove(number)  # else a publication might come for it
            self._welcoming += 1
        valid = False
        try:
            snapshot, canary = latest
            call = self._workers.call(worker, "load_weights", snapshot, canary)
            report = call.result(self._section.start_timeout_seconds)
            assert self.prove is not None
            receipt = self.prove(number, snapshot, report)
            if not receipt.valid:
                raise ParityError(receipt.fault)
            valid = True
        finally:
            with self._changed:
                self._welcoming -= 1
                if valid:
                    self._enlist(number)
                    self._admitted.append(number)
                self._changed.notify_all()
