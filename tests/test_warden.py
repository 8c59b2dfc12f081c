"""Rewards in a process of their own: whatever they do, every completion gets a result and nothing is left behind."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from stage_commands import is_marked

from posttrain.recipe import RewardSection
from posttrain.reward_setup import build_limits
from rewards import Item, RewardError, RewardFunction
from rewards.warden import EVENTS, Limits, Report, Warden

NASTY = '''
import asyncio, os, subprocess, sys, time
from rewards import Unavailable, batched, grouped
from posttrain.types import RewardResult

hoard = []

def act(text):
    """Do what a completion says; anything else scores its length."""
    if text == "hang":
        while True:
            time.sleep(60)
    if text == "spin":
        while True:
            pass
    if text == "raise":
        raise KeyError("no such thing")
    if text == "exit":
        os._exit(3)
    if text == "sys.exit":
        sys.exit(0)
    if text == "segfault":
        import ctypes
        ctypes.string_at(0)
    if text == "kill group":
        os.killpg(os.getpgid(0), 9)
    if text == "big":
        hoard.append(bytearray(2 * 2**30))
    if text == "leak":
        hoard.append(bytearray(os.urandom(1) * (20 * 2**20)))
    if text == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    if text == "daemon":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(300)
            os._exit(0)
    if text == "bomb":
        while True:
            if os.fork() == 0:
                time.sleep(300)
    if text == "close":
        os.closerange(3, 256)
    if text == "print":
        print("this goes nowhere near the results")
    if text == "nan":
        return float("nan")
    if text == "outage":
        raise Unavailable("the service is down")
    if text == "once":
        marker = os.environ["NASTY_MARKER"]
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise ConnectionError("not yet")
    return len(text) / 100

def single(completion, answer, **metadata):
    return act(completion)

async def asynchronous(completion, answer, **metadata):
    if completion == "sleep":
        await asyncio.sleep(60)
    await asyncio.sleep(0.05)
    return act(completion)

@batched
def batch(completions, answers, metadata):
    return [act(text) for text in completions]

@grouped
def group(completions, answer, **metadata):
    ranks = sorted(map(act, completions))
    return [ranks.index(act(text)) for text in completions]
'''


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    path = tmp_path / "nasty.py"
    path.write_text(NASTY)
    return path


def items(texts: Sequence[str]) -> list[list[Item]]:
    return [[Item(text, None, {})] for text in texts]


def judge(nasty: Path, texts: Sequence[str], function: str = "single", warm: bool = True, **limits: Any) -> Report:
    with Warden(RewardFunction("nasty", f"{nasty}:{function}"), Limits(**{"timeout_seconds": 0.5, **limits})) as warden:
        warden.score(items(["warm"]) if warm else [])  # the very first call has more time
        return warden.score(items(texts))


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("POSTTRAIN_TEST_MARK", mark)
    before = children()
    yield
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before
    assert [p.pid for p in psutil.process_iter() if is_marked(p, mark) and p.pid not in before] == []


def statuses(report: Report) -> list[str]:
    return [result.status for result in report.results]


@pytest.mark.parametrize("function", ["single", "asynchronous", "batch"])
def test_scores_come_in_the_order_of_the_completions(nasty: Path, function: str) -> None:
    texts = ["a" * (number % 37) for number in range(200)]
    report = judge(nasty, texts, function, batch_size=30, max_concurrency=16)
    assert [result.score for result in report.results] == [len(text) / 100 for text in texts]
    assert not any(report.counts.values())


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [
        ("hang", "timeout", "no answer within 0.5 s"),
        ("spin", "timeout", "no answer"),
        ("raise", "crash", "KeyError"),
        ("exit", "crash", "its process ended"),
        ("sys.exit", "crash", "0"),
        ("segfault", "crash", "its process ended"),
        ("kill group", "crash", "its process ended"),
        ("close", "crash", "its process ended"),
        ("nan", "crash", "must return a finite number"),
        ("big", "crash", "out of memory"),
        ("bomb", "crash", "processes"),
        ("outage", "infrastructure", "the service is down"),
    ],
)
@pytest.mark.parametrize("function", ["single", "batch"])
def test_the_guilty_one_is_found_and_the_others_keep_their_scores(
    nasty: Path, function: str, text: str, status: str, detail: str
) -> None:
    if function == "batch" and text in ("sys.exit", "outage"):
        pytest.skip("an outage is the whole batch's; see the next test")
    texts = ["fine"] * 5 + [text] + ["fine"] * 5
    limits: dict[str, Any] = {"max_memory_gib": 1.0, "on_timeout": -0.25, "on_crash": -0.5, "retries": 1}
    if text == "bomb":
        limits |= {"max_processes": 4, "timeout_seconds": 5.0}
    report = judge(nasty, texts, function, **limits)
    found = report.results[5]
    assert (found.status, detail in found.detail) == (status, True), found
    assert found.score == {"timeout": -0.25, "crash": -0.5, "infrastructure": 0.0}[status]
    assert [(r.score, r.status) for r in report.results[:5] + report.results[6:]] == [(0.04, "ok")] * 10
    assert report.counts[status] == 1
    assert "nasty" in report.complaint


def test_a_batch_that_cannot_reach_its_service_is_not_judged(nasty: Path) -> None:
    report = judge(nasty, ["fine", "outage", "fine"], "batch", retries=1)
    assert statuses(report) == ["infrastructure"] * 3
    assert report.counts["infrastructure"] == 3
    assert report.counts["retried"] == 1


def test_what_fails_once_is_tried_again(nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASTY_MARKER", str(tmp_path / "marker"))
    report = judge(nasty, ["fine", "once", "fine"])
    assert statuses(report) == ["ok"] * 3
    assert report.counts["retried"] == 1
    assert report.counts["infrastructure"] == 0


def test_async_calls_run_side_by_side_and_each_has_its_own_limit(nasty: Path) -> None:
    start = time.monotonic()
    report = judge(nasty, ["fine"] * 60 + ["sleep"] + ["fine"] * 39, "asynchronous", max_concurrency=100)
    assert time.monotonic() - start < 4  # one after the other it would be five seconds and the limit
    assert [place for place, status in enumerate(statuses(report)) if status != "ok"] == [60]
    assert report.results[60].status == "timeout"


def test_an_async_reward_that_blocks_is_found(nasty: Path) -> None:
    report = judge(nasty, ["fine", "hang", "fine", "exit"], "asynchronous")
    assert statuses(report) == ["ok", "timeout", "ok", "crash"]


def test_a_group_is_judged_as_one(nasty: Path) -> None:
    groups = [[Item(text, "x", {}) for text in texts] for texts in (["ccc", "a", "bb"], ["b", "hang"], ["a", "bb"])]
    with Warden(RewardFunction("g", f"{nasty}:group"), Limits(timeout_seconds=0.5)) as warden:
        report = warden.score(groups)
    assert [result.score for result in report.results] == [2, 0, 1, 0, 0, 0, 1]
    assert statuses(report) == ["ok"] * 3 + ["timeout"] * 2 + ["ok"] * 2


def test_processes_left_behind_are_ended_and_counted(nasty: Path) -> None:
    report = judge(nasty, ["daemon"] * 3 + ["child"] * 3 + ["print"])
    assert statuses(report) == ["ok"] * 7
    assert report.counts["strays"] == 3  # the attached ones end with the worker


def test_a_worker_that_starts_too_many_or_grows_is_replaced(nasty: Path) -> None:
    grown = judge(nasty, ["leak"] * 200, max_memory_gib=1.0)
    assert set(statuses(grown)) == {"ok"}
    assert grown.counts["recycled"] + grown.counts["retried"] >= 2
    many = judge(nasty, ["child"] * 100, max_processes=20, timeout_seconds=5.0)
    assert set(statuses(many)) == {"ok"}
    assert many.counts["recycled"] >= 1


def test_a_warden_can_be_used_again_and_survives_the_loss_of_its_processes(nasty: Path) -> None:
    with Warden(RewardFunction("nasty", f"{nasty}:single"), Limits(timeout_seconds=0.5)) as warden:
        assert statuses(warden.score(items(["fine", "exit"]))) == ["ok", "crash"]
        for process in psutil.Process().children(recursive=True):
            process.kill()
        assert statuses(warden.score(items(["fine"] * 3))) == ["ok"] * 3


DIARY = """
import os, time
from rewards import grouped

def act(text):
    with open(os.environ["DIARY"], "a") as file:
        file.write(f"{text} {os.getpid()} {time.monotonic()}\\n")
    what, _, number = text.partition("-")
    if what == "hang":
        time.sleep(60)
    if what == "wait":
        time.sleep(0.8)
    if what == "compute":
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
    if what == "spin":
        while True:
            pass
    if what == "die":
        os._exit(1)
    return int(number) / 1000

def single(completion, answer, **metadata):
    return act(completion)

@grouped
def group(completions, answer, **metadata):
    return [act(text) for text in completions]
"""


class Diary:
    """What was judged by which process, and when."""

    def __init__(self, directory: Path) -> None:
        self.reward = directory / "diary.py"
        self.reward.write_text(DIARY)
        self.file = directory / "diary.txt"

    def judge(self, kinds: Sequence[str], function: str = "single", size: int = 1, **limits: Any) -> Report:
        texts = [f"{kind}-{number}" for number, kind in enumerate(kinds)]
        groups = [[Item(text, None, {}) for text in texts[at : at + size]] for at in range(0, len(texts), size)]
        with Warden(RewardFunction("diary", f"{self.reward}:{function}"), Limits(**limits)) as warden:
            warden.score(items(["fine-0"]))
            self.file.unlink()
            return warden.score(groups)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.file.read_text().splitlines()]

    def times(self, kind: str) -> list[float]:
        return [float(when) for text, _, when in self.lines() if text.startswith(kind)]

    def judged(self) -> Counter[str]:
        return Counter(text for text, _, _ in self.lines())


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Diary:
    monkeypatch.setenv("DIARY", str(tmp_path / "diary.txt"))
    return Diary(tmp_path)


@pytest.mark.parametrize(("function", "size"), [("single", 1), ("group", 3)])
def test_calls_that_hang_do_so_at_the_same_time(diary: Diary, function: str, size: int) -> None:
    kinds = ["hang" if number in (5, 8, 100, 160) else "fine" for number in range(180)]
    report = diary.judge(kinds, function, size, timeout_seconds=3.0)
    late = {place // size for place, kind in enumerate(kinds) if kind == "hang"}
    wrong = {place for place in range(180) if place // size in late}
    assert {place for place, status in enumerate(statuses(report)) if status == "timeout"} == wrong
    assert [r.score for r in report.results] == [0.0 if p in wrong else p / 1000 for p in range(180)]
    assert set(diary.judged().values()) == {1}
    assert len(diary.judged()) == 180 - (0 if size == 1 else 2)  # 101 and 161 are behind a hanging one in its group
    starts = diary.times("hang")
    assert max(starts) - min(starts) < 3.0
    assert report.counts == dict.fromkeys(EVENTS, 0) | {"timeout": len(wrong), "restarts": report.counts["restarts"]}


@pytest.mark.parametrize("max_workers", [1, 2])
def test_no_more_hang_at_the_same_time_than_may(diary: Diary, max_workers: int) -> None:
    report = diary.judge(["hang", "fine"] * 4, timeout_seconds=0.6, max_workers=max_workers)
    assert statuses(report) == ["timeout", "ok"] * 4
    starts = diary.times("hang")
    assert all(late - early > 0.55 for early, late in zip(starts, starts[max_workers:], strict=False))
    if max_workers == 1:
        assert [text for text, _, _ in diary.lines()] == [f"{kind}-{n}" for n, kind in enumerate(["hang", "fine"] * 4)]
        assert report.counts["restarts"] == 4


def test_a_late_answer_counts_and_holds_nobody_up(diary: Diary) -> None:
    report = diary.judge(["fine", "wait", *["fine"] * 100, "wait", "fine"], timeout_seconds=10.0)
    assert [result.score for result in report.results] == [place / 1000 for place in range(104)]
    assert not any(count for event, count in report.counts.items() if event != "restarts")
    assert set(diary.judged().values()) == {1}
    assert diary.times("fine-101")[0] - diary.times("wait-1")[0] < 0.8


def test_what_computes_for_long_stays_in_one_process(diary: Diary) -> None:
    report = diary.judge(["compute", "fine"] * 5, timeout_seconds=10.0)
    assert set(statuses(report)) == {"ok"}
    assert len({pid for _, pid, _ in diary.lines()}) == 1
    assert report.counts["restarts"] == 0


def test_what_computes_for_ever_holds_up_the_others_for_a_part_of_its_limit(diary: Diary) -> None:
    report = diary.judge(["spin", "fine", "spin", "fine"], timeout_seconds=3.0)
    assert statuses(report) == ["timeout", "ok"] * 2
    assert set(diary.judged().values()) == {1}
    first, second = diary.times("spin")
    assert 0.7 < second - first < 3.0


def test_a_death_beside_a_call_that_hangs_is_nobody_elses(diary: Diary) -> None:
    kinds = ["fine", "hang", *["fine"] * 70, "die", "fine", "die", *["fine"] * 9, "hang"]
    report = diary.judge(kinds, timeout_seconds=3.0)
    assert statuses(report) == [{"fine": "ok", "hang": "timeout", "die": "crash"}[kind] for kind in kinds]
    assert [r.score for r in report.results if r.status == "ok"] == [
        p / 1000 for p, k in enumerate(kinds) if k == "fine"
    ]
    judged = diary.judged()
    assert judged == {f"{kind}-{place}": 2 if kind == "die" else 1 for place, kind in enumerate(kinds)}
    assert report.counts["retried"] == 2
    assert max(diary.times("die")) - min(diary.times("hang")) < 3.0


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_wrong_number_of_workers_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match=f"max_workers must be a whole number of at least 1, got {number}"):
        Limits(max_workers=number)
    if number is not True:  # a recipe's numbers are YAML's
        with pytest.raises(ValueError, match="max_workers"):
            RewardSection(func="rewards.exact:score", max_workers=number)


def test_a_recipe_says_how_many_may_judge_at_the_same_time() -> None:
    def limits(**keys: Any) -> Limits:
        return build_limits(RewardSection(func="rewards.exact:score", **keys), "single")

    assert (limits().max_workers, limits(max_workers=7).max_workers) == (4, 7)
    assert (limits(num_gpus=1).max_workers, limits(num_gpus=1, max_workers=2).max_workers) == (1, 2)


LAZY = """
import os, sys

def score(completion, answer, **metadata):
    if completion == "die":
        os._exit(1)
    if completion == "raise":
        raise ValueError("too early")
    if "slow_to_import" not in sys.modules:
        with open(os.environ["IMPORTS"], "a") as file:
            file.write("x")
    import slow_to_import
    return slow_to_import.value
"""


def test_what_the_first_call_imports_its_successors_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow import inside the function would be too late for every new worker's first call."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.8)\nvalue = 0.5\n")
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IMPORTS", str(tmp_path / "imports"))
    report = judge(tmp_path / "lazy.py", ["fine", "die", "fine", "die", "fine"], "score", warm=False)
    assert statuses(report) == ["ok", "crash", "ok", "crash", "ok"]
    assert (tmp_path / "imports").read_text() == "x"


def test_a_first_call_that_fails_does_not_shorten_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.8)\nvalue = 0.5\n")
    (tmp_path / "lazy.py").write_text(LAZY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IMPORTS", str(tmp_path / "imports"))
    report = judge(tmp_path / "lazy.py", ["raise", "fine", "fine"], "score", warm=False)
    assert statuses(report) == ["crash", "ok", "ok"]


def test_a_reward_that_cannot_be_imported_says_so(tmp_path: Path) -> None:
    path = tmp_path / "later.py"
    path.write_text("def score(completion, answer, **metadata): return 1.0")
    function = RewardFunction("later", f"{path}:score")
    path.write_text("import nothing_of_this_name")
    with Warden(function) as warden, pytest.raises(RewardError, match="'later'.*nothing_of_this_name"):
        warden.score(items(["fine"]))
