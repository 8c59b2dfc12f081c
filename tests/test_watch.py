"""The live view: who may see it, what it gives away, and that a page follows a run that goes on."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stage_commands
from browser import Visit, chromium, needs_browser
from made_runs import make_run, metrics_of
from stage_commands import GRPO, REWARD, Command, wait_for_step

from posttrain import watch, watch_view
from posttrain.metrics import LogReader, MetricsLog
from posttrain.run_dir import RunDir
from posttrain.watch_server import WatchServer

TOKEN = "a-token-for-the-tests"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[WatchServer]:
    """A run with secrets beside it, and links to them in it."""
    tmp_path = place
    run = make_run(tmp_path / "runs/made", steps=2)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "runs/made-too").mkdir()
    (tmp_path / "runs/made-too/secret.txt").write_text("secret")
    (run / "out").symlink_to(tmp_path / "secret.txt")
    (run / "outside").symlink_to(tmp_path)
    (run / "inside").symlink_to("recipe.yaml")
    (run / "circle").symlink_to("circle")
    os.mkfifo(run / "pipe")
    with WatchServer(run, TOKEN) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def ask(
    server: WatchServer,
    path: str,
    *,
    token: str | None = TOKEN,
    method: str = "GET",
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes, Any]:
    """A request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    known = {"Authorization": f"Bearer {token}"} if token is not None else {}
    connection.request(method, path, headers={**known, **(headers or {})})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


def test_without_the_token_nothing_is_said(server: WatchServer) -> None:
    for path in ("/", "/news?seen=[]", "/files", "/files/recipe.yaml", "/nowhere", "/?token=", "/?token=wrong"):
        for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
            headers = {"Authorization": f"Bearer {token}".encode()} if token == "é" else None
            status, body, _ = ask(server, path, token=None if token == "é" else token, headers=headers)  # type: ignore[arg-type]
            assert status == 403 and b"stage" not in body and TOKEN.encode() not in body, (path, token)
    for cookie in (
        f"posttrain_watch_{server.port}=wrong",
        f"other={TOKEN}",
        'a="',
        "=;=",
        f"posttrain_watch_1={TOKEN}",
    ):
        assert ask(server, "/", token=None, headers={"Cookie": cookie})[0] == 403


def test_the_token_is_compared_in_constant_time(server: WatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert server.knows(TOKEN) and not server.knows("x") and not server.knows(None)
    assert compared == [(TOKEN.encode(), TOKEN.encode()), (b"x", TOKEN.encode()), (b"", TOKEN.encode())]


def test_the_token_leaves_the_address(server: WatchServer) -> None:
    status, _, headers = ask(server, f"/?token={TOKEN}", token=None)
    assert status == 303 and headers["Location"] == "/"
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    status, body, headers = ask(server, "/", token=None, headers={"Cookie": cookie.partition(";")[0]})
    assert status == 200 and b'data-live="yes"' in body and TOKEN.encode() not in body
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"


def test_only_its_own_name_and_only_reading(server: WatchServer) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1:1", ""):
        assert ask(server, "/files", headers={"Host": host})[0] == 403, host
    assert ask(server, "/files", headers={"Host": f"localhost:{server.port}"})[0] == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
        assert ask(server, "/files/recipe.yaml", method=method)[0] == 405
    assert ask(server, "/", method="TRACE")[0] == 501


TRAVERSALS = (
    "../secret.txt",
    "../../secret.txt",
    "samples/../../../secret.txt",
    "..%2fsecret.txt",
    "%2e%2e/%2e%2e/secret.txt",
    "%2e%2e%2f%2e%2e%2fsecret.txt",
    "%252e%252e%252f%252e%252e%252fsecret.txt",
    "..%5c..%5csecret.txt",
    "..\\..\\secret.txt",
    "%c0%ae%c0%ae/secret.txt",
    "....//....//secret.txt",
    "/etc/passwd",
    "//etc/passwd",
    "%2fetc%2fpasswd",
    "/../../../../../../../../etc/passwd",
    "../made-too/secret.txt",
    "%2e%2e/made-too/secret.txt",
    "out",
    "outside/secret.txt",
    "outside/runs/made-too/secret.txt",
    "circle",
    "pipe",
    "samples",
    "",
    ".",
    "..",
    "recipe.yaml/",
    "recipe.yaml%00.txt",
    "recipe.yaml%00",
    "~root/.bashrc",
    "file:///etc/passwd",
    "%ff%fe",
    "a" * 5000,
)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_way_out_of_the_run_directory(server: WatchServer, path: str, place: Path) -> None:
    for full in (
        f"/files/{path}",
        f"/{path}",
        f"/files/{place}/secret.txt",
        f"/files/{urllib.parse.quote(str(place), safe='')}%2fsecret.txt",
    ):
        if full == "/":
            continue  # the page
        status, body, _ = ask(server, full) if "\\" not in full else ask(server, full.replace("\\", "%5c"))
        allowed = full in ("/files/recipe.yaml/",)  # a path that says the same
        assert (status == 404 or allowed) and b"secret\n" not in body and b"root:" not in body, (full, status)
        assert body != b"secret"


def test_files_of_the_run_can_be_read(server: WatchServer) -> None:
    listed = json.loads(ask(server, "/files")[1])["files"]
    assert {"recipe.yaml", "metrics.jsonl", "samples/step-000001.parquet", "inside"} <= set(listed)
    assert not {"out", "pipe", "circle"} & set(listed) and not any("secret" in name for name in listed)
    for name in listed:
        status, body, headers = ask(server, f"/files/{urllib.parse.quote(name)}")
        assert (status, body) == (200, (server.run_dir / name).read_bytes())
        assert headers["Content-Disposition"] == "attachment" and headers["Content-Type"] == "application/octet-stream"


def test_news_are_what_a_page_lacks(server: WatchServer) -> None:
    def news(seen: object) -> Any:
        status, body, _ = ask(server, f"/news?seen={urllib.parse.quote(json.dumps(seen))}")
        assert status == 200
        return json.loads(body)

    nothing = news([[2, 2, 2, 0]])
    assert not nothing["reset"] and nothing["runs"][0]["blocks"] == [] and nothing["runs"][0]["metrics"] == {}
    (run,) = news([[1, 1, 1, 0]])["runs"]
    assert run["metrics"]["step"] == [2] and run["router"]["steps"] == [2]
    assert [block["rows"]["sources"] for block in run["blocks"]] == [["step-000002"]]
    assert news([[9, 2, 2, 0]])["reset"] and news([])["reset"] and news([[2, 2, 2, 1]])["reset"]
    for seen in ("x", "{}", "[[1]]", "[[1,1,1,true]]", '[["1",1,1,1]]', "[" * 5000):
        assert ask(server, f"/news?seen={urllib.parse.quote(seen)}")[0] == 400, seen


def test_other_machines_only_if_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    for host in ("0.0.0.0", "192.168.0.7", "::", "example.org"):
        assert watch.main([str(run), "--host", host]) == 2
        assert "--public" in capsys.readouterr().err
        watch.require_private(host, public=True)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        watch.require_private(host, public=False)
    assert watch.main([str(tmp_path)]) == 2 and "no run directory" in capsys.readouterr().err


def test_the_other_loopback_address(tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    try:
        server = WatchServer(make_run(tmp_path / "run", steps=1), TOKEN, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with server:
        assert server.address == f"http://[::1]:{server.port}/?token={TOKEN}"
        assert server.is_named(f"[::1]:{server.port}") and not server.is_named("::1")


def test_tokens_are_long_and_new() -> None:
    assert len(watch.token_of(None)) >= 32 and watch.token_of(None) != watch.token_of(None)
    assert watch.token_of("abcdefgh-12345678") == "abcdefgh-12345678"
    for short in ("", "short", "with blanks in it and long", "ü" * 20):
        with pytest.raises(ValueError, match="POSTTRAIN_WATCH_TOKEN"):
            watch.token_of(short)


def test_terminal_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "[red]run", steps=6)
    assert watch.main([str(run), "--terminal", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "[red]run (grpo)" in shown and "step 6 of 6" in shown and "finished" in shown
    assert "reward" in shown and "█" in shown and "last step: learn" in shown
    assert watch_view.bars([0, 1, 2, 3], 4) == "▁▃▆█" and watch_view.bars([5.0] * 8, 4) == "▁▁▁▁"
    assert watch_view.bars([0, 0, 7, 7], 2) == "▁█"
    assert watch_view.is_finished(run, LogReader())
    (run / "summary.json").unlink()
    assert not watch_view.is_finished(run, LogReader())


@needs_browser
def test_a_page_follows_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", steps=2)
    (run / "summary.json").unlink()
    with chromium(tmp_path / "profile") as context, WatchServer(run, TOKEN) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visit = Visit(context.new_page())
        visit.open(server.address)
        assert TOKEN not in visit.page.url and "12 of 12" in visit.page.locator("#found").inner_text()
        visit.page.get_by_role("link", name="recipe.yaml").wait_for()
        later = make_run(tmp_path / "later", steps=3)
        log = MetricsLog(run, resume_step=2)
        log.log(3, metrics_of(3, random.Random(1)))
        (later / "samples/step-000003.parquet").rename(run / "samples/step-000003.parquet")
        visit.page.evaluate("Report.live.ask()")
        visit.page.locator("#found").get_by_text("18 of 18").wait_for()
        assert visit.page.evaluate("Report.data.runs[0].metrics.step") == [1, 2, 3]
        assert visit.page.evaluate("Report.curves.panels[0].plot.data[0].length") == 3
        assert visit.page.locator("#live").inner_text() == "live: step 3"
        assert min(visit.painted().values()) > 100
        RunDir(run).write_rows("eval-after", [{"prompt_id": "p", "completion": "x", "score": 1.0}])
        with visit.page.expect_navigation():
            visit.page.evaluate("Report.live.ask()")
        visit.page.locator("#found").get_by_text("19 of 19").wait_for()
        assert {urllib.parse.urlsplit(address).netloc for address in visit.requests} == {f"127.0.0.1:{server.port}"}
        assert visit.complaints == []
        visit.page.context.clear_cookies()
        visit.page.evaluate("Report.live.ask()")
        visit.page.locator("#live").get_by_text("token").wait_for()
        server.shutdown()


@needs_browser
@pytest.mark.slow
def test_a_real_run_while_it_trains_and_afterwards(tmp_path: Path, policy_path: Path) -> None:
    reward, recipe, out = tmp_path / "reward.py", tmp_path / "recipe.yaml", tmp_path / "run"
    reward.write_text(REWARD)
    recipe.write_text(GRPO % (policy_path, reward))
    stage = Command("posttrain.grpo", str(recipe), f"output_dir={out}")
    wait_for_step(out, stage.process)
    with chromium(tmp_path / "profile") as context, WatchServer(out, TOKEN) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        live = Visit(context.new_page())
        live.open(server.address)
        code, output = stage.finish()
        assert code == 0, output
        live.page.locator("#live").get_by_text("run finished").wait_for(timeout=20_000)
        painted = live.painted()
        assert {"reward", "entropy (nats)", "KL of the policy (nats)", "router: MaxVio", "seconds per phase"} <= set(
            painted
        )
        assert min(painted.values()) > 50 and live.complaints == []
        still = Visit(context.new_page())
        still.open((out / "report.html").as_uri())
        assert still.painted().keys() == painted.keys() and min(still.painted().values()) > 50
        assert "48 of 48" in still.page.locator("#found").inner_text()
        still.page.locator("#only-tokens").check()
        still.page.select_option("#token-kind", "gap")
        tokens = still.page.locator("#sample .token:not(.special)").all_text_contents()
        assert "".join(tokens) == still.page.evaluate("Report.completion(Report.sample.shown)")
        assert still.page.evaluate("Report.data.runs[0].router.steps") == [1, 2, 3]
        still.picture("real-run")
        assert set(still.requests) == {(out / "report.html").as_uri()} and still.complaints == []
        server.shutdown()
    assert len(stage_commands.metrics(out)) == 3
