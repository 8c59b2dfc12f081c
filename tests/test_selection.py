"""Reasons, picks and the funnel, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from data.clean import Decontaminator
from data.records import Record
from posttrain.data_card import funnel_of, kind_row
from posttrain.distill_data import Problem, with_system_prompt
from posttrain.distill_pairs import pair_rows
from posttrain.recipe import RejectionSection, SelectionSection
from posttrain.selection import REASONS, Answer, Funnel, Judgement, Selector, farthest, pick, reject
from posttrain.teachers import Generation

GOOD = "<think>two and two are four</think><answer>4</answer>"


def answer(
    text: str = GOOD,
    score: float = 1.0,
    *,
    number: int = 0,
    tokens: int | None = 10,
    finish: str | None = "stop",
    **more: Any,
) -> Answer:
    generation = Generation(f"p#{number}", "p", number, "d", text, finish, 5, tokens, number, "t", "v")
    statuses = {"accuracy": more.pop("status", "ok")}
    return Answer(generation, Judgement(more.pop("reward", score), {"accuracy": score}, statuses, {"accuracy": "why"}))


def problem(text: str = "What is 2+2?", **metadata: Any) -> Problem:
    return Problem(Record("p", ({"role": "user", "content": text},), "4", metadata), None)


def reasons(found: Answer) -> list[str]:
    return [reason for reason, _ in found.reasons]


@pytest.mark.parametrize(
    ("rules", "given", "expected"),
    [
        ({}, answer(), []),
        ({}, answer(" \n"), ["empty"]),
        ({}, answer(finish="length"), ["truncated"]),
        ({}, answer(finish="content_filter"), ["truncated"]),
        ({}, answer(finish=None), []),
        ({"truncated": False}, answer(finish="length"), []),
        ({"correctness": {"accuracy": 1.0}}, answer(score=0.99), ["correctness"]),
        ({"correctness": {"accuracy": 0.99}}, answer(score=0.99), []),
        ({"format": "think_answer"}, answer("4"), ["format"]),
        ({"format": "think_answer"}, answer(), []),
        ({"format": "think"}, answer(" <think>so</think>\nIt is 4."), []),
        ({"format": "think"}, answer("<think>so</think> \n"), ["format"]),
        ({"format": "think"}, answer("<think>so It is 4."), ["format"]),
        ({"format": "think"}, answer("Well, <think>so</think> 4"), ["format"]),
        ({"format": "think"}, answer("<think>a</think><think>b</think> 4"), ["format"]),
        ({"length": {"max_tokens": 10}}, answer(tokens=10), []),
        ({"length": {"max_tokens": 10}}, answer(tokens=11), ["length"]),
        ({"length": {"min_tokens": 10}}, answer(tokens=9), ["length"]),
        ({"length": {"max_characters": 3}}, answer("abcd", tokens=None), ["length"]),
        ({"length": {"min_characters": 4, "max_characters": 4}}, answer("abcd", tokens=None), []),
        # "a b a b a b": 5 bigrams of 2 kinds, so 3 of 5 were there before.
        ({"repetition": {"ngram_size": 2, "max_share": 0.6}}, answer("a b a b a b"), []),
        ({"repetition": {"ngram_size": 2, "max_share": 0.59}}, answer("a b a b a b"), ["repetition"]),
        ({"language": {"language": "en"}}, answer("We add the two numbers and find the result."), []),
        ({"language": {"language": "en"}}, answer("我们把两个数字加起来 and find the result."), ["language"]),
        ({"language": {"language": "en"}}, answer("12 + 30 = 42"), []),
        (
            {"format": "think_answer", "length": {"max_tokens": 1}},
            answer("x", finish="length"),
            ["truncated", "format", "length"],
        ),
    ],
)  # fmt: skip
def test_each_rule(rules: dict[str, Any], given: Answer, expected: list[str]) -> None:
    assert reasons(reject(given, RejectionSection(**rules), {})) == expected


def test_a_record_says_its_language_where_it_is_one() -> None:
    rules = RejectionSection(language={"language": "en"})
    chinese = answer("我们把两个数字加起来。")
    assert reasons(reject(chinese, rules, {"language": "zh"})) == []
    assert reasons(reject(chinese, rules, {"language": "Python"})) == ["language"]


def test_an_answer_that_nobody_could_judge_is_not_wrong() -> None:
    rules = RejectionSection(correctness={"accuracy": 1.0})
    found = reject(answer(score=0.0, status="infrastructure"), rules, {})
    assert found.reasons == (("unjudged", "accuracy: why"),)
    # A judge that was killed by the answer, or took too long over it, has said something.
    for status in ("timeout", "crash"):
        assert reasons(reject(answer(score=0.0, status=status), rules, {})) == ["correctness"]


def test_bounds_in_tokens_need_tokens() -> None:
    with pytest.raises(ValueError, match="completion_tokens"):
        reject(answer(tokens=None), RejectionSection(length={"max_tokens": 5}), {})


def test_picks() -> None:
    answers = [
        answer("one two three", number=0, tokens=30, reward=0.5),
        answer("one two four", number=1, tokens=20, reward=0.9),
        answer("five six seven", number=2, tokens=20, reward=0.9),
        answer("eight", number=3, tokens=40, reward=0.7),
    ]

    def picked(**keys: Any) -> list[int]:
        return pick(answers, SelectionSection(**keys))

    assert picked(pick="shortest") == [1]
    assert picked(pick="shortest", per_prompt=3) == [0, 1, 2]
    assert picked(pick="best") == [1]  # a tie goes to the shorter, then to the first
    assert picked(pick="best", per_prompt=3) == [1, 2, 3]
    assert picked(pick="all") == [0, 1, 2, 3]
    assert picked(pick="diverse", per_prompt=9) == [0, 1, 2, 3]
    assert pick([], SelectionSection(pick="best")) == []


def test_diverse_answers_by_hand() -> None:
    """Trigrams: A {abc, bcd}, B {abc, bcx}, C {xyz}. Distances: A-B 1 - 1/3, A-C and B-C 1."""
    texts = ["a b c d", "a b c x", "x y z"]
    assert farthest(texts, 2, [0, 1, 2]) == [0, 2]
    assert farthest(texts, 3, [7, 8, 9]) == [7, 9, 8]
    assert farthest(["same", "same", "other"], 2, [0, 1, 2]) == [0, 2]


def test_a_prompt_from_judging_to_picking() -> None:
    evaluation = [Record("e", ({"role": "user", "content": "name the capital of the largest country there is"},))]
    selector = Selector(
        RejectionSection(correctness={"accuracy": 1.0}),
        SelectionSection(pick="shortest"),
        Decontaminator(evaluation, 5),
    )
    first = selector.decide(
        problem(),
        [
            answer("wrong", 0.0, number=0, tokens=1),
            answer("so: the capital of the largest country is", number=1, tokens=2),
            answer("four, after much thought", number=2, tokens=9),
            answer("Four,  AFTER much thought", number=3, tokens=8),  # the same but for case and spaces
            answer("it is four", number=4, tokens=12),
            answer("?", 0.0, number=5, status="infrastructure"),
        ],
    )
    assert [reasons(a) for a in first] == [
        ["correctness"], ["contaminated"], [], ["duplicate"], ["not_picked"], ["unjudged"],
    ]  # fmt: skip
    assert first[1].reasons[0][1].startswith("e: the capital of the largest")
    second = selector.decide(problem("Another?"), [answer("four, after much thought", number=0)])
    assert second[0].is_kept  # the same answer to another prompt is another chat

    funnel = Funnel()
    funnel.add(first)
    funnel.add(second)
    funnel.add([answer("x", 0.0, number=0).without("truncated").without("correctness")])
    left = {step["step"]: (step["left"], step["removed"]) for step in funnel.steps()}
    assert left["generated"] == (8, 0) and left["judged"] == (7, 1) and left["not truncated"] == (6, 1)
    assert left["correct"] == (5, 1) and left["not contaminated"] == (4, 1) and left["not a duplicate"] == (3, 1)
    assert left["kept"] == (2, 1) and funnel.kept == 2
    assert funnel.prompts == {"all": 3, "with_a_correct_answer": 2, "with_a_kept_answer": 2}
    found = funnel_of(funnel)
    assert found["reasons"]["correctness"] == {"first": 1, "any": 2}
    assert sum(counts["first"] for counts in found["reasons"].values()) == 8 - 2
    assert kind_row(funnel) == {
        "prompts": 3, "generated": 8, "judged": 7, "correct": 5, "kept": 2, "prompts_with_a_kept_answer": 2,
    }  # fmt: skip
    assert list(found["reasons"]) == [name for name in REASONS if name in found["reasons"]]


def test_pairs_of_a_prompt_by_hand() -> None:
    """Right: 1, 4 (2 says the same as 1; 6 breaks a rule). Wrong: 0, 3 (cut off and wrong). Unjudged: 5."""
    answers = [
        answer("no", 0.0, number=0).without("correctness"),
        answer("four", number=1),
        answer("four", number=2).without("duplicate"),
        answer("fo", 0.0, number=3).without("truncated").without("correctness"),
        answer("it is four", number=4).without("not_picked"),
        answer("?", 0.0, number=5, status="infrastructure").without("unjudged"),
        answer("vier", number=6).without("language"),
    ]

    def made(limit: int) -> list[tuple[str, str]]:
        rows = pair_rows(problem(), answers, limit)
        assert all(row["chosen"][:-1] == row["rejected"][:-1] == list(problem().record.messages) for row in rows)
        return [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]

    assert made(1) == [("four", "no")]
    assert made(9) == [("four", "no"), ("it is four", "fo")]
    (first, second) = pair_rows(problem(), answers[:5], 2)
    assert (first["chosen_id"], first["rejected_id"]) == ("p#1", "p#0") and second["rejected_id"] == "p#3"
    assert first["id"] != second["id"]
    assert pair_rows(problem(), answers[1:3], 9) == [] == pair_rows(problem(), answers[:1] + answers[5:], 9)


def test_a_system_prompt_comes_first_and_loses_nothing() -> None:
    user = {"role": "user", "content": "q"}
    assert with_system_prompt((user,), None) == (user,)
    assert with_system_prompt((user,), "s") == ({"role": "system", "content": "s"}, user)
    own = {"role": "system", "content": "own"}
    assert with_system_prompt((own, user), "s") == ({"role": "system", "content": "s\n\nown"}, user)
