"""Verifiable instructions: each check by hand on a text that follows it and on one that nearly does; the reward over them."""

from __future__ import annotations

from typing import Any

import pytest
from reward_contract import tried

from rewards.instruction_following import score
from rewards.instructions import CHECKS, count_sentences, words

AT_LEAST, LESS = "at least", "less than"
# (instruction, options, texts that follow it, texts that do not)
TABLE: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "c++"]}, ["A Cat knows C++."], ["a cat", "a cat knows cccc"]),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": AT_LEAST},
        ["cat Cat", "cat cat cat"],
        ["cat", "dog"],
    ),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": LESS}, ["cat", "dog"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["bad", "c++"]}, ["badly"], ["Bad.", "so bad", "c++ is", "a c++"]),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": AT_LEAST},
        ["Quick, quiet"],
        ["quick"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS}, ["a!"], ["a!!"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist eine kurze Antwort auf die Frage."],
        ["This is a short answer to the question.", "42"],
    ),
    ("language:response_language", {"language": "hi"}, ["यह एक छोटा उत्तर है।"], ["This is short."]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": AT_LEAST},
        ["One. Two! Three?", "Dr. No came. He saw 3.5 cats. He left."],
        ["One. Two.", "Dr. No came. He left."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["One sentence."], ["One. Two."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["one two, three"], ["one - two !"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two"], ["one two three"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n\nb", "a\n***\n\n***\nb", "a *** b *** c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        ["a\n\nso it is", 'a\n\n\n\n"So," he said'],
        ["so\n\na", "so it is", "a\n\nsoft", "a\n\nb\n\nso"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [place]"],
        ["[name]", "[name of place", "name] place]"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. Me", "p. s. me"], ["PS me", "Bye."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S me", "p. p. s. me"], ["P.S. me"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "x\n* a\n- b"],
        ["* a", "* a\n* b\n* c", "** a\n** b", "a * b * c"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["yes", "My answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "**a**", "* *  ** **", "*a\nb*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "section 1 section 2", "Section one Section two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]"],
        ["{a: 1}", 'so {"a": 1}', "```"],
    ),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b"],
        ["a", "a******a", "a******b******c", "a******", "a ***** b"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, ["say hi. Hi!"], ["Hi! Say hi.", "Say"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["a. the end.", '"a. The end."'], ["The end. a", "The end"]),
    ("startend:quotation", {}, ['"a"', ' "a" '], ['"', '"a', "a", "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["NO I say", "THE END"],
        ["No NO", "42 43"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS}, ["NO"], ["NO, NO"]),
    (
        "change_case:english_capital",
        {},
        ["THIS IS THE ANSWER."],
        ["THIS IS the ANSWER.", "DAS IST DIE ANTWORT DARAUF."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is the answer."],
        ["This is the answer.", "das ist die antwort darauf."],
    ),
    ("punctuation:no_comma", {}, ["a b; c."], ["a, b"]),
]


@pytest.mark.parametrize(("name", "options", "followed", "missed"), TABLE, ids=[row[0] for row in TABLE])
def test_each_check_by_hand(name: str, options: dict[str, Any], followed: list[str], missed: list[str]) -> None:
    assert {text: CHECKS[name](text, **options) for text in followed} == dict.fromkeys(followed, True)
    assert {text: CHECKS[name](text, **options) for text in missed} == dict.fromkeys(missed, False)


def test_every_check_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("no mark", 1),
        ("One. And a rest", 2),
        ('He said "Go!" Then he went.', 2),
        ("Mr. Smith vs. Dr. No, e.g. in film no. 3. Done.", 2),
        ("Wait... what?!", 2),
        ("第一句。第二句！", 2),
        ("Pi is 3.14.", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_words() -> None:
    assert words("It's 3.5, naïve") == ["It", "s", "3", "5", "naïve"]


# ---- the reward

RECORD: dict[str, Any] = {
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
    "kwargs": [{"keywords": None, "num_words": None}, {"keywords": ["cat"], "num_words": None}],
}


def test_all_or_share() -> None:
    def said(text: str, **options: Any) -> float:
        return score(text, None, **RECORD, **options).score

    assert [said(text) for text in ("a cat", "a cat, a dog", "a dog", "a dog, a pig", "", " \n")] == [
        1.0,
        0,
        0,
        0,
        0,
        0,
    ]
    assert [said(text, share=True) for text in ("a cat", "a cat, a dog", "a dog", "a dog, a pig", "")] == [
        1,
        0.5,
        0.5,
        0,
        0,
    ]
    assert score("a dog", None, **RECORD).detail == "missed keywords:existence"


def test_only_the_response_is_judged() -> None:
    assert score("<think>well, no cat</think>a cat", None, **RECORD).score == 1.0
    assert score("<think>a cat</think>a dog", None, **RECORD).score == 0.0
    assert score("<think>well, a cat</think><answer>a cat</answer>", None, **RECORD).score == 1.0
    assert score("<answer>a cat</answer><answer>a cat</answer>", None, **RECORD).score == 0.0
    assert score("<think>a cat", None, **RECORD).score == 0.0


def test_loose_forgives_a_first_line_a_last_line_and_asterisks() -> None:
    record = {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]}
    for text in ('Sure:\n{"a": 1}', '{"a": 1}\nAnything else?', 'Sure:\n{"a": 1}\nBye', '**{"a": 1}**'):
        assert score(text, None, **record).score == 0.0
        assert score(text, None, **record, loose=True).score == 1.0
    assert score('Sure:\nHere:\n{"a": 1}', None, **record, loose=True).score == 0.0
    # Leaving out the only line leaves nothing, and nothing follows no instruction.
    assert score("a, b", None, instruction_id_list=["punctuation:no_comma"], kwargs=[{}], loose=True).score == 0.0


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["punctuation:no_commas"], [{}], "unknown instruction 'punctuation:no_commas'; known are "),
        (["keywords:existence"], [{}], r"takes the options \['keywords'\], got \[\]"),
        (["punctuation:no_comma"], [{"keyword": "a"}], r"takes the options \[\], got \['keyword'\]"),
        (["punctuation:no_comma"], [], "has 1 entries and kwargs 0"),
        ([], [], "has 0 entries and kwargs 0"),
    ],
)
def test_bad_records_are_refused(names: list[str], options: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score("a", None, names, options)
    with pytest.raises(ValueError, match="relation must be 'at least' or 'less than', got 'more than'"):
        CHECKS["length_constraints:number_words"]("a", num_words=1, relation="more than")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["*", "[", "<<", "- ", "a. ", "{", "```", "\n", "p. ", "section", "P.", "******"])
def test_long_odd_texts_do_not_hold_the_checks_up(unit: str) -> None:
    for name, options, _, _ in TABLE:
        CHECKS[name](unit * 20_000, **options)


def test_contract() -> None:
    found = tried("rewards.instruction_following:score", **RECORD, share=True)
    assert all(0.0 <= score <= 1.0 for _, score in found)
