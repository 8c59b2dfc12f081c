"""The reward-hack audit on scripted rollouts: what it logs, when it raises an alarm, what it sets aside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.audit import RewardAudit, repeated_share, write_look
from posttrain.recipe import AuditSection, RewardSection
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Group, Prompt

VERIFIER = RewardSection(func="rewards.exact:score", name="truth")


def completion(text: str) -> Completion:
    return Completion(tuple(map(ord, text)), (-1.0,) * len(text), "stop", text, policy_version=0)


def group(number: int, texts: Sequence[str], rewards: Sequence[float]) -> Group:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": "?"},), (1,), answer="right")
    return Group(prompt, tuple(map(completion, texts)), tuple(rewards), {"rule": tuple(rewards)})


def verify(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scored:
    """Right is what says so; nothing can be said of what says "unclear"."""
    groups = []
    for prompt, row in zip(prompts, completions, strict=True):
        scores = tuple(float("right" in c.text) for c in row)
        unclear = frozenset(index for index, c in enumerate(row) if "unclear" in c.text)
        groups.append(Group(prompt, tuple(row), scores, {"truth": scores}, unjudged=unclear))
    return Scored(tuple(groups), {})


def audit(**options: float | str) -> RewardAudit:
    return RewardAudit(AuditSection(verifier=VERIFIER, **{"window": 3, **options}), verify, seed=0)  # type: ignore[arg-type]


def test_what_is_logged_by_hand() -> None:
    found = audit().look(1, [group(0, ["right", "wrong", "wrong!", "unclear"], [1.0, 0.0, 1.0, 0.5])])
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["audit/reward_mean"] == pytest.approx(2 / 3)
    assert values["audit/verifier_mean"] == pytest.approx(1 / 3)
    assert values["audit/suspicious_fraction"] == pytest.approx(1 / 3)
    assert values["audit/agreement/rule"] == values["audit/agreement/reward"] == pytest.approx(0.5)
    assert values["audit/unjudged"] == 1
    assert values["audit/length_mean"] == pytest.approx((5 + 5 + 6 + 7) / 4)
    assert [row["completion"] for row in found.suspicious] == ["wrong!"]
    assert found.alarms == ()


def test_the_same_completions_are_chosen_again() -> None:
    groups = [group(number, ["right", "wrong"] * 8, [1.0, 0.0] * 8) for number in range(8)]
    one, two = (audit(num_samples=20).look(4, groups) for _ in range(2))
    assert one.metrics["audit/verifier_mean"] == two.metrics["audit/verifier_mean"]
    assert one.metrics["audit/verifier_mean"] != audit(num_samples=20).look(5, groups).metrics["audit/verifier_mean"]


def test_a_reward_that_rises_while_the_truth_falls_raises_one_alarm(tmp_path: Path) -> None:
    auditor = audit()
    begun = []
    for step in range(1, 13):
        honest = max(0, 8 - step)  # of ten
        texts = ["right"] * honest + ["cheat"] * (10 - honest)
        look = auditor.look(step, [group(0, texts, [0.5] * honest + [0.9] * (10 - honest))])
        begun += [(step, alarm) for alarm in look.alarms]
        write_look(tmp_path, step, look)
    assert len(begun) == 1
    step, alarm = begun[0]
    assert 6 <= step <= 8 and "the policy is paid for something else" in alarm
    assert look.metrics["audit/alarms"].value == 1
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["step"] == step
    rows = [json.loads(line) for line in (tmp_path / "suspicious.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in rows} == {"cheat"}


def test_an_honest_run_raises_none() -> None:
    auditor = audit()
    for step in range(1, 13):
        good = min(10, step)
        look = auditor.look(
            step, [group(0, ["right"] * good + ["wrong"] * (10 - good), [1.0] * good + [0.0] * (10 - good))]
        )
        assert look.alarms == () and look.suspicious == ()


@pytest.mark.parametrize(
    ("before", "after", "alarm"),
    [
        ("right", "right abcdefghijklmnopqstuvwxyz", "tokens"),
        ("abcdefghijklmnopqrstuvwx", "abcdabcdabcdabcdabcdabcd", "repeated 4-grams"),
        ("<think></think><answer>right</answer>", "<think></think><answer>right</answer>.", "think/answer format"),
    ],
)
def test_drifts(before: str, after: str, alarm: str) -> None:
    auditor = audit()
    alarms = []
    for step in range(1, 9):
        text = before if step <= 3 else after
        alarms += auditor.look(step, [group(0, [text] * 4, [1.0] * 4)]).alarms
    assert len(alarms) == 1 and alarm in alarms[0]


def test_it_goes_on_where_it_stopped() -> None:
    whole, part = audit(), audit()
    steps = [[group(0, ["right", "wrong"], [1.0, step / 10])] for step in range(8)]
    for step, groups in enumerate(steps):
        whole.look(step, groups)
        if step == 4:
            resumed = audit()
            resumed.restore(json.loads(json.dumps(part.state())))
            part = resumed
        part.look(step, groups)
    assert part.state() == whole.state()


def test_repeated_share() -> None:
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_share([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
