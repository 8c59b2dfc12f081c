"""Environments in processes of their own: what one does reaches neither the others nor the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.environment_pool import EnvironmentPool, Failure
from posttrain.environments import EnvironmentLimits, EnvironmentSpec, checked_step
from posttrain.types import Prompt, Step
from rewards.processes import descendants, is_zombie

WILD = """
import os, subprocess, sys, time
from posttrain.types import Step

class Wild:
    def __init__(self, start=0):
        self.total = start

    def reset(self, prompt):
        self.total += int(prompt.answer)
        if self.total == 13:
            raise RuntimeError("unlucky")

    def step(self, text):
        if text == "hang":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
            time.sleep(300)
        if text == "die":
            os._exit(3)
        if text == "exit":
            sys.exit("bye")
        if text == "down":
            raise ConnectionError("no service")
        if text == "hoard":
            self.hoard = bytearray(3 * 2**30)
        if text == "nothing":
            return None
        self.total += int(text)
        return Step([{"role": "user", "content": str(self.total)}], reward=0.5, done=self.total > 99)
"""


@pytest.fixture
def wild(tmp_path: Path) -> str:
    (tmp_path / "wild.py").write_text(WILD)
    return f"{tmp_path}/wild.py:Wild"


@pytest.fixture
def pool(wild: str) -> Iterator[EnvironmentPool]:
    pool = EnvironmentPool(EnvironmentSpec(wild, {"start": 1}), EnvironmentLimits(2.0, max_memory_gib=1.0))
    yield pool
    pool.close()


def prompts(*answers: int) -> list[Prompt]:
    return [Prompt(f"p{number}", ({"role": "user", "content": "?"},), (1,), str(number)) for number in answers]


def said(answer: Any) -> str:
    assert isinstance(answer, Step), answer
    return str(answer.messages[0]["content"])


def test_every_episode_has_a_state_of_its_own(pool: EnvironmentPool) -> None:
    with pool.session(prompts(10, 20, 10)) as session:
        assert session.resets == [Step(), Step(), Step()]
        assert [said(answer) for answer in session.step([0, 1, 2], ["1", "2", "3"])] == ["12", "23", "14"]
        assert [said(answer) for answer in session.step([2, 0], ["1", "1"])] == ["15", "13"]
        (last,) = session.step([1], ["80"])
        assert isinstance(last, Step) and (last.reward, last.done) == (0.5, True)


def test_failures_stay_where_they_are_and_leave_nothing_behind(pool: EnvironmentPool) -> None:
    words = ["hang", "die", "exit", "down", "hoard", "nothing", "x", "5"]
    with pool.session(prompts(12, *range(len(words)))) as session:
        unlucky, *others = session.resets
        assert isinstance(unlucky, Failure) and unlucky == Failure("crash", "RuntimeError: unlucky")
        assert others == [Step()] * len(words)
        start = time.monotonic()
        answers = session.step(range(1, len(words) + 1), words)
        assert time.monotonic() - start < 10
        found = [answer.status if isinstance(answer, Failure) else "ok" for answer in answers]
        assert found == ["timeout", "crash", "crash", "infrastructure", "crash", "crash", "crash", "ok"]
        assert said(answers[-1]) == str(1 + 7 + 5)
        assert said(session.step([len(words)], ["1"])[0]) == "14"
        assert pool._zygote is not None
        running = [pid for pid in descendants(pool._zygote.pid) if not is_zombie(pid)]
        assert len(running) == 1  # the one episode that did not fail
    with pool.session(prompts(1)) as session:  # the pool is as good as new
        assert said(session.step([0], ["1"])[0]) == "3"
    zygote = pool._zygote.pid
    pool.close()
    assert descendants(zygote) == []


def test_hanging_environments_wait_at_the_same_time(wild: str) -> None:
    pool = EnvironmentPool(EnvironmentSpec(wild), EnvironmentLimits(1.0, max_concurrency=8))
    with pool.session(prompts(*range(8))) as session:
        start = time.monotonic()
        answers = session.step(range(8), ["hang"] * 8)
        assert time.monotonic() - start < 6  # not 8 times the limit
        assert {answer.status for answer in answers if isinstance(answer, Failure)} == {"timeout"}
    pool.close()


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        ("class E:\n    def reset(self, prompt): ...", {}, r"has no method step\(self, text\)"),
        ("class E:\n    def reset(self): ...\n    def step(self, text): ...", {}, r"must take \(self, prompt\)"),
        ("class E:\n    def reset(self, p): ...\n    async def step(self, text): ...", {}, "step is async"),
        ("class E:\n    def reset(self, p): ...\n    def step(self, t): ...", {"size": 3}, "'size'"),
        ("def E(): ...", {}, "is a function, not a class"),
        ("class F: ...", {}, "has no 'E'"),
    ],
)
def test_what_is_no_environment_is_refused(tmp_path: Path, source: str, kwargs: dict[str, Any], message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        EnvironmentSpec(f"{tmp_path}/mine.py:E", kwargs)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("higher", "must return posttrain.types.Step"),
        (Step([{"role": "user", "content": "x"}], float("nan")), "finite"),
        (Step("higher"), "list of messages"),
        (Step([{"role": "user"}]), "write {'role'"),
        (Step([{"role": "assistant", "content": "x"}]), "which is the policy"),
        (Step(), "nothing to answer"),
    ],
)
def test_what_is_no_step_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_step(value)
