"""What the report is made of: columns, samples within a budget, tokens, the policy that keeps text from being code."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from made_runs import TEXTS, group_of, make_run

from data.chat import build_tokenizer
from eval import report
from eval.report_page import PAGE, content_policy, decode, encode
from eval.report_run import columns, evaluations, evenly, funnel, router_columns, short, stage_directories
from eval.report_samples import Budget, read_samples
from posttrain.metrics import LogReader, Metric, MetricsLog
from posttrain.model.balance import RouterBalance
from posttrain.router_log import RouterLog
from posttrain.run_dir import RunDir
from posttrain.sections import RouterSection
from posttrain.token_records import token_records
from posttrain.types import Sample


def chunks(page: str) -> dict[str, str]:
    return dict(re.findall(r'data-chunk="([^"]+)">([^<]*)</script>', page))


def test_metrics_become_columns_with_gaps() -> None:
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": float("nan"), "b": 0.1234567}]
    assert columns(lines) == {"step": [1, 2], "a": [1, None], "b": [None, 0.123457]}
    assert [short(value) for value in (1e300, 2.0, 1 / 3, "x", None, True)] == [1e300, 2, 0.333333, "x", None, True]
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly([1, 2], 4) == [1, 2]


def test_loads_are_percents_of_an_even_share(tmp_path: Path) -> None:
    log = RouterLog(tmp_path)
    log.log(1, [[30, 10, 0, 0], [10, 10, 10, 10]])
    log.log(2, [[1, 1, 1, 0], [0, 0, 0, 0]])
    log.log(3, [])
    lines = [json.loads(line) for line in (tmp_path / "router.jsonl").read_text().splitlines()]
    assert [line["load"] for line in lines] == [
        [[300, 100, 0, 0], [100, 100, 100, 100]],
        [[133, 133, 133, 0], [0, 0, 0, 0]],
    ]
    assert router_columns(lines[:1]) == {
        "steps": [1], "layers": 2, "experts": 4, "load": [300, 100, 0, 0, 100, 100, 100, 100]
    }  # fmt: skip
    RouterLog(tmp_path, resume_step=1).log(2, [[1, 1, 1, 1]])
    assert [json.loads(line)["load"][0][0] for line in (tmp_path / "router.jsonl").read_text().splitlines()] == [
        300,
        100,
    ]
    RouterLog(tmp_path)
    assert not (tmp_path / "router.jsonl").read_text()
    assert router_columns([]) is None


def test_a_router_tells_its_loads_once() -> None:
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 2))

    balance = RouterBalance([Router()], RouterSection())
    for counts in ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]):
        balance.step_counts_LE.copy_(torch.tensor([counts]))
        balance.end_step()
    balance.metrics()  # which has counts of its own
    assert balance.take_loads() == [[2, 2, 3, 4]]
    assert balance.take_loads() == [[0, 0, 0, 0]]
    assert RouterBalance([], RouterSection()).take_loads() == []


def test_tokens_of_whole_groups_trained_ones_first() -> None:
    tokenizer = build_tokenizer()
    groups = [group_of(name, TEXTS, 1, tokenizer) for name in ("a/1", "b/1", "c/1")]
    first = groups[1].completions[0]
    trained = Sample((1, 2), first.token_ids, first.logprobs, (0.5,) * len(first.token_ids), place=(1, 0))
    trained = Sample(**{**{name: getattr(trained, name) for name in trained.__slots__}, "old_logprobs": first.logprobs})
    records = token_records(groups, [trained], tokenizer, limit=4, seed="0")
    assert sorted(records) == [(1, 0), (1, 1), (1, 2)]  # a second group would make six
    assert "".join(records[1, 0].texts) == TEXTS[0] and records[1, 0].ids == first.token_ids
    assert records[1, 0].learner_logprobs == first.logprobs and records[1, 0].advantages == (0.5,) * len(
        first.token_ids
    )
    assert records[1, 1].learner_logprobs is None and records[1, 1].advantages is None
    assert token_records(groups, [], tokenizer, limit=2, seed="0") == {}
    assert len(token_records(groups, [], tokenizer, limit="all", seed="0")) == 9


def test_token_columns_are_small_lists(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    table = pq.read_table(run / "samples/step-000001.parquet")
    assert str(table.schema.field("token_ids").type) == "list<element: int32>"
    assert str(table.schema.field("token_logprobs").type) == "list<element: float>"
    row = table.to_pylist()[0]
    assert row["kind"] == "a/1" and "".join(row["token_texts"]) == row["completion"]
    assert row["token_logprobs"][:2] == pytest.approx([-0.1, -0.2]) and row["token_advantages"] is None


def test_a_budget_takes_whole_groups_from_all_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10, ids=("a/1", "b/1", "c/1", "d/1"))
    everything = read_samples(run / "samples", Budget())
    assert everything.total == 120 and sum(block.rows["count"] for block in everything.blocks) == 120
    third = read_samples(run / "samples", Budget(samples=40))
    assert third.total == 120 and sum(block.rows["count"] for block in third.blocks) == 39  # 13 groups of 3
    (block,) = third.blocks
    assert len(block.rows["sources"]) == 10
    few = read_samples(run / "samples", Budget(tokens=100))
    kept = [len(tokens["ids"]) for block in few.blocks for tokens in block.tokens.values()]
    assert 50 < sum(kept) <= 100
    assert Budget(samples=10, characters=20, tokens=30).among(2) == Budget(5, 10, 15)


def test_pairs_are_two_completions_and_other_tables_none(tmp_path: Path) -> None:
    pair = {
        "pair_id": "p",
        "kind": "k",
        "prompt": "?",
        "chosen": "yes",
        "rejected": "no",
        "chosen_score": 1.5,
        "rejected_score": -1.0,
    }
    run_dir = RunDir(tmp_path)
    run_dir.write_rows("held-out", [pair, {**pair, "pair_id": "q"}])
    run_dir.write_rows("numbers", [{"x": 1}])
    (tmp_path / "samples/torn.parquet").write_bytes(b"PAR1")
    found = read_samples(tmp_path / "samples", Budget())
    (block,) = found.blocks
    assert found.total == block.rows["count"] == 4
    assert block.texts["completions"] == ["yes", "no"] * 2 and block.rows["columns"]["reward"] == [1.5, -1] * 2
    assert block.rows["columns"]["mode"] == ["chosen", "rejected"] * 2
    assert read_samples(tmp_path / "nowhere", Budget()).blocks == []


def test_tokens_are_whole_numbers(tmp_path: Path) -> None:
    (block,) = read_samples(make_run(tmp_path / "run", steps=1) / "samples", Budget()).blocks
    tokens = block.tokens["0"]
    assert tokens["logprob"][:2] == [-1000, -2000] and set(tokens["gap"]) == {0} and "reference" not in tokens


def test_figures_of_every_kind() -> None:
    half = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}
    result = {
        "pass_at_1": half, "greedy": None, "by_level": {"a/1": half}, "metrics": {"pass@8": half}, "counts": {"failed": 2},
        "title": "MATH", "truncated_fraction": 0.125, "finished": True,
    }  # fmt: skip
    rows = list(evaluations({"eval": {"after": result}}, []))
    assert [(row["name"], row["value"]) for row in rows] == [
        ("pass@1, sampled", 0.5), ("a/1", 0.5), ("pass@8", 0.5), ("counts: failed", 2), ("truncated fraction", 0.125)
    ]  # fmt: skip
    assert rows[0] == {"moment": "after", "name": "pass@1, sampled", **half}
    during = list(evaluations({}, [{"step": 4, "eval/pass_at_1": 0.25}, {"step": 5}]))
    assert during == [{"moment": "step 4", "name": "pass@1, sampled", "value": 0.25}]


def test_data_funnels(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "groups/sampled": 8, "groups/with_signal": 0.5},
        {"step": 2, "groups/sampled": 8, "groups/with_signal": 0.25},
    ]
    assert [row["count"] for row in funnel(tmp_path, lines)] == [16, 6]
    assert funnel(tmp_path, [{"step": 1}]) == []
    (tmp_path / "summary.json").write_text('{"funnel": {"steps": [{"step": "generated", "left": 9, "removed": 0}]}}')
    assert funnel(tmp_path, lines) == [{"label": "generated", "count": 9, "unit": "answers"}]
    (tmp_path / "summary.json").unlink()
    (tmp_path / "data.json").write_text(
        json.dumps(
            {"chats": 9, "kept": 7, "tokens": 100, "trained_tokens": 60, "preparation": {"sources": [{"loaded": 12}]}}
        )
    )
    assert [row["count"] for row in funnel(tmp_path, [])] == [12, 9, 7, 100, 60]


def test_whatever_a_text_says_it_stays_data(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><!-- \u2028 \ud800 "'
    assert "<" not in encode(evil) and decode(encode(evil)) == evil.replace("\ud800", "?")
    run = make_run(tmp_path / "<script>alert(2)", steps=2, texts=(evil.replace("\ud800", ""),))
    page = report.write_report(run).read_text()
    assert "alert(1" not in page and page.count("alert(2") == page.count("&lt;script&gt;alert(2") == 2
    texts = decode(chunks(page)["texts-0-0"])
    assert texts["completions"][0] == evil.replace("\ud800", "")


def test_the_policy_names_every_script_and_no_server() -> None:
    still, live = content_policy(is_live=False), content_policy(is_live=True)
    assert "connect-src 'none'" in still and "connect-src 'self'" in live
    assert "unsafe" not in still and "http" not in still and "default-src 'none'" in still
    assert still.count("sha256-") == len(list(PAGE.glob("*.js"))) + len(list(PAGE.glob("*.css"))) + 2


def test_the_plotting_library_is_as_it_was_published() -> None:
    listed = dict(
        reversed(line.split()) for line in (PAGE / "vendor/README.md").read_text().splitlines() if line[:4] == "    "
    )
    assert len(listed) == 2
    for name, digest in listed.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_run(tmp_path / "one/run", steps=2), make_run(tmp_path / "two/run", steps=3)
    monkeypatch.chdir(tmp_path)
    assert report.main([str(first)]) == 0 and (first / "report.html").exists()
    assert report.main([str(first), str(second)]) == 0
    index = decode(chunks((tmp_path / "comparison.html").read_text())["index"])
    assert index["kind"] == "comparison" and [run["name"] for run in index["runs"]] == ["one/run", "two/run"]
    assert [run["samples"] for run in index["runs"]] == [12, 18]
    assert report.main([str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_stages_of_a_pipeline_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stage: pipeline\nstages: [{name: z}, {name: a}, {name: later}]\n")
    for name in ("a", "z"):
        make_run(tmp_path / name, steps=1)
    assert [path.name for path in stage_directories(tmp_path)] == ["z", "a"]


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    reader, path = LogReader(), tmp_path / "metrics.jsonl"
    assert reader.read(path) == []
    log = MetricsLog(tmp_path)
    log.log(1, {"x": Metric(1.0, "last")})
    with path.open("a") as file:
        file.write('{"step": 2, "se')
    assert [line["step"] for line in reader.read(path)] == [1]
    with path.open("a") as file:
        file.write('conds": 1}\n{"step": 3, "seconds": 2}\n')
    assert [line["step"] for line in reader.read(path)] == [1, 2, 3]
    resumed = MetricsLog(tmp_path, resume_step=1)
    for step in (2, 3, 4, 5):
        resumed.log(step, {"x": Metric(100.0 * step, "last")})
    assert [line.get("x") for line in reader.read(path)] == [1.0, 200.0, 300.0, 400.0, 500.0]
