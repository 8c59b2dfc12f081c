"""Metrics, the log and its repair on resuming, statistics, the run directory, the report."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from eval.report import write_report
from eval.statistics import bootstrap, estimate, paired_difference
from eval.suite import evaluate
from posttrain import checkpoint
from posttrain.errors import RunStopped
from posttrain.metrics import Metric, MetricsLog, merge
from posttrain.recipe import DatasetSection, EvalSection
from posttrain.run_dir import RunDir
from posttrain.types import Completion, Group, Prompt


def test_each_metric_is_reduced_its_own_way() -> None:
    parts = [
        {"a": Metric(1.0, "mean"), "b": Metric(1.0, "sum"), "c": Metric(1.0, "max"), "d": Metric(1.0, "last")},
        {"a": Metric(4.0, "mean"), "b": Metric(4.0, "sum"), "c": Metric(4.0, "max"), "d": Metric(4.0, "last")},
        {"a": Metric(4.0, "mean"), "e": Metric(2.0, "min")},
    ]
    merged = {name: metric.value for name, metric in merge(parts).items()}
    assert merged == {"a": 3.0, "b": 5.0, "c": 4.0, "d": 4.0, "e": 2.0}


def test_a_maximum_does_not_hide_nan_and_two_reductions_are_an_error() -> None:
    assert math.isnan(merge([{"a": Metric(math.nan, "max")}, {"a": Metric(1.0, "max")}])["a"].value)
    assert math.isnan(merge([{"a": Metric(1.0, "max")}, {"a": Metric(math.nan, "max")}])["a"].value)
    with pytest.raises(ValueError, match="reduced in two ways"):
        merge([{"a": Metric(1.0, "max")}, {"a": Metric(1.0, "sum")}])


def test_resuming_drops_torn_lines_and_later_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"x": Metric(step, "last")})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "x')
    MetricsLog(tmp_path, resume_step=2).log(3, {"x": Metric(math.inf, "last")})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["x"]) for line in lines] == [(1, 1), (2, 2), (3, None)]
    assert lines[2]["seconds"] >= lines[1]["seconds"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_step_and_says_why_it_does_not_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(options)
        if not (tmp_path / "key").exists():
            raise RuntimeError("no key configured")
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
        )

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    with pytest.raises(RunStopped, match=rf"report_to: {name} does not start: no key configured; .*{name} out"):
        MetricsLog(tmp_path, [name])
    (tmp_path / "key").touch()
    log = MetricsLog(tmp_path, [name])
    log.log(3, {"reward/mean": Metric(0.5, "mean"), "loss": Metric(2.0, "mean")})
    log.close()
    options = {"project": "posttrain", "name": tmp_path.name, **({"dir": str(tmp_path)} if name == "wandb" else {})}
    assert calls == [options, options, (3, {"reward/mean": 0.5, "loss": 2.0}), "finish"]


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.959964
    found = estimate([[1.0]] * 8 + [[0.0]] * 2)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-5)


def test_samples_of_one_problem_are_not_independent() -> None:
    # Means 1, 0, 1, 0: standard error 0.57735 / 2, whatever the number of samples per problem. As much as of 0.25 / 0.08333 =
    # 3 independent scores, and by Student's quantile as of 3 (1.95996 / 3.18245)**2 = 1.13789: half of Wilson's interval is
    # 1.95996 / 2 / sqrt(1.13789 + 1.95996**2).
    found = estimate([[1.0, 1.0], [0.0, 0.0]] * 2)
    assert found.value == 0.5 and found.n == 4
    assert found.high - 0.5 == 0.5 - found.low == pytest.approx(0.439173, abs=1e-5)
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])


def test_a_bootstrap_draws_problems_and_agrees_with_the_normal_interval() -> None:
    # Means 1 and 3 half each: standard error 1 / sqrt(400).
    found = bootstrap([[0.0, 2.0], [3.0]] * 200)
    assert (found.value, found.n) == (2.0, 400)
    assert (found.low, found.high) == pytest.approx((2 - 1.96 / 20, 2 + 1.96 / 20), abs=0.01)
    assert found == bootstrap([[0.0, 2.0], [3.0]] * 200)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([[1.0], []])


def test_a_paired_difference_forgets_what_the_problems_have_in_common() -> None:
    first = {str(n): [float(n)] for n in range(100)}
    second = {name: [values[0] + (2 if int(name) % 2 else 0)] for name, values in reversed(first.items())}
    found = paired_difference(first, second)
    assert found.value == 1.0 and found.n == 100
    assert (found.low, found.high) == pytest.approx((1 - 0.196, 1 + 0.196), abs=0.02)  # the problems differ by up to 99
    with pytest.raises(ValueError, match="the same problems"):
        paired_difference(first, {"0": [1.0]})


PROMPT = Prompt("p/1", ({"role": "user", "content": "<b>2+2</b>="},), (1, 2), "4", {"task": "chain_sum", "level": 1})


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion((5, 6), (-0.1, -0.2), finish, text, 3)  # type: ignore[arg-type]


def test_evaluation_counts_modes_apart() -> None:
    section = EvalSection(datasets=(DatasetSection(task="chain_sum", size=1),), num_samples=2)
    right, wrong = "<think></think><answer>4</answer>", "<think></think><answer>5</answer>"

    def generate(prompts: object, params: object) -> list[list[Completion]]:
        greedy = params.temperature == 0.0  # type: ignore[attr-defined]
        return [[completion(right)]] if greedy else [[completion(right), completion(wrong, "length")]]

    result = evaluate(section, [PROMPT], generate)
    assert result.pass_at_1.value == 0.5 and result.greedy is not None and result.greedy.value == 1.0
    assert result.truncated_fraction == 0.5 and list(result.by_level) == ["chain_sum/1"]
    assert [row["score"] for row in result.rows] == [1.0, 0.0, 1.0]


def test_run_directory_and_report(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    group = Group(PROMPT, (completion("<script>alert(1)</script>"),), (1.1,), {"accuracy": (1.0,)})
    path = run_dir.write_samples(12, [group], [[0.7]])
    (row,) = pq.read_table(path).to_pylist()
    assert path.name == "step-000012.parquet"
    assert (row["reward"], row["reward/accuracy"], row["advantage"], row["policy_version"]) == (1.1, 1.0, 0.7, 3)
    run_dir.write_recipe("stage: grpo\n")
    run_dir.write_environment(5)
    assert json.loads((run_dir.path / "environment.json").read_text())["packages"]["torch"]
    log = MetricsLog(run_dir.path)
    for step in (1, 2, 3):
        log.log(step, {"reward/mean": Metric(step / 3, "mean")})
    result = {"pass_at_1": estimate([[1.0]]).to_dict(), "greedy": None, "completion_length_mean": 2.0, "by_level": {}}
    run_dir.write_summary({"stage": "grpo", "seconds": 1.0, "steps": 3, "eval": {"after": result}})
    page = write_report(run_dir.path).read_text()
    assert "alert(1)" not in page  # what a model wrote is data (tests/test_report_page.py runs it)
    assert "http://" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    def write(path: str) -> None:
        (Path(path) / "model.txt").write_text("weights")

    def fail(path: str) -> None:
        write(path)
        raise OSError("disk full")

    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, write, {"cursor": step}, keep=2)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step-2", "step-3"]
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 4, fail, {}, keep=2)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step-2", "step-3"]
    assert (tmp_path / "latest").resolve().name == "step-3"
    assert checkpoint.load_progress(tmp_path / "latest") == {"step": 3, "cursor": 3}
    checkpoint.save(tmp_path, 4, write, {}, keep=2)
    assert (tmp_path / "latest" / "model.txt").read_text() == "weights"
    with pytest.raises(RunStopped, match="holds step-3, step-4 of an earlier run: add --resume"):
        checkpoint.require_fresh(tmp_path)
    checkpoint.require_fresh(tmp_path / "elsewhere")
