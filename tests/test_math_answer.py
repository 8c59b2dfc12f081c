r"""`rewards.math_answer` against hand-written labels: called directly, from worker threads and from worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from rewards.extract import after_thinking, boxed, last_expression
from rewards.math_answer import score
from rewards.math_text import normalise, split_list
from rewards.math_units import split_unit
from tests.math_cases import Case
from tests.math_cases.algebra import ALGEBRA
from tests.math_cases.attacks import ATTACKS
from tests.math_cases.completions import COMPLETIONS
from tests.math_cases.numbers import NUMBERS
from tests.math_cases.objects import OBJECTS
from tests.math_cases.second_look import SECOND_LOOK

# Final answers go into an answer block; completions are taken as they are.
ANSWERS = [*NUMBERS, *ALGEBRA, *OBJECTS, *SECOND_LOOK, *ATTACKS]
TABLE = [case._replace(text=f"<answer>{case.text}</answer>") for case in ANSWERS] + COMPLETIONS
ENDLESS = ("9^{9^{9^{9}}}", "10000000!")  # stopped by the clock: the others get a limit that a busy machine keeps

# (reference, answer): where the reward and the label differ, and why it stays so.
DISAGREEMENTS = {
    ("2x", "2X"): "math-verify reads letters without their case",
    ("3", r"\sqrt{9"): "math-verify does not close braces",
    ("3", r"3 \approx 4"): "only the exact side of an approximation is compared",
    ("B", "(B) 12"): "a choice with its value is for rewards.multiple_choice",
    (r"\frac{\pi}{6}", r"30^\circ"): "degrees are dropped, not converted",
    (r"x \le -1 \text{ or } x \ge 3", r"(-\infty,-1] \cup [3,\infty)"): "inequalities joined by `or` become a list",
    (r"(-\infty,-1] \cup [3,\infty)", r"x \le -1 \text{ or } x \ge 3"): "inequalities joined by `or` become a list",
}


def verdict(case: Case) -> bool:
    limit = 1.0 if any(text in case.text for text in ENDLESS) else 30.0
    return score(case.text, case.reference, timeout_seconds=limit).score == 1.0


def disagreeing(verdicts: Sequence[bool]) -> set[tuple[str, str]]:
    """(reference, answer) of the cases whose label is another."""
    wrong = [case for case, said in zip(TABLE, verdicts, strict=True) if said != case.right]
    return {(case.reference, case.text.removeprefix("<answer>").removesuffix("</answer>")) for case in wrong}


@pytest.fixture(scope="module")
def verdicts() -> list[bool]:
    return [verdict(case) for case in TABLE]


def test_the_table_is_large_and_says_each_thing_once() -> None:
    assert len(TABLE) >= 300
    assert len({(case.reference, case.text) for case in TABLE}) == len(TABLE)
    assert 0.3 < sum(case.right for case in TABLE) / len(TABLE) < 0.7  # neither always-yes nor always-no scores well


def test_agrees_with_the_labels_but_for_the_cases_listed(verdicts: list[bool]) -> None:
    assert disagreeing(verdicts) == set(DISAGREEMENTS)
    assert len(DISAGREEMENTS) <= 0.01 * len(TABLE)


def test_never_calls_a_wrong_answer_right_but_where_listed(verdicts: list[bool]) -> None:
    generous = [case for case, said in zip(TABLE, verdicts, strict=True) if said and not case.right]
    assert {(case.reference, case.text) for case in generous} == {
        ("2x", "<answer>2X</answer>"),
        ("3", r"<answer>3 \approx 4</answer>"),
    }


def test_same_verdicts_from_threads(verdicts: list[bool]) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(verdict, TABLE)) == verdicts


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_same_verdicts_from_processes(verdicts: list[bool], method: str) -> None:
    # A forked process inherits a judge of its parent that has already answered, and must not talk to it.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(verdict, TABLE, chunksize=50)) == verdicts


# ---- the last expression


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the answer is 3.", True),
        ("So the answer is $3$.", True),
        ("First 4, then 3", True),
        ("First 3, then 4", False),
        (r"We get \(x = 3\) for 5 apples", True),
        (r"$4$ but then \[3\]", True),
        ("a third: 3/1", True),
        ("<think>it is 3</think> I do not know", False),
        ("<think>it is 4</think> It is 3", True),
        ("<think>it is 3", False),
        (r"\boxed{4} which is 3", False),
        ("<answer>4</answer> so 3", False),
        ("nothing", False),
        ("", False),
    ],
)
def test_last_expression_of_a_text_without_tags_and_boxes(text: str, expected: bool) -> None:
    assert score(text, "3", extract="last_expression").score == float(expected)
    if "\\boxed" not in text:
        assert score(text, "3").score == 0.0  # the default asks for a box or a block


def test_an_unknown_extraction_is_refused() -> None:
    with pytest.raises(ValueError, match="extract must be one of boxed, last_expression, got 'all'"):
        score("3", "3", extract="all")  # type: ignore[arg-type]


# ---- the parts by hand


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1½", r"1\frac{1}{2}"),
        ("x¹²", "x^{12}"),
        ("٤٢", "42"),
        ("−5", "-5"),
        ("1 234 567", "1234567"),
        ("12 34", "12 34"),
        ("1.2e-3", r"1.2 \times 10^{-3}"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (r"x \pm 1", "x + 1, x - 1"),
        ("3 > x > 1", "1 < x < 3"),
        ("The final answer is: 3.", "3"),
        ("**3**", "3"),
        ("x**2", "x^2"),
        ("3...", "3..."),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert " ".join(normalise(text).split()) == expected
    assert normalise(normalise(text)).split() == normalise(text).split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"5\text{ cm}", ("5", "cm")),
        (r"5\text{ cm}^2", ("5", "cm^2")),
        ("5 square centimeters", ("5", "cm^2")),
        (r"\$5", ("5", None)),
        (r"90^\circ", ("90", "degree")),
        (r"5\text{ apples}", ("5", None)),
        (r"5\text{ or so}", (r"5\text{ or so}", None)),
        ("12 s", ("12", "s")),
        ("12s", ("12s", None)),
        ("2t", ("2t", None)),
        ("5", ("5", None)),
    ],
)
def test_split_unit(text: str, expected: tuple[str, str | None]) -> None:
    assert split_unit(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2", ["1", "2"]),
        ("(1,2)", ["(1,2)"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        (r"1 \text{ or } 2", ["1", "2"]),
        ("x=1 and y=2", ["x=1", "y=2"]),
        (r"\frac{1}{2}; 3", [r"\frac{1}{2}", "3"]),
        (r"1\,dx", [r"1\,dx"]),
        ("", []),
    ],
)
def test_split_list(text: str, expected: list[str]) -> None:
    assert split_list(text) == expected


def test_boxes_and_reasoning() -> None:
    assert boxed(r"\boxed{1} and \boxed {\frac{1}{2}} and \boxed 3") == ["1", r"\frac{1}{2}", "3"]
    assert boxed(r"\boxed{\boxed{1}} \boxed{2") == [r"\boxed{1}", ""]
    assert boxed("none") == []
    assert [after_thinking(text) for text in ("a", "<think>a</think>b", "a</think>b", "<think>a")] == [
        "a",
        "b",
        "b",
        None,
    ]
    assert last_expression("7% of 1,000 is 70") == "70"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", [r"\boxed{", r"\boxed{3}", r"\(", "$", "<think>", "1,", "1 ", "{", "x=", "3 or ", "0."]
)
def test_long_odd_texts_do_not_hold_the_reward_up(unit: str) -> None:
    for text in (unit * 20_000, f"<answer>{unit * 20_000}</answer>", f"<answer>{unit * (900 // len(unit))}</answer>"):
        for extract in ("boxed", "last_expression"):
            score(text, "4", timeout_seconds=1.0, extract=extract)
