"""A run as discrete events: engines that decode, a learner that trains, versions that are published, machines that fail.

The order of things is that of posttrain/rollout.py and posttrain/cluster/: the rollout of step s is begun when version
s - max_lag is published; without in-flight updates a publication waits until what is being generated is finished, and nothing
is begun meanwhile. What an engine does not finish because it fails is sampled again from the start. When the learner fails,
all begins again from the last checkpoint.

Not played: groups without signal, oversampling, evaluations, contention on the network.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from posttrain.planning.lengths import Lengths

_REPORTS = 16  # an engine's completions are looked at after each sixteenth of its batch
_DAY = 86400.0
_Process = Generator[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated.

    Attributes:
        engines: of the samplers.
        slots: sequences that one decodes together.
        step_seconds: of a decoding step, by the sequences in it and their mean length so far.
        prefill_seconds: for an engine to read one prompt; what it decodes waits meanwhile.
        lengths: of completions.
        prompt_tokens: of a prompt.
        samples: completions of a step.
        reward_seconds: after the last completion of a step.
        learning_seconds: of a step.
        publication_seconds: of a version.
        max_lag, in_flight: of the recipe.
        steps: to simulate.
        save_steps: checkpoints.
        jitter: relative deviation of a learning step.
        straggler_share, straggler_factor: of the engines, in each rollout, so many decode so many times slower.
        engine_mtbf, learner_mtbf: mean seconds between failures of one engine, and of the learner as a whole; None: never.
        engine_restart, learner_restart: seconds from a failure to work.
        seed: of all chance.
    """

    engines: int
    slots: int
    step_seconds: Callable[[int, float], float]
    lengths: Lengths
    prompt_tokens: int
    samples: int
    learning_seconds: float
    publication_seconds: float
    reward_seconds: float = 0.0
    prefill_seconds: float = 0.0
    max_lag: int = 0
    in_flight: bool = False
    steps: int = 20
    save_steps: int = 10
    jitter: float = 0.03
    straggler_share: float = 0.0
    straggler_factor: float = 2.0
    engine_mtbf: float | None = None
    engine_restart: float = 300.0
    learner_mtbf: float | None = None
    learner_restart: float = 900.0
    seed: int = 0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        seconds: of the whole run.
        steps: trained, each counted once.
        tokens: of completions that were trained on.
        sampler_busy: engine seconds in which there was something to decode.
        learner_wait: seconds in which the learner waited for samples or for engines to come to an end.
        publishing: seconds of publications.
        lags: versions between the first token of a completion and the policy that trained on it -> completions.
        engine_failures, learner_failures: how many.
        lost_tokens: sampled and thrown away.
    """

    engines: int
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    sampler_busy: float = 0.0
    learner_wait: float = 0.0
    publishing: float = 0.0
    lags: Counter[int] = field(default_factory=Counter)
    engine_failures: int = 0
    learner_failures: int = 0
    lost_tokens: int = 0

    @property
    def step_seconds(self) -> float:
        return self.seconds / max(1, self.steps)

    @property
    def sampler_idle(self) -> float:
        """Share of the engines' time without anything to decode."""
        return 1 - self.sampler_busy / (self.engines * self.seconds)

    @property
    def learner_idle(self) -> float:
        """Share of the time in which the learner waits."""
        return self.learner_wait / self.seconds


def simulate(setting: Setting) -> Outcome:
    """Play a run to its end."""
    return _Run(setting).play()


@dataclass(order=True, slots=True)
class _Sequence:
    """A completion in an engine; it ends at a decoding step of that engine."""

    end: int
    length: int
    version: int = field(compare=False)


class _Run:
    """The processes of one simulation and what they share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.env = simpy.Environment()
        self.random = random.Random(setting.seed)
        self.outcome = Outcome(setting.engines)
        self.backlog: deque[int] = deque()  # lengths of completions that are not begun
        self.done: list[_Sequence] = []  # of the rollout that is being made
        self.version = self.saved = 0
        self.trained: dict[int, int] = {}  # step -> tokens, so that a step that is done again counts once
        self.generating = self.loading = False
        self.slow: set[int] = set()
        self._changed = self.env.event()
        self.ready = simpy.Store(self.env)
        self.engines = [self.env.process(self._engine(index)) for index in range(setting.engines)]

    def play(self) -> Outcome:
        main = self.env.process(self._main())
        if self.setting.engine_mtbf:
            for engine in self.engines:
                self.env.process(self._engine_failures(engine, self.setting.engine_mtbf))
        self.env.run(until=main)
        self.outcome.seconds, self.outcome.steps = self.env.now, len(self.trained)
        self.outcome.tokens = sum(self.trained.values())
        return self.outcome

    def _notify(self) -> None:
        """Wake whoever waits for something to have changed."""
        changed, self._changed = self._changed, self.env.event()
        changed.succeed()

    def _until(self, condition: Callable[[], bool]) -> _Process:
        while not condition():
            yield self._changed

    # --- the run ------------------------------------------------------------------------------------------------------

    def _main(self) -> _Process:
        """Rollouts and learner, begun again from the last checkpoint when the learner fails."""
        while True:
            learner = self.env.process(self._learner())
            rollouts = self.env.process(self._rollouts())
            mean = self.setting.learner_mtbf
            failure = self.env.timeout(self.random.expovariate(1 / mean)) if mean else self.env.event()
            yield learner | failure
            if learner.triggered:
                return
            self.outcome.learner_failures += 1
            for process in (learner, rollouts):
                if process.is_alive:
                    process.interrupt()
            self._forget()
            yield self.env.timeout(self.setting.learner_restart)

    def _forget(self) -> None:
        """Back to the last checkpoint: what is being sampled and what waits to be trained on is thrown away."""
        self.version, self.generating, self.loading = self.saved, False, False
        self.outcome.lost_tokens += sum(sequence.length for sequence in self.done)
        self.outcome.lost_tokens += sum(sum(s.length for s in batch) for batch in self.ready.items)
        self.backlog.clear()
        self.done, self.ready = [], simpy.Store(self.env)
        for engine in self.engines:
            engine.interrupt("reset")

    def _rollouts(self) -> _Process:
        """As `rollout.stream`: one at a time, as far ahead as the lag allows."""
        setting = self.setting
        try:
            for step in range(self.version, setting.steps):
                yield from self._until(lambda step=step: self.version >= step - setting.max_lag)  # type: ignore[misc]
                yield from self._until(lambda: not self.loading)
                self.generating, self.done = True, []
                chosen = range(setting.engines)
                self.slow = {index for index in chosen if self.random.random() < setting.straggler_share}
                self.backlog.extend(setting.lengths.draw(self.random) for _ in range(setting.samples))
                self._notify()
                yield from self._until(lambda: len(self.done) >= setting.samples)
                self.generating, batch = False, self.done
                self._notify()
                yield self.env.timeout(setting.reward_seconds)
                yield self.ready.put(batch)
        except simpy.Interrupt:
            return

    def _learner(self) -> _Process:
        """Trains on each batch, publishes, saves."""
        setting = self.setting
        try:
            while self.version < setting.steps:
                since = self.env.now
                batch = yield self.ready.get()
                self.outcome.learner_wait += self.env.now - since
                noise = max(0.1, self.random.gauss(1.0, setting.jitter))
                yield self.env.timeout(setting.learning_seconds * noise)
                yield from self._publish()
                self._count(batch)
        except simpy.Interrupt:
            return

    def _publish(self) -> _Process:
        since = self.env.now
        if not self.setting.in_flight:
            self.loading = True
            yield from self._until(lambda: not self.generating)
            self.outcome.learner_wait += self.env.now - since
        yield self.env.timeout(self.setting.publication_seconds)
        self.outcome.publishing += self.setting.publication_seconds
        self.version += 1
        self.loading = False
        self._notify()

    def _count(self, batch: list[_Sequence]) -> None:
        """A step is done: its lags, and its checkpoint."""
        trained_by = self.version - 1
        self.outcome.lags.update(trained_by - sequence.version for sequence in batch)
        self.trained[trained_by] = sum(sequence.length for sequence in batch)
        if self.version % self.setting.save_steps == 0 or self.version == 1:
            self.saved = self.version

    # --- engines ------------------------------------------------------------------------------------------------------

    def _engine(self, index: int) -> _Process:
        """Decodes what it has; takes more whenever some are finished."""
        setting = self.setting
        running: list[_Sequence] = []
        step, tokens = 0, 0.0  # decoding steps so far; tokens in the cache
        batch = steps = 0  # of the present stretch
        since = seconds = 0.0
        while True:
            try:
                before = len(running)
                while self.backlog and len(running) < setting.slots:
                    length = self.backlog.popleft()
                    heapq.heappush(running, _Sequence(step + length, length, self.version))
                    tokens += setting.prompt_tokens
                batch = steps = 0
                if not running:
                    yield self._changed
                    continue
                batch = len(running)
                end = heapq.nsmallest(max(1, batch // _REPORTS), running)[-1].end
                since, steps = self.env.now, end - step
                seconds = steps * setting.step_seconds(batch, tokens / batch + steps / 2)
                seconds += (batch - before) * setting.prefill_seconds
                seconds *= setting.straggler_factor if index in self.slow else 1.0
                try:
                    yield self.env.timeout(seconds)
                finally:
                    self.outcome.sampler_busy += self.env.now - since
                step, tokens = end, tokens + steps * batch
                while running and running[0].end <= step:
                    sequence = heapq.heappop(running)
                    # Those that ended before the look had their place to the end of it.
                    tokens -= setting.prompt_tokens + sequence.length + step - sequence.end
                    self.done.append(sequence)
                self._notify()
            except simpy.Interrupt as interrupt:
                begun = steps * (self.env.now - since) / seconds if steps else 0.0  # of this stretch
                self.outcome.lost_tokens += round(sum(step - s.end + s.length for s in running) + batch * begun)
                if interrupt.cause == "failure":
                    self.outcome.engine_failures += 1
                    self.backlog.extendleft(sequence.length for sequence in running)
                    self._notify()
                running, tokens = [], 0.0
                if interrupt.cause == "failure":
                    yield from self._restart()

    def _restart(self) -> _Process:
        """An engine comes up again, whatever happens meanwhile."""
        until = self.env.now + self.setting.engine_restart
        while self.env.now < until:
            try:
                yield self.env.timeout(until - self.env.now)
            except simpy.Interrupt:
                continue

    def _engine_failures(self, engine: simpy.Process, mean: float) -> _Process:
        while True:
            yield self.env.timeout(self.random.expovariate(1 / mean))
            engine.interrupt("failure")
