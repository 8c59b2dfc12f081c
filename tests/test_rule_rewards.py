"""Rule rewards: multiple choice, reasoning-gym's scorers, length, repetition. Values by hand, hacks, oracles of TRL."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from reward_contract import tried

from posttrain.types import RewardResult
from rewards import RewardError, RewardFunction
from rewards.length import cosine, overlong
from rewards.multiple_choice import score as multiple_choice
from rewards.reasoning_gym import UNSOUND
from rewards.reasoning_gym import score as gym
from rewards.repetition import score as repetition
from rewards.repetition import words

CHOICES = ["London", "Paris", "Rome", "The city of Bern"]

# ---- multiple choice


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "[B]",
        "B.",
        "B)",
        "B:",
        "**B**",
        "$B$",
        r"\text{B}",
        r"\textbf{(B)}",
        r"\boxed{B}",
        r"\boxed{\text{(B)}}",
        "Option B",
        "The answer is B",
        "The correct answer is: (B).",
        "Answer: B",
        "B) Paris",
        "B. Paris",
        "(B) Paris",
        "B: Paris",
        "B - Paris",
        "B Paris",
        r"\textbf{(B)}\ Paris",
    ],
)
def test_multiple_choice_right(text: str) -> None:
    assert multiple_choice(f"<answer>{text}</answer>", "B").score == 1.0
    assert multiple_choice(f"<answer>{text}</answer>", "B", choices=CHOICES).score == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "",
        "A or B",
        "B or C",
        "(B) or (C)",
        "B, C",
        "B/C",
        "B and C",
        "B & C",
        "BC",
        "A B C D",
        "B C",
        "(B)(C)",
        "A, B, C, D",
        "either B or C",
        "B?",
        "maybe B",
        "B, maybe",
        "not B",
        "not A",
        "B is wrong, it is C",
        "It is not A",
        "any of A-D",
        "Z",
        "1",
        "The answer",
        "B) Paris or C) Rome",
        r"\boxed{B} or \boxed{C}",
    ],
)
def test_multiple_choice_wrong_or_hedging(text: str) -> None:
    assert multiple_choice(f"<answer>{text}</answer>", "B").score == 0.0
    assert multiple_choice(f"<answer>{text}</answer>", "B", choices=CHOICES).score == 0.0


def test_multiple_choice_texts_of_the_choices() -> None:
    def said(text: str) -> float:
        return multiple_choice(f"<answer>{text}</answer>", "B", choices=CHOICES).score

    assert [said(text) for text in ("Paris", "paris.", "B) Paris", "B) Rome", "Rome", "Par", "London, Paris")] == [
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert multiple_choice("<answer>D</answer>", "The city of Bern", choices=CHOICES).score == 1.0
    # A text in which other capitals stand is no hedge once the choices are known, nor are "I" and "A" in the middle.
    assert multiple_choice("<answer>D) The city of Bern</answer>", "D", choices=CHOICES).score == 1.0
    assert multiple_choice("<answer>B) A city that I know</answer>", "B").score == 1.0


def test_multiple_choice_boxes_and_reasoning() -> None:
    assert multiple_choice(r"<think>A? no</think> It is \boxed{B}", "B").score == 1.0
    assert multiple_choice(r"<think>\boxed{B}</think> I do not know", "B").score == 0.0
    assert multiple_choice(r"B", "B").score == 0.0
    assert multiple_choice("<answer>B</answer><answer>C</answer>", "B").score == 0.0


def test_multiple_choice_refuses_bad_data() -> None:
    with pytest.raises(ValueError, match="'Berlin' is neither one of the letters A-D nor the text"):
        multiple_choice("<answer>B</answer>", "Berlin", choices=CHOICES)
    with pytest.raises(ValueError, match="neither one of the letters A-D"):
        multiple_choice("<answer>B</answer>", "E", num_choices=4)
    with pytest.raises(ValueError, match="num_choices must be 2 to 26, got 1"):
        multiple_choice("<answer>B</answer>", "A", num_choices=1)
    assert multiple_choice("<answer>E</answer>", "D", num_choices=4).detail == "no single letter"


# ---- reasoning-gym


def entry(name: str, index: int = 0, **config: Any) -> dict[str, Any]:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=index + 1, seed=3, **config)[index]


@pytest.mark.parametrize(
    "name", ["chain_sum", "gcd", "spell_backward", "simple_equations", "number_sequence", "caesar_cipher"]
)
def test_gym_gives_references_full_score_however_the_record_carries_them(name: str) -> None:
    item = json.loads(json.dumps(entry(name)))
    chat = f"<think>so</think><answer>{item['answer']}</answer>"
    nested = {"question": item["question"], "metadata": item["metadata"]}
    spread = {"question": item["question"], **item["metadata"]}
    for columns in (nested, spread):
        assert gym(chat, item["answer"], **columns) == RewardResult(1.0)
        assert gym("<answer>certainly not</answer>", item["answer"], **columns).score == 0.0
        assert gym(item["answer"], item["answer"], **columns).score == 0.0  # no answer block
        assert gym(chat * 2, item["answer"], **columns).score == 0.0  # two of them


def test_gym_judges_by_metadata_where_many_answers_are_right() -> None:
    item = entry("countdown")
    numbers, target = item["metadata"]["numbers"], item["metadata"]["target"]
    chat = f"<answer>{item['answer']}</answer>"
    assert gym(chat, item["answer"], **item["metadata"]).score == 1.0
    assert gym(f"<answer>{target}</answer>", item["answer"], **item["metadata"]).score == 0.0  # not made of the numbers
    assert numbers


def test_gym_partial_credit() -> None:
    item = {"answer": "olleh", "metadata": entry("spell_backward")["metadata"]}
    columns = {**item["metadata"], "word": "hello"}
    assert gym("<answer>ollex</answer>", "olleh", **columns) == RewardResult(0.0)
    partial = gym("<answer>ollex</answer>", "olleh", partial_credit=True, **columns).score
    assert partial == pytest.approx(4 / 5)
    assert gym("<answer>olleh</answer>", "olleh", partial_credit=True, **columns).score == 1.0
    assert gym("olleh", "olleh", partial_credit=True, **columns).score == 0.0


def test_gym_scorers_that_raise_are_the_completions_fault_unless_the_record_is_broken() -> None:
    item = entry("prime_factorization")
    result = gym("<answer>junk</answer>", item["answer"], **item["metadata"])
    assert (result.score, result.status) == (0.0, "crash")
    assert "prime_factorization raised ValueError" in result.detail
    with pytest.raises(ValueError, match=r"even for the reference .*carry all of the problem's metadata"):
        gym("<answer>1</answer>", "1", source_dataset="mini_sudoku")


def test_gym_refuses_unknown_and_unsound_datasets() -> None:
    with pytest.raises(ValueError, match="names no source_dataset"):
        gym("<answer>1</answer>", "1")
    with pytest.raises(ValueError, match="no dataset 'chain_sums'; it has .*chain_sum"):
        gym("<answer>1</answer>", "1", source_dataset="chain_sums")
    import reasoning_gym

    for name in UNSOUND:
        assert reasoning_gym.get_score_answer_fn(name)("junk", entry(name)) == 1.0  # else it can leave the list
        with pytest.raises(ValueError, match="full score to any text"):
            gym("<answer>1</answer>", "1", source_dataset=name)


# ---- length


def test_overlong_by_hand() -> None:
    def said(length: int, cache_length: int = 20) -> float:
        return overlong("", None, completion_length=length, max_length=100, cache_length=cache_length)

    assert [said(length) for length in (0, 80, 81, 90, 100, 101, 10_000)] == [0, 0, -0.05, -0.5, -1, -1, -1]
    assert [said(length, 0) for length in (99, 100, 101)] == [0, 0, -1]
    with pytest.raises(ValueError, match=r"cache_length must be between 0 and max_length \(100\), got 101"):
        said(1, 101)
    with pytest.raises(ValueError, match="max_length must be 1 token or more, got 0"):
        overlong("", None, completion_length=1, max_length=0, cache_length=0)


def test_overlong_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    for max_length, cache_length in ((100, 20), (100, 100), (7, 3), (20480, 4096), (50, 0)):
        oracle = get_soft_overlong_punishment(max_length, cache_length)
        for length in {
            0,
            1,
            max_length - cache_length,
            max_length - cache_length + 1,
            max_length - 1,
            max_length,
            max_length + 1,
        }:
            mine = overlong("", None, completion_length=length, max_length=max_length, cache_length=cache_length)
            assert mine == pytest.approx(oracle([[1] * length])[0], abs=1e-12), (max_length, cache_length, length)


def test_cosine_by_hand() -> None:
    def said(text: str, length: int, **options: Any) -> float:
        return cosine(f"<answer>{text}</answer>", "3", completion_length=length, max_length=100, **options).score

    assert [said("3.0", length) for length in (0, 50, 100, 200)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert [said("4", length) for length in (0, 50, 100, 200)] == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    paper = {"right_short": 2.0, "right_long": 1.0, "wrong_short": -10.0, "wrong_long": 0.0, "exceeded": -10.0}
    assert [said("3", length, **paper) for length in (0, 50, 100, 101)] == pytest.approx([2.0, 1.5, -10.0, -10.0])
    assert [said("4", length, **paper) for length in (0, 50, 99)] == pytest.approx([-10.0, -5.0, 0.0], abs=0.01)
    assert said("3.0", 50, judge="rewards.exact:score") == pytest.approx(-0.75)  # another judge
    with pytest.raises(ValueError, match="judge 'rewards.exact:scor' does not resolve"):
        said("3", 50, judge="rewards.exact:scor")


def test_cosine_keeps_the_judges_status() -> None:
    result = cosine("<answer>9^{9^{9^{9}}}</answer>", "3", completion_length=0, max_length=10, timeout_seconds=0.5)
    assert (result.score, result.status) == (-1.0, "timeout")


def test_cosine_is_trls() -> None:
    from trl.rewards import get_cosine_scaled_reward

    oracle = get_cosine_scaled_reward(max_len=64)
    for text in (r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"):
        for length in (0, 1, 17, 32, 63, 64, 65, 500):
            expected = oracle([[{"content": text}]], [r"$\frac{1}{3}$"], [[1] * length])[0]
            mine = cosine(text, r"\frac{1}{3}", completion_length=length, max_length=64).score
            assert mine == pytest.approx(expected, abs=1e-12), (text, length)


# ---- repetition


def test_repetition_by_hand() -> None:
    assert repetition("a b c d", None) == 0.0
    assert repetition("a a a a a", None, ngram_size=2) == -0.75  # one different pair of four
    assert repetition("a b a b a b", None, ngram_size=2) == pytest.approx(-(1 - 2 / 5))
    assert repetition("a b", None, ngram_size=3) == 0.0
    assert repetition("", None) == 0.0
    assert repetition("no " * 1000, None, max_penalty=0.5) == pytest.approx(-0.5, abs=0.001)
    assert repetition("数学数学数学数学", None, ngram_size=2) == pytest.approx(-(1 - 2 / 7))
    assert words("So, so: 数学 can't\nx_1") == ["so", ",", "so", ":", "数", "学", "can", "'", "t", "x_1"]


def test_repetition_is_not_fooled_by_case_space_and_line_breaks() -> None:
    plain = repetition("wait let me see " * 20, None)
    assert plain < -0.9
    assert repetition("Wait  let\nme SEE " * 20, None) == plain


def test_repetition_is_trls_over_words() -> None:
    from trl.rewards import get_repetition_penalty_reward

    source = random.Random(0)
    for _ in range(50):
        size, penalty = source.randint(1, 5), source.choice([0.0, 0.5, 1.0, 2.0])
        drawn = [source.choice("abcdef") for _ in range(source.randint(0, 30))]
        ids = [ord(word) for word in drawn]
        expected = get_repetition_penalty_reward(size, -penalty)([ids])[0]
        assert repetition(" ".join(drawn), None, ngram_size=size, max_penalty=penalty) == pytest.approx(expected)


def test_repetition_refuses_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="ngram_size must be 1 or more, got 0"):
        repetition("a", None, ngram_size=0)
    with pytest.raises(ValueError, match=r"max_penalty must be 0 or more .*, got -1"):
        repetition("a", None, max_penalty=-1)


# ---- through the door


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("rewards.multiple_choice:score", {}),
        ("rewards.reasoning_gym:score", {"source_dataset": "chain_sum"}),
        ("rewards.length:overlong", {"max_length": 100, "cache_length": 20}),
        ("rewards.length:cosine", {"max_length": 100}),
        ("rewards.repetition:score", {}),
    ],
)
def test_contract(spec: str, options: dict[str, Any]) -> None:
    answer = "B" if "choice" in spec else "42"
    found = tried(spec, answer, **options)
    if spec.split(":")[0] in ("rewards.multiple_choice", "rewards.reasoning_gym"):
        assert {probe.name for probe, score in found if score == 1.0 and probe.kind != "odd"} == {"right"}


def test_a_missing_length_is_an_error_with_the_rewards_name() -> None:
    with pytest.raises(RewardError, match="max_length"):
        RewardFunction("r", "rewards.length:overlong")("a", None, {"completion_length": 3})
