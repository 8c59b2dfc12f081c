"""Figures as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_runs import make_run

from eval import plots


def test_smoothing_by_hand() -> None:
    assert plots.smooth([1.0, 2.0], 0.0) == [1.0, 2.0]
    found = plots.smooth([1.0, None, 3.0], 0.5)
    assert found[0] == 1.0 and math.isnan(found[1]) and found[2] == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)


def test_a_file_for_each_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=4)
    out = tmp_path / "figures"
    assert plots.main([str(run), "--out", str(out), "--smoothing", "0.5"]) == 0
    names = {path.name for path in out.iterdir()}
    expected = ("reward", "length", "entropy", "kl", "parity", "max_violation", "lag", "phases", "throughput", "router")
    assert names == {f"{name}.{kind}" for name in expected for kind in ("png", "svg")}
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in out.glob("*.png"))
    assert "written" in capsys.readouterr().out
    svg = (out / "reward.svg").read_text()
    assert svg.count('id="line2d_') > 6 and "<svg" in svg


def test_lines_of_several_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=3)
    make_run(tmp_path / "b", steps=2)
    out = tmp_path / "figures"
    paths = plots.draw_all([tmp_path / "a", tmp_path / "b"], out, formats=["pdf"], only=["lag", "router"])
    assert [path.name for path in paths] == ["lag.pdf", "router_a.pdf", "router_b.pdf"]
    runs = [{"name": name, "metrics": {"step": [1, 2], "lag/max": [0, 1], "lag/mean": [None, 1]}} for name in "ab"]
    figure = next(figure for figure in plots.FIGURES if figure.name == "lag")
    assert plots.lines_of(figure, runs) == [("a max", [1, 2], [0, 1]), ("b max", [1, 2], [0, 1])]


def test_what_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=1)
    for words, said in (
        (["--only", "rewards"], "unknown figure 'rewards'"),
        (["--format", "gif"], "unknown format 'gif'"),
        (["--smoothing", "1"], "smoothing=1"),
    ):
        assert plots.main([str(run), "--out", str(tmp_path / "o"), *words]) == 2
        assert said in capsys.readouterr().err
    assert plots.main([str(tmp_path)]) == 2
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 1}) + "\n")
    (run / "router.jsonl").unlink()
    assert plots.main([str(run), "--out", str(tmp_path / "o")]) == 0
    assert "nothing" in capsys.readouterr().out
