"""The report in headless Chromium: drawn, searched, walked through by keyboard, and deaf to what model text tells it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, Visit, chromium, needs_browser
from made_runs import RECIPE, TEXTS, make_run
from markup_attacks import ATTACKS

from eval.report import write_comparison, write_report
from posttrain.metrics import Metric, MetricsLog
from posttrain.run_dir import RunDir

pytestmark = needs_browser


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def visit(context: Any) -> Iterator[Visit]:
    page = context.new_page()
    yield Visit(page)
    page.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "made")
    write_report(path)
    return path


def test_every_curve_is_drawn_and_nothing_is_asked_of_the_network(visit: Visit, run: Path) -> None:
    address = (run / "report.html").as_uri()
    for theme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=theme)
        visit.open(address)
        painted = visit.painted()
        assert {"reward", "entropy (nats)", "sampler/learner gap (nats, logarithmic)", "lag (versions)"} <= set(painted)
        assert {"completion length (tokens)", "KL of the policy (nats)", "router: MaxVio", "seconds per phase"} <= set(
            painted
        )
        assert min(painted.values()) > 100, painted
        visit.picture(f"report-{theme}")
    colors = visit.page.evaluate(
        """() => { const c = document.querySelector("#router-map canvas"); const d = c.getContext("2d")
        .getImageData(0, 0, c.width, c.height).data; return [c.width, c.height, new Set(Array.from({length: d.length / 4},
        (_, i) => d.slice(4 * i, 4 * i + 3).join())).size] }"""
    )
    assert colors == [4, 2, 3]  # 16, 10 and 4 of 40 tokens are three colours; the even layer has the middle one
    assert set(visit.requests) == {address} and visit.complaints == []


def test_smoothing_axis_and_one_more_metric(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    assert visit.page.evaluate("Report.curves.smooth([1, null, 3], 0.5)") == [1, None, pytest.approx(7 / 3)]
    visit.page.locator("#smoothing").fill("0.9")
    visit.page.select_option("#x-axis", "seconds")
    visit.page.select_option("#more-metrics", "custom/number")
    painted = visit.painted()
    assert painted["custom/number"] > 100 and min(painted.values()) > 100
    visit.page.locator("#panels .legend button", has_text="format").first.click()
    visit.page.locator("#smoothing").fill("0.8")
    shown = visit.page.evaluate("Report.curves.panels[0].plot.series.slice(1).map((line) => line.show)")
    assert shown == [True, True, True, True, False, False]  # also after drawing anew, and its faint line with it
    reward = visit.page.evaluate("Report.curves.panels[0].plot.data.length")
    assert reward == 7 and visit.complaints == []  # x, and a faint and a smooth line for each of three rewards


def test_filters_and_search(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    page, found = visit.page, visit.page.locator("#found")
    assert "36 of 36 completions" in found.inner_text()
    page.fill("#reward-from", "1")
    found.get_by_text("12 of 36 completions, mean reward 1.1").wait_for()
    page.fill("#step-from", "3")
    page.fill("#step-to", "4")
    found.get_by_text("4 of 36").wait_for()
    page.select_option("#filter-task", "b/1")
    found.get_by_text("2 of 36").wait_for()
    page.get_by_role("button", name="all", exact=True).click()
    found.get_by_text("36 of 36").wait_for()
    page.fill("#search", "A0</THINK>")
    found.get_by_text("12 of 36").wait_for()
    assert "a0" in page.locator("#list .row").first.inner_text()
    page.fill("#search", "nowhere")
    found.get_by_text("0 of 36").wait_for()
    assert page.locator("#list .row").count() == 0 and visit.complaints == []


def test_one_sample_with_tokens_rewards_and_a_comparison(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    page, sample = visit.page, visit.page.locator("#sample")
    assert not sample.locator("details.reasoning").evaluate("part => part.open")
    assert sample.locator("summary").inner_text() == "reasoning, 19 characters"
    rows = sample.locator("table tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["accuracy", "1", "1", "1", "ok"],
        ["format", "1", "0.1", "0.1", "ok"],
        ["together", "", "", "1.1", ""],
    ]
    page.select_option("#token-kind", "logprob")
    tokens = sample.locator(".token")
    assert "".join(tokens.all_text_contents()) == TEXTS[0]
    shades = tokens.evaluate_all("all => all.map((token) => Number(token.style.backgroundColor.match(/[\\d.]+/g)[3]))")
    assert shades == sorted(shades) and shades[0] < shades[-1]  # each token is less likely than the one before
    for kind in ("advantage", "gap", "reference"):
        page.select_option("#token-kind", kind)
    assert "no reference" in sample.locator("p[role=status]").inner_text()
    page.locator(".completion").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in sample.locator("p[role=status]").inner_text()
    page.select_option("#compare", "1")
    difference = sample.locator(".difference")
    assert "".join(difference.locator("del").all_inner_texts()) and difference.locator("ins").count()
    visit.picture("sample")
    assert visit.complaints == []


def test_the_difference_of_two_texts(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    steps = "([a, b]) => Report.diff.steps(Report.diff.words(a), Report.diff.words(b))"
    # Myers' own example takes five edits.
    assert sum(kind != " " for kind, _ in visit.page.evaluate("Report.diff.steps([...'ABCABBA'], [...'CBABAC'])")) == 5
    pairs = [
        ("", ""),
        ("a b", ""),
        ("", "a b"),
        ("one two three", "one 2 three four"),
        ("é\n\nx=1", "x = 1\n"),
        ("a a a b", "b a a"),
    ]
    for left, right in pairs:
        found = visit.page.evaluate(steps, [left, right])
        assert "".join(item for kind, item in found if kind != "+") == left
        assert "".join(item for kind, item in found if kind != "-") == right


def test_by_keyboard_alone(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    page = visit.page
    focus = "document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("/")
    assert page.evaluate(focus) == "search"
    page.keyboard.type("a0")
    page.locator("#found").get_by_text("12 of 36").wait_for()
    for _ in range(30):
        if page.evaluate(focus) == "list":
            break
        page.keyboard.press("Tab")
    assert page.evaluate(focus) == "list"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert page.locator("#list").get_attribute("aria-activedescendant") == "row-11"
    page.locator("#row-11[aria-selected=true]").wait_for()
    page.keyboard.press("Enter")
    assert page.evaluate(focus) == "sample"
    page.keyboard.press("k")
    page.locator("#row-10[aria-selected=true]").wait_for()
    page.keyboard.press("u")
    assert page.locator("#sample details.reasoning").evaluate("part => part.open")
    page.keyboard.press("c")
    page.wait_for_function("document.getElementById('token-kind').value === 'logprob'")
    # Whatever can be pressed or changed can be reached.
    unreachable = page.evaluate(
        "[...document.querySelectorAll('button, input, select, a[href]')].filter((node) => node.tabIndex < 0).length"
    )
    assert unreachable == 0 and visit.complaints == []


def test_two_runs_side_by_side(visit: Visit, run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=3, texts=("<answer>other</answer>",))
    path = write_comparison([run, other], tmp_path / "comparison.html")
    visit.open(path.as_uri())
    page = visit.page
    assert page.locator("#runs button").all_inner_texts() == ["made", "other"]
    assert page.evaluate("Report.curves.panels[0].plot.series.length") == 7
    page.select_option("#filter-run", "1")
    page.locator("#found").get_by_text("6 of 42").wait_for()
    page.select_option("#compare", "0")
    assert "other" in page.locator("#sample .difference ins").first.inner_text()
    page.locator("#runs button").nth(1).click()
    assert page.evaluate("Report.curves.panels[0].plot.series.length") == 4
    visit.picture("comparison")
    assert visit.complaints == []


def test_model_text_runs_nothing(visit: Visit, tmp_path: Path) -> None:
    assert len(ATTACKS) >= 50
    run = make_run(tmp_path / "<img src=x onerror=hit()>", steps=1, texts=ATTACKS, ids=(ATTACKS[0], ATTACKS[1]))
    (run / "recipe.yaml").write_text(RECIPE + f"# {ATTACKS[0]}\n")
    (run / "environment.json").write_text(json.dumps({"platform": ATTACKS[1], "packages": {ATTACKS[2]: ATTACKS[3]}}))
    (run / "alarms.jsonl").write_text(json.dumps({"step": 1, "alarm": ATTACKS[4]}) + "\n")
    log = MetricsLog(run)
    for step in (1, 2):
        log.log(step, {f"reward/{ATTACKS[5]}/mean": Metric(step, "mean"), ATTACKS[6]: Metric(step, "mean")})
    address = write_report(run).as_uri()
    visit.page.add_init_script("window.hits = 0; window.hit = window.alert = () => { window.hits += 1; }")
    visit.open(address)
    shown = visit.page.evaluate(
        """async () => {
          const shown = [];
          for (let place = 0; place < Report.list.found.length; place++) {
            await Report.list.choose(place, {});
            for (const [kind] of Report.tokenView.KINDS) await Report.sample.paint(kind);
            const menu = document.getElementById("compare");
            menu.value = "0";
            menu.dispatchEvent(new Event("change"));
            shown.push([...document.querySelectorAll("#sample .completion > span, #sample .reasoning")].length);
          }
          await new Promise((done) => setTimeout(done, 300));
          return shown;
        }"""
    )
    assert len(shown) == 2 * len(ATTACKS)
    markup = visit.page.evaluate(
        "document.querySelectorAll('main img, main iframe, main svg, main object, main script, main form form').length"
    )
    assert markup == 0 and visit.page.evaluate("window.hits") == 0
    assert visit.page.evaluate("Report.completion(Report.list.found[0])") == ATTACKS[0]
    assert visit.page.title() == run.name
    assert set(visit.requests) == {address} and visit.complaints == []
    # The same texts taken for markup, to see that hits and requests would have been noticed.
    visit.page.route("**/*", lambda route: route.abort())
    visit.page.goto("about:blank")
    markup = [text for text in ATTACKS if "refresh" not in text and "<base" not in text]
    visit.page.evaluate(
        "(texts) => { for (const text of texts) document.body.insertAdjacentHTML('beforeend', text); }", markup
    )
    visit.page.wait_for_function("window.hits > 5")
    assert any("attacker.invalid" in address for address in visit.requests)


def large_row(step: int, number: int, chance: random.Random, words: list[str]) -> dict[str, Any]:
    """A completion of some 400 characters that compress as language does."""
    return {
        "prompt_id": f"p/{step}/{number // 10}",
        "kind": f"task/{number % 7}",
        "prompt": f"question {step} {number // 10}?",
        "completion": "<think>" + " ".join(chance.choices(words, k=60)) + f"</think>{number}",
        "answer": str(number),
        "reward": number % 11 / 10,
        "reward/accuracy": float(number % 2),
        "advantage": number / 250 - 1,
        "policy_version": step,
        "finish_reason": "stop",
        "length": 60,
    }


@pytest.mark.slow
def test_fifty_thousand_samples_open_in_two_seconds(visit: Visit, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "large")
    run.write_recipe(RECIPE)
    log = MetricsLog(run.path)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(3000)]
    for step in range(1, 101):
        log.log(step, {f"reward/{name}": Metric(step / 50, "mean") for name in ("mean", "accuracy/mean")})
        run.write_rows(f"step-{step:06d}", [large_row(step, number, chance, words) for number in range(500)])
    start = time.perf_counter()
    path = write_report(run.path)
    written = time.perf_counter() - start
    opened = []
    for _ in range(3):  # what else the machine does slows it down: the best of three counts
        visit.open(path.as_uri())
        opened.append(visit.page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000)
    start = time.perf_counter()
    visit.page.fill("#search", "</think>499")
    visit.page.locator("#found").get_by_text("100 of 50,000").wait_for()
    searched = time.perf_counter() - start
    size = path.stat().st_size / 1e6
    seconds = f"written in {written:.1f} s, opened in {min(opened):.2f} s, searched in {searched:.2f} s"
    print(f"\n50,000 samples, {size:.1f} MB: {seconds}")
    assert visit.page.locator("#list .row").count() < 40  # rows exist only while they can be seen
    assert min(opened) < 4 and visit.complaints == []  # two seconds on a machine that does nothing else


def test_pictures_are_kept(visit: Visit, run: Path) -> None:
    visit.open((run / "report.html").as_uri())
    visit.picture("report-light")
    assert (SCREENSHOTS / "report-light.png").stat().st_size > 20_000
