"""The discrete-event simulation: hand-worked runs, what was measured, failures, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.overlap import recipe as overlap_recipe
from posttrain import plan
from posttrain.planning.hardware import load_hardware
from posttrain.planning.lengths import Lengths
from posttrain.planning.simulation import Setting, simulate
from posttrain.planning.splits import Chances, Measured, setting_of
from posttrain.planning.stages import Assumptions
from posttrain.recipe import GrpoRecipe, RecipeError

ROOT = Path(__file__).parent.parent
# Ten tokens in two rounds of four sequences, a second each: 20 s; rewards 3, learning 15, publication 2.
EVEN = Setting(
    engines=1,
    slots=4,
    step_seconds=lambda batch, context: 1.0,
    lengths=Lengths(10, 0.0, 20),
    prompt_tokens=5,
    samples=8,
    learning_seconds=15.0,
    publication_seconds=2.0,
    reward_seconds=3.0,
    steps=10,
    jitter=0.0,
)


def test_phases_in_turns() -> None:
    found = simulate(EVEN)
    assert found.seconds == pytest.approx(10 * (20 + 3 + 15 + 2))
    assert found.steps == 10 and found.tokens == 10 * 8 * 10
    assert dict(found.lags) == {0: 80}
    assert found.sampler_idle == pytest.approx(1 - 20 / 40) and found.learner_idle == pytest.approx(23 / 40)


def test_one_version_ahead() -> None:
    found = simulate(replace(EVEN, max_lag=1, steps=100))
    # The samplers are what is waited for: 20 s, then the publication, or the rewards if they take longer.
    assert found.step_seconds == pytest.approx(23, rel=0.03)
    assert set(found.lags) == {0, 1} and found.lags[0] == 8
    slow_learner = simulate(replace(EVEN, max_lag=1, steps=100, learning_seconds=40.0))
    assert slow_learner.step_seconds == pytest.approx(42, rel=0.02)
    in_flight = simulate(replace(EVEN, max_lag=2, in_flight=True, steps=100, learning_seconds=30.0))
    assert in_flight.step_seconds == pytest.approx(32, rel=0.02) and max(in_flight.lags) <= 2


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_no_sample_is_older_than_the_lag(lag: int) -> None:
    found = simulate(replace(EVEN, max_lag=lag, steps=40, learning_seconds=1.0, jitter=0.3))
    assert max(found.lags) <= lag and sum(found.lags.values()) == 40 * 8


def test_engines_share_the_work_and_stragglers_hold_it_up() -> None:
    four = simulate(replace(EVEN, engines=4, slots=2))
    assert four.seconds == pytest.approx(10 * (10 + 3 + 15 + 2))
    lame = simulate(replace(EVEN, engines=4, slots=2, straggler_share=1.0, straggler_factor=3.0))
    assert lame.seconds == pytest.approx(10 * (30 + 3 + 15 + 2))


def test_failures_cost_time_and_lose_no_step() -> None:
    engines = simulate(replace(EVEN, engines=2, slots=2, steps=60, engine_mtbf=200.0, engine_restart=10.0))
    assert engines.engine_failures > 3 and engines.lost_tokens > 0
    assert engines.steps == 60 and engines.tokens == 60 * 80  # what was lost is sampled again
    assert engines.seconds > simulate(replace(EVEN, engines=2, slots=2, steps=60)).seconds
    learner = simulate(replace(EVEN, steps=60, save_steps=5, learner_mtbf=600.0, learner_restart=50.0))
    assert learner.learner_failures > 1 and learner.steps == 60 and learner.tokens == 60 * 80
    assert learner.seconds > 60 * 40 + learner.learner_failures * 50


def test_the_same_seed_gives_the_same_run() -> None:
    lively = replace(EVEN, lengths=Lengths(10, 0.5, 20), jitter=0.2, engine_mtbf=300.0, straggler_share=0.3, max_lag=1)
    assert simulate(lively) == simulate(lively)
    assert simulate(lively).seconds != simulate(replace(lively, seed=1)).seconds


def measured_overlap() -> tuple[Measured, float]:
    """Seconds of the synchronous run and the gain by `max_lag: 1`, from docs/measured/grpo.md."""
    text = (ROOT / "docs/measured/grpo.md").read_text()
    row = re.search(r"\| `max_lag: 0` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    other = re.search(r"\| `max_lag: 1` \|(?: [\d.]+ \|){4} ([\d.]+) \|", text)
    assert row and other
    generation, learning, publication, step, speed = map(float, row.groups())
    return Measured(generation, learning, publication, step - generation - learning - publication), float(
        other[1]
    ) / speed


def test_the_measured_gain_of_asynchrony_is_reproduced(policy_path: Path) -> None:
    measured, gain = measured_overlap()
    assert gain == pytest.approx(1.83, abs=0.01)
    recipe = GrpoRecipe.model_validate(
        {**overlap_recipe(str(policy_path), 30, 0, 96, in_flight=False), "run_name": "x"}
    )
    assumed = Assumptions(load_hardware(str(ROOT / "docs/measured/plan_cpu.yaml")), mean_length=20.0, prompt_tokens=30)
    steps = {
        lag: simulate(setting_of(recipe, assumed, (1, 1), lag, Chances(steps=60), measured)).step_seconds
        for lag in (0, 1)
    }
    assert steps[0] == pytest.approx(
        measured.generation + measured.learning + measured.publication + measured.rest, rel=0.1
    )
    assert steps[0] / steps[1] == pytest.approx(gain, rel=0.2)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_table_of_splits_and_lags(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--simulate", "--splits", "8:16,16:8", "--lags", "0,1", "--simulated-steps", "4", "--mtbf-hours", "500"]
    assert plan.main([str(ROOT / "recipes/qwen3_30b_a3b/grpo.yaml"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| 8 : 16", "0"],
        ["| 8 : 16", "1"],
        ["| 16 : 8", "0"],
        ["| 16 : 8", "1"],
    ]
    assert lines[-1].startswith("fastest: ")


def test_seconds_of_a_run(tmp_path: Path) -> None:
    line = {"time/rollout": 2.0, "time/learn": 3.0, "time/publish": 0.5, "time/step": 6.0, "lag/max": 0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({**line, "step": step}) for step in range(5)))
    assert Measured.of_run(str(tmp_path)) == Measured(2.0, 3.0, 0.5, 0.5)
    path.write_text("\n".join(json.dumps({**line, "step": step, "lag/max": 1}) for step in range(5)))
    with pytest.raises(RecipeError, match="its phases overlap"):
        Measured.of_run(str(tmp_path))
    with pytest.raises(RecipeError, match=r"no metrics.jsonl"):
        Measured.of_run(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--splits", "3"], "write sampler GPUs and learner GPUs"),
        (["--splits", "8:16", "rollout.oversampling=1.5", "algorithm.importance=truncate"], "is not simulated"),
        (["--lags", "-1"], "--lags are 0 or more"),
        (["--straggler-share", "2"], "--straggler-share is 0 to 1"),
    ],
)
def test_what_is_not_simulated_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(ROOT / "recipes/qwen3_30b_a3b/grpo.yaml"), "--simulate", *words]) == 2
    assert message in capsys.readouterr().err
