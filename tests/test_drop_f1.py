"""DROP's F1, by hand; tests/test_lm_eval_agreement.py holds it to lm-eval's."""

from __future__ import annotations

import pytest
from reward_contract import tried

from rewards import RewardFunction
from rewards.drop_f1 import f1, words_of

SCORE = RewardFunction("f1", "rewards.drop_f1:score")


def test_it_keeps_the_contract() -> None:
    found = {probe.name: score for probe, score in tried("rewards.drop_f1:score")}
    assert found["right"] == 1.0 and found["wrong"] == found["empty"] == found["never closed"] == 0.0


def test_words_are_plain() -> None:
    assert words_of("The 3 field-goals!") == {"3.0", "field", "goals"}
    assert words_of("3,000 Low's U.S.") == {"3000.0", "lows", "us"}


@pytest.mark.parametrize(
    ("spans", "reference", "expected"),
    [
        (["48 yards"], ["48"], 0.67),  # precision 1/2, recall 1: 2/3
        (["yards"], ["48 yards"], 0.0),  # the reference's number is missing
        (["Ada Low"], ["Ada Low", "Bo Hill"], 0.5),  # a span without a partner counts 0
        (["Bo Hill", "Ada Low"], ["Ada Low", "Bo Hill"], 1.0),
        (["a Reds"], ["the reds"], 1.0),
        ([], ["x"], 0.0),
    ],
)
def test_by_hand(spans: list[str], reference: list[str], expected: float) -> None:
    assert f1(spans, reference) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    metadata = {"references": [["31"], ["48", "50"]]}
    assert SCORE("<think>31?</think><answer>50 | 48</answer>", None, metadata).score == 1.0
    assert SCORE("31", None, metadata).score == 1.0
    assert SCORE("<think>31", None, metadata).score == 0.0
    with pytest.raises(Exception, match="needs `references`"):
        SCORE("31", None, {"references": [[" "]]})
