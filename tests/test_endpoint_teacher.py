"""An endpoint as teacher: what it may cost, how it may fail, and vLLM's own server behind a proxy that fails on purpose."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from openai_server import KEY, FaultyProxy, Scripted, body, vllm_server
from stage_commands import REWARD, Command

from posttrain.distill import main

RECIPE = """
stage: distill
teacher:
  endpoint: {model: m, base_url: "%s", api_key_env: TEACHER_KEY, max_concurrency: 4, prompt_price: 2.0, completion_price: 10}
datasets: [{task: letter_counting, levels: [1], size: 5}]
generation: {num_generations: 4, max_completion_length: 16, top_p: 0.9, top_k: 7, system_prompt: Verify.}
selection: {pick: all, deduplicate: false}
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


def write_recipe(directory: Path, url: str, text: str = RECIPE) -> Path:
    file = directory / "endpoint.yaml"
    file.write_text(text % url)
    return file


def generations(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "samples/generations.parquet").to_pylist()


def card(out: Path) -> dict[str, Any]:
    return json.loads((out / "data_card.json").read_text())


def test_requests_answers_and_what_they_cost(tmp_path: Path) -> None:
    def answer(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        reply = json.loads(body(f"It is {request['seed']}.", model="m-2026-01"))
        reply["choices"][0]["message"]["reasoning_content"] = "hm"
        return 200, {}, json.dumps(reply).encode()

    out = tmp_path / "run"
    with Scripted(answer) as server:
        assert main([str(write_recipe(tmp_path, server.url)), f"output_dir={out}"]) == 0
    rows = generations(out)
    assert len(server.requests) == len(rows) == 20
    assert set(server.keys) == {f"Bearer {KEY}"}
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Verify."} and sent["messages"][1]["role"] == "user"
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["top_k"]) == (16, 1.0, 0.9, 7)
    assert len({request["seed"] for request in server.requests}) == 20
    assert all(row["completion"] == f"<think>hm</think>It is {row['seed']}." for row in rows)
    assert {(row["teacher"], row["teacher_version"], row["finish_reason"]) for row in rows} == {
        ("m", "m-2026-01", "stop")
    }
    usage = card(out)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (140, 60)
    assert usage["cost"] == pytest.approx((140 * 2 + 60 * 10) / 1e6)
    assert not [file for file in out.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    # The seed of a sample is the same in every run.
    with Scripted(answer) as server:
        again = tmp_path / "again"
        assert (
            main([str(write_recipe(tmp_path, server.url)), f"output_dir={again}", "teacher.endpoint.max_concurrency=1"])
            == 0
        )
    assert generations(again) == rows


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with Scripted(lambda request, number: (200, {}, body(f"{request['seed']}"))) as server:
        words = [str(write_recipe(tmp_path, server.url)), f"output_dir={out}"]
        # An answer costs 44e-6; requests are begun while less than 9 answers' worth is spent, four at a time.
        assert main([*words, "teacher.endpoint.max_cost=390.0e-6"]) == 3
        assert "max_cost=0.00039" in capsys.readouterr().err
        paid = len(server.requests)
        assert 9 <= paid <= 9 + 3
        assert len((out / "journal/generations.jsonl").read_text().splitlines()) == paid + 1
        assert main([*words, "--resume", "teacher.endpoint.max_cost=1"]) == 0
        assert len(server.requests) == 20
    assert card(out)["usage"]["cost"] == pytest.approx(20 * 44e-6)


def test_answers_that_never_come_are_counted_or_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[str] = []

    def answer(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        text = request["messages"][1]["content"]
        if not refused:
            refused.append(text)
        if text == refused[0]:
            return 400, {}, json.dumps({"error": {"message": f"too long, says {KEY}"}}).encode()
        return 200, {}, body(f"{request['seed']}")

    out = tmp_path / "run"
    with Scripted(answer) as server:
        words = [str(write_recipe(tmp_path, server.url)), f"output_dir={out}"]
        assert main(words) == 3
        message = capsys.readouterr().err
        assert "of 20 samples got no answer" in message and "status 400: too long, says ***" in message
        assert main([*words, "--resume", "teacher.endpoint.max_failed_fraction=0.2"]) == 0
        samples = card(out)["samples"]
        assert (samples["requested"], samples["generated"], samples["without_answer"]) == (20, 16, 4)
        assert all("too long" in reason for reason in samples["failures"].values())
        answered = [request["seed"] for request in server.requests if request["messages"][1]["content"] != refused[0]]
        assert len(answered) == len(set(answered)) == 16  # none of the others was asked for twice
        refused[0] = ""  # what was refused once is asked for again
        assert main([*words, "--resume"]) == 0
        assert card(out)["samples"]["generated"] == 20


def test_requests_come_no_faster_than_asked(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        times.append(time.monotonic())
        return 200, {}, body("x")

    with Scripted(answer) as server:
        words = [str(write_recipe(tmp_path, server.url)), f"output_dir={tmp_path}/run", "datasets.0.size=3"]
        assert main([*words, "teacher.endpoint.requests_per_minute=600", "teacher.endpoint.send_seed=false"]) == 0
    assert "seed" not in server.requests[0]
    assert len(times) == 12 and max(times) - min(times) >= 11 * 0.1 - 0.05


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_with_what_is_missing(tmp_path: Path, number: signal.Signals) -> None:
    def answer(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.2)
        return 200, {}, body(f"{request['seed']}")

    out, journal = tmp_path / "run", tmp_path / "run/journal/generations.jsonl"
    with Scripted(answer) as server:
        recipe = write_recipe(tmp_path, server.url)
        command = Command("posttrain.distill", str(recipe), f"output_dir={out}")
        while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
            assert command.process.poll() is None, command.process.communicate()[0]
            time.sleep(0.01)
        command.process.send_signal(number)
        code, output = command.finish()
        kept, asked = journal.read_bytes().count(b"\n") - 1, len(server.requests)
        assert 5 <= kept <= asked < 20
        if number == signal.SIGINT:
            assert code == 130 and kept == asked, output  # what was under way came home
            assert not json.loads((out / "summary.json").read_text())["finished"]
        assert main([str(recipe), f"output_dir={out}", "--resume"]) == 0
        seeds = Counter(request["seed"] for request in server.requests)
    assert len(seeds) == 20
    assert len(server.requests) == 20 + asked - kept <= 24  # only what was under way is asked for again
    assert {row["completion"] for row in generations(out)} == {str(seed) for seed in seeds}


# --- vLLM's own server ------------------------------------------------------------------------------------------------

SERVED = """
stage: distill
teacher:
  endpoint: {model: teacher, base_url: "%s", api_key_env: TEACHER_KEY, max_concurrency: 6, timeout_seconds: 3}
datasets: [{task: letter_counting, levels: [1], size: 20}]
generation: {num_generations: 4, max_completion_length: 16}
rewards: [{func: "REWARD:score", name: accuracy}]
rejection: {correctness: {accuracy: 0.6}, truncated: false}
selection: {pick: best, per_prompt: 2}
"""
FAULTS = {5: 429, 9: 500, 14: "hang", 16: 503, 30: 429, 31: 429, 41: 500, 52: "hang"}


@pytest.mark.slow
def test_no_answer_is_lost_or_paid_twice_when_the_server_fails(policy_path: Path, tmp_path: Path) -> None:
    """429, 500, no answer, and a server that is away for a while; the same dataset as from one that never fails."""
    (tmp_path / "reward.py").write_text(REWARD)
    text = SERVED.replace("REWARD", str(tmp_path / "reward.py"))
    with vllm_server(policy_path, "teacher") as url:
        with FaultyProxy(url, FAULTS.get) as proxy:
            recipe = write_recipe(tmp_path, proxy.url, text)
            command = Command("posttrain.distill", str(recipe), f"output_dir={tmp_path}/failing")
            away = threading.Thread(target=go_away, args=(proxy,), daemon=True)
            away.start()
            code, output = command.finish()
            assert code == 0, output
            away.join()
        code, output = Command(
            "posttrain.distill", str(write_recipe(tmp_path, url, text)), f"output_dir={tmp_path}/calm"
        ).finish()
        assert code == 0, output
    assert set(proxy.injected) == {"429", "500", "503", "hang"} and proxy.injected.total() == len(FAULTS)
    assert len(proxy.delivered) == 80 and set(proxy.delivered.values()) == {1}
    rows = generations(tmp_path / "failing")
    assert {row["seed"] for row in rows} == {seed for _, seed in proxy.delivered}
    usage = card(tmp_path / "failing")["usage"]
    assert usage["completion_tokens"] == sum(row["completion_tokens"] for row in rows) > 0
    assert usage["retries_of_this_run"] >= len(FAULTS)
    assert rows == generations(tmp_path / "calm")
    assert pq.read_table(tmp_path / "failing/dataset.parquet") == pq.read_table(tmp_path / "calm/dataset.parquet")
    assert KEY not in output and not [
        file for file in (tmp_path / "failing").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()
    ]


def go_away(proxy: FaultyProxy) -> None:
    """Once a third is delivered, be away for a while."""
    while proxy.delivered.total() < 27:
        time.sleep(0.01)
    proxy.close()
    time.sleep(2.0)
    proxy.open()
