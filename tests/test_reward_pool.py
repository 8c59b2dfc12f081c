"""Rewards in real Ray actors: order, several workers, outages, and actors that are lost."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stage_commands import is_marked

from posttrain.cluster import session
from posttrain.errors import RunStopped
from posttrain.recipe import RewardSection
from posttrain.reward_pool import RewardPool, Scored
from posttrain.types import Completion, Prompt

REWARDS = """
import time
from rewards import Unavailable, batched

def length(completion, answer, **metadata):
    return len(completion)

def slow(completion, answer, **metadata):
    time.sleep(0.2)
    return len(completion)

def flaky(completion, answer, **metadata):
    if "?" in completion:
        raise Unavailable("no service")
    return 1.0

@batched
def together(completions, answers, metadata):
    return [float(text == record["messages"][0]["content"]) for text, record in zip(completions, metadata)]
"""


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_TEST_MARK", uuid.uuid4().hex)  # processes of this Ray, and no other's
        with session(None, 1):
            yield


@pytest.fixture
def rewards(tmp_path: Path, ray_session: None) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


def completion(text: str) -> Completion:
    return Completion(tuple(range(len(text))), (-1.0,) * len(text), "stop", text, policy_version=0)


def score(pool: RewardPool, groups: list[list[str]]) -> Scored:
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": group[0]},), (1,)) for n, group in enumerate(groups)]
    return pool.score(prompts, [[completion(text) for text in group] for group in groups])


def section(rewards: Path, name: str, **options: object) -> RewardSection:
    return RewardSection.model_validate({"func": f"{rewards}:{name}", "name": name, **options})


def test_several_rewards_and_workers_keep_the_order(rewards: Path) -> None:
    groups = [["a" * (place + number) for number in range(1, 4)] for place in range(7)]
    pool = RewardPool(
        [section(rewards, "length", num_workers=3), section(rewards, "together", weight=100.0, batch_size=4)]
    )
    try:
        scored = score(pool, groups)
        assert [group.components["length"] for group in scored.groups] == [tuple(map(len, group)) for group in groups]
        assert [group.components["together"] for group in scored.groups] == [(1.0, 0.0, 0.0)] * 7
        assert scored.groups[0].rewards == (101.0, 2.0, 3.0)
        values = {name: metric.value for name, metric in scored.metrics.items()}
        assert values["reward/length/mean"] == pytest.approx(5.0)
        assert values["reward/unjudged"] == values["reward/length/crash"] == 0
    finally:
        pool.stop()


def test_what_cannot_be_judged_is_left_out_and_too_much_of_it_stops(rewards: Path) -> None:
    pool = RewardPool([section(rewards, "flaky", retries=1), section(rewards, "length")])
    try:
        scored = score(pool, [["x", "?", "yy", "z"]])
        (group,) = scored.groups
        assert group.unjudged == {1} and group.judged_rewards == (2.0, 3.0, 2.0)
        assert group.statuses["flaky"] == ("ok", "infrastructure", "ok", "ok")
        assert scored.metrics["reward/flaky/infrastructure"].value == scored.metrics["reward/unjudged"].value == 1
        assert scored.metrics["reward/flaky/mean"].value == 1.0
        assert scored.complaints == ("reward 'flaky': infrastructure, Unavailable: no service",)
        with pytest.raises(RunStopped, match="'flaky' failed on 3 of 4 completions.*no service.*max_failed_fraction"):
            score(pool, [["?", "?", "?", "z"]])
    finally:
        pool.stop()


def test_an_actor_that_is_killed_is_started_again_and_its_part_is_done(rewards: Path) -> None:
    """With one retry, which must not be spent on an actor that is only being started."""
    pool = RewardPool([section(rewards, "slow", retries=1)])
    try:
        score(pool, [["a"]])
        mine = [process for process in psutil.process_iter() if is_marked(process, os.environ["POSTTRAIN_TEST_MARK"])]
        actors = [process for process in mine if "_RewardActor" in " ".join(process.cmdline()[:1])]
        assert actors

        def kill() -> None:
            time.sleep(0.5)
            for process in actors:
                os.kill(process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        scored = score(pool, [["a", "bb", "ccc", "dddd"] * 2])
        killer.join()
        assert scored.groups[0].components["slow"] == (1, 2, 3, 4) * 2
        assert scored.metrics["reward/slow/restarts"].value >= 1
        assert scored.groups[0].unjudged == frozenset()
    finally:
        pool.stop()
    left = [p for p in psutil.process_iter(["cmdline"]) if "rewards.zygote" in " ".join(p.info["cmdline"] or ())]
    deadline = time.monotonic() + 10
    while any(p.is_running() for p in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(p.is_running() for p in left)
