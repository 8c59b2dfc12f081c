"""Samplers that die, hang, crawl and come back, with scripted ones. The clock is real: limits are tenths of a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import fleet as fleet_module
from posttrain.dispatch import SamplerLost
from posttrain.errors import ParityError, RunInterrupted
from posttrain.fault_log import FaultLog
from posttrain.fleet import Fleet
from posttrain.health import Health, Pulse, slow_samplers
from posttrain.recipe import SamplerSection


@dataclass
class Worker:
    number: int
    replaces: bool
    loaded: list[int] = field(default_factory=list)  # versions
    dead: str = ""
    stopped: bool = False  # answers nothing
    stuck: bool = False  # answers, and its engine stands still
    ended: bool = False
    steps: int = 0
    open: list[Future[Any]] = field(default_factory=list)


class Workers:
    """`collect` runs until somebody finishes it; `load_weights` takes the version."""

    def __init__(self) -> None:
        self.all: list[Worker] = []
        self.start_error: Exception | None = None
        self.start_slowly = False

    def start(self, number: int, place: int, *, replaces: bool) -> Worker:
        self.all.append(Worker(number, replaces))
        return self.all[-1]

    def call(self, worker: Worker, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        if worker.dead:
            answer.set_exception(SamplerLost(worker.dead))
        elif worker.stopped:
            worker.open.append(answer)
        elif method == "pulse":
            worker.steps += not worker.stuck
            answer.set_result(Pulse(bool(worker.open), worker.steps, worker.steps, 8 * worker.steps))
        elif method == "ready" and self.start_error:
            answer.set_exception(self.start_error)
        elif method == "ready" and self.start_slowly:
            worker.open.append(answer)
        elif method == "load_weights":
            worker.loaded.append(arguments[0].version)
            answer.set_result(f"{worker.number} holds {arguments[0].version}")
        elif method == "collect":
            worker.open.append(answer)
        else:
            answer.set_result(None)
        return answer

    def end(self, worker: Worker) -> None:
        worker.ended = True

    def kill(self, number: int) -> None:
        worker = self.all[number]
        worker.dead = "SIGKILL"
        for answer in worker.open:
            answer.set_exception(SamplerLost(worker.dead))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "PULSE_SECONDS", 0.05)


@pytest.fixture
def made() -> Iterator[Any]:
    fleets: list[Fleet] = []

    def make(**keys: Any) -> tuple[Fleet, Workers]:
        workers = Workers()
        section = SamplerSection(**{"num_workers": 2, "timeout_seconds": 0.5, "slow_factor": 0, **keys})
        fleet = Fleet(workers, section, FaultLog())
        fleet.prove = lambda number, snapshot, report: SimpleNamespace(  # type: ignore[assignment,return-value]
            valid=report == f"{number} holds {snapshot.version}", fault="another digest"
        )
        fleets.append(fleet)
        fleet.watch()
        return fleet, workers

    yield make
    for fleet in fleets:
        fleet.close()


def publish(fleet: Fleet, version: int, *, in_flight: bool = False) -> list[int]:
    reports = fleet.load(SimpleNamespace(version=version), (), in_flight=in_flight)  # type: ignore[arg-type]
    fleet.admit(version, list(reports))
    return sorted(reports)


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_run_goes_on_with_the_other_and_the_newcomer_proves_itself(made: Any) -> None:
    fleet, workers = made()
    publish(fleet, 7)
    call = fleet.call(0, "collect")
    workers.kill(0)
    with pytest.raises(SamplerLost, match="SIGKILL"):
        call.result(1)
    assert fleet.is_lost(0) and 1 in fleet.serving()
    wait_for(lambda: fleet.serving() == [1, 2])
    assert workers.all[2].loaded == [7] and workers.all[2].replaces and workers.all[0].ended
    assert fleet.restarts == 1 and publish(fleet, 8) == [1, 2]


def test_a_newcomer_that_holds_something_else_gets_no_prompts(made: Any, capfd: pytest.CaptureFixture[str]) -> None:
    fleet, workers = made(max_restarts=2)
    publish(fleet, 1)
    fleet.prove = lambda *_: SimpleNamespace(valid=False, fault="another digest")
    workers.kill(0)
    wait_for(lambda: len(workers.all) == 4 and workers.all[3].ended)
    assert fleet.serving() == [1] and [worker.number for worker in workers.all] == [0, 1, 2, 3]
    assert "sampler 3 did not start: ParityError: another digest" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_an_engine_that_hangs_is_given_up(made: Any, how: str) -> None:
    fleet, workers = made()
    publish(fleet, 1)
    call = fleet.call(1, "collect")
    setattr(workers.all[1], how, True)
    with pytest.raises(SamplerLost, match="has not answered" if how == "stopped" else "has made no step"):
        call.result(3)
    wait_for(lambda: fleet.serving() == [0, 2])
    assert workers.all[1].ended


def test_an_idle_engine_is_not_hung_and_a_working_one_neither(made: Any) -> None:
    fleet, workers = made()
    publish(fleet, 1)
    workers.all[0].stuck = True  # without work
    fleet.call(1, "collect")
    time.sleep(1.2)
    assert fleet.serving() == [0, 1]


def test_with_a_single_sampler_the_loop_waits_for_the_next(made: Any) -> None:
    fleet, workers = made(num_workers=1)
    publish(fleet, 3)
    workers.kill(0)
    wait_for(lambda: fleet.is_lost(0))
    with fleet.generating():
        assert fleet.serving() == [1]
    assert workers.all[1].loaded == [3]


def test_when_no_sampler_is_left_the_run_ends_and_says_why(made: Any) -> None:
    fleet, workers = made(num_workers=1, max_restarts=1)
    publish(fleet, 1)
    workers.kill(0)
    wait_for(lambda: len(workers.all) == 2 and not fleet.is_lost(1))
    workers.kill(1)
    wait_for(lambda: fleet.is_lost(1))
    for attempt in (fleet.serving, lambda: fleet.generating().__enter__(), lambda: publish(fleet, 2)):
        with pytest.raises(RunInterrupted, match="sampler 1 was lost: SIGKILL.*max_restarts=1.*--resume"):
            attempt()


def test_an_engine_that_does_not_start_is_tried_again(made: Any) -> None:
    fleet, workers = made(max_restarts=3)
    publish(fleet, 1)
    workers.start_error = RuntimeError("no device")
    workers.kill(0)
    wait_for(lambda: len(workers.all) >= 4)
    assert fleet.restarts <= 3 and fleet.serving() == [1]
    wait_for(lambda: all(worker.ended for worker in workers.all if worker.number != 1))


def test_whoever_ends_the_fleet_hears_of_one_that_is_starting_and_none_is_started_after_that(made: Any) -> None:
    fleet, workers = made(max_restarts=3)
    publish(fleet, 1)
    workers.start_slowly = True
    workers.kill(0)
    wait_for(lambda: len(workers.all) == 3)
    fleet.close()
    assert {worker.number for worker in fleet.workers()} == {1, 2}
    workers.kill(2)
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "replaces-sampler-0"])
    assert len(workers.all) == 3 and [worker.number for worker in fleet.workers()] == [1]


def test_a_publication_takes_newcomers_along_and_waits_for_one_if_it_must(made: Any) -> None:
    fleet, workers = made(num_workers=1)
    publish(fleet, 1)
    workers.kill(0)
    assert publish(fleet, 2) == [1]
    assert workers.all[1].loaded[-1] == 2 and fleet.version == 2 and fleet.serving() == [1]


def test_a_sampler_lost_in_a_publication_is_left_out(made: Any) -> None:
    fleet, workers = made()
    publish(fleet, 1)
    workers.all[0].stopped = True
    assert publish(fleet, 2) == [1]
    wait_for(lambda: fleet.serving() == [1, 2])
    assert workers.all[2].loaded == [2]


def test_no_deadlock_when_the_last_sampler_is_lost_under_a_publication_that_waits(made: Any) -> None:
    fleet, workers = made(num_workers=1)
    publish(fleet, 1)
    published: list[list[int]] = []
    with fleet.generating():
        thread = threading.Thread(target=lambda: published.append(publish(fleet, 2)))
        thread.start()
        workers.kill(0)
        wait_for(lambda: fleet.is_lost(0))
        assert fleet.serving() == [1] and not published  # what is being generated is finished by the old version
    thread.join(5)
    assert published == [[1]] and workers.all[1].loaded == [1, 2]


def test_a_publication_that_fails_leaves_nobody_waiting(made: Any) -> None:
    fleet, _ = made()
    fleet.load(SimpleNamespace(version=1), (), in_flight=False)
    threading.Timer(0.1, fleet.give_up).start()
    with pytest.raises(ParityError, match="none may generate"), fleet.generating():
        pass


def pulses(health: Health, steps_per_second: float, tokens_per_second: float, seconds: float = 10.0) -> None:
    for second in range(int(seconds) + 1):
        steps = int(second * steps_per_second)
        health.hear(Pulse(True, steps, steps, int(second * tokens_per_second)), float(second))


@pytest.mark.parametrize(
    ("steps", "tokens", "slow"),
    [(1.0, 8.0, True), (1.0, 400.0, False), (50.0, 8.0, False), (20.0, 160.0, False)],
)  # fmt: skip
def test_slow_is_who_makes_fewer_steps_and_fewer_tokens(steps: float, tokens: float, slow: bool) -> None:
    healths = {number: Health(60, 0.0) for number in range(3)}
    pulses(healths[0], 30.0, 240.0)
    pulses(healths[1], 30.0, 240.0, seconds=2)  # finished long ago
    pulses(healths[2], steps, tokens)
    found = slow_samplers(healths, 10)
    assert bool(found) == slow and (not slow or "makes 1.0 steps/s where others make 30.0" in found[2])
    assert slow_samplers(healths, 0) == {} == slow_samplers({2: healths[2]}, 10)


def test_time_in_which_nobody_listened_does_not_count() -> None:
    health = Health(60, 0.0)
    health.hear(Pulse(True, 1, 1, 1), 1.0)
    assert health.fault(62.0) and health.fault(60.0) == ""
    health.forgive(100.0)
    assert health.fault(150.0) == ""
