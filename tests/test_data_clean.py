"""Duplicates and contamination, by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean import Decontaminator, Deduplicator, chat_key, decontaminate, deduplicate, normalised, words_of
from data.records import Record


def chat(*texts: str, name: str = "c", **others: object) -> Record:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(texts))
    return Record(name, messages, **others)  # type: ignore[arg-type]


def problem(text: str, answer: str | None = None, worked: str | None = None, name: str = "p") -> Record:
    return Record(name, ({"role": "user", "content": text},), answer, worked=worked)


def is_clean(training: Record, evaluation: Record | list[Record], ngram: int = 13) -> bool:
    problems = evaluation if isinstance(evaluation, list) else [evaluation]
    kept, report = decontaminate([training], problems, ngram)
    assert (report.kept, report.dropped) == ((1, 0) if kept else (0, 1))
    return bool(kept)


# --- duplicates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (chat("What is 4-1?", "It is 3."), True),
        (chat("  what\tIS\n4-1? ", "it is  3."), True),  # case and white space
        (chat("What is ４-１?", "It is 3."), True),  # NFKC: full-width digits
        (chat("What is 4-1", "It is 3."), False),  # punctuation counts
        (chat("What is 4+1?", "It is 3."), False),
        (chat("What is 4-1?", "It is 3.", "Sure?", "Yes."), False),  # the whole chat
        (chat("What is 4-1? It is", "3."), False),  # the same words in other messages
        (Record("r", ({"role": "system", "content": "What is 4-1?"}, chat("x", "It is 3.").messages[1])), False),
        (chat("What is 4-1?", "It is 3.", tools=({"name": "add"},)), False),
        (chat("What is 4-1?", "It is 3.", template_kwargs={"thinking": True}), False),
        (chat("What is 4-1?", "It is 3.", answer="3", metadata={"x": 1}), True),  # what is not said does not count
    ],
)
def test_which_chats_are_equal(other: Record, same: bool) -> None:
    assert (chat_key(other) == chat_key(chat("What is 4-1?", "It is 3."))) == same


def test_tool_calls_count() -> None:
    one, two = ({"role": "assistant", "content": "", "tool_calls": [{"name": name}]} for name in ("add", "sub"))
    assert chat_key(Record("a", (one,))) != chat_key(Record("a", (two,)))


def test_chat_keys_are_the_same_in_every_process() -> None:
    assert chat_key(chat("What is 4-1?", "It is 3.")) == 4702522386503153953


def test_deduplicate_keeps_the_first_in_its_place() -> None:
    records = [chat(text, "x", name=str(n)) for n, text in enumerate(["b", "a", "B ", "c", "A", "b"])]
    kept, report = deduplicate(records)
    assert [record.id for record in kept] == ["0", "1", "3"]
    assert (report.kept, report.dropped) == (3, 3)
    assert [(example.id, example.text) for example in report.examples] == [("2", "B "), ("4", "A"), ("5", "b")]
    json.dumps(report.to_dict())


def test_a_report_has_five_examples_of_limited_length() -> None:
    _, report = deduplicate([chat("x" * 1000)] * 20)
    assert (report.dropped, len(report.examples)) == (19, 5)
    assert {len(example.text) for example in report.examples} == {200}


def test_the_judge_of_a_stream_agrees_with_the_list() -> None:
    records = [chat(text, name=str(n)) for n, text in enumerate("abacabadabacaba")]
    judge = Deduplicator()
    kept = list(filter(judge.keeps, iter(records)))
    assert (kept, judge.report()) == deduplicate(records)
    assert [record.id for record in kept] == ["0", "1", "3", "7"]


@given(st.lists(st.text("abAB \n", max_size=3), max_size=30))
@settings(deadline=None)
def test_deduplicate_against_an_oracle(texts: list[str]) -> None:
    firsts: dict[str, int] = {}
    for n, text in enumerate(texts):
        firsts.setdefault(" ".join(text.lower().split()), n)
    kept, _ = deduplicate([chat(text, name=str(n)) for n, text in enumerate(texts)])
    assert [int(record.id) for record in kept] == sorted(firsts.values())


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("E in sleepless?", ["e", "in", "sleepless"]),
        ("4-1=3,3-7=-4", ["4-1=3", "3-7=-4"]),  # signs are no punctuation: 4-1 is not 4+1
        ("(Well-known) “it’s” — so:\n“yes”!", ["well-known", "it", "s", "so", "yes"]),
        ("3 + 5 * x^2", ["3", "+", "5", "*", "x^2"]),
        ("中国的首都？", ["中", "国", "的", "首", "都"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_normalised() -> None:
    assert normalised("  Ｆull　WIDTH\n ﬁne ") == "full width fine"


# --- contamination ----------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"  # 14 words


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (LONG, False),
        (f"Solve this: {LONG.upper()}!!", False),  # case, punctuation, more around it
        (LONG.replace(" ", ",\n"), False),
        (LONG.removeprefix("one "), False),  # 13 words in a row
        (LONG.removeprefix("one two "), True),  # 12
        (LONG.replace("seven", "7"), True),  # no 13 in a row
    ],
)
def test_thirteen_words_in_a_row(text: str, clean: bool) -> None:
    for training in (chat(text, "x"), chat("x", f"As they say: {text}")):  # whoever says it
        assert is_clean(training, problem(LONG)) == clean


def test_runs_do_not_cross_messages() -> None:
    first, second = LONG[:33], LONG[33:]
    assert f"{first}{second}" == LONG
    assert is_clean(chat(first, second), problem(LONG))


@pytest.mark.parametrize(
    ("evaluation", "text", "clean"),
    [
        # As the whole of what the user asks: however short.
        ("e in sleepless?", "e in sleepless?", False),
        ("e in sleepless?", "E in  sleepless", False),
        ("4-1=", "4-1=", False),
        ("4-1=", "4+1=", True),
        ("-4+1=", "4+1=", True),
        ("Hi", "hi!", False),
        # Fewer than four words inside other text are no find.
        ("e in sleepless?", "How many e in sleepless?", True),
        ("4-1=", "What is 4-1= today", True),
        # Four words and more are.
        ("What is 4 - 1?", "Tell me, what is 4 - 1? Quickly!", False),
        ("What is 4 - 1?", "Tell me, what is 4 + 1? Quickly!", True),
        ("What is 4 - 1?", "what is 4", True),
        ("name a red fruit", "Please name a red fruit.", False),
        ("name a fruit", "Please name a fruit.", True),
    ],
)
def test_short_problems(evaluation: str, text: str, clean: bool) -> None:
    assert is_clean(chat(text, "x"), problem(evaluation)) == clean


def test_a_short_problem_is_found_in_any_user_message_and_only_there() -> None:
    assert not is_clean(chat("Hello", "Hello!", "e in sleepless?", "2"), problem("e in sleepless?"))
    assert is_clean(chat("Hello", "e in sleepless?"), problem("e in sleepless?"))


def test_problems_of_several_messages() -> None:
    dialogue = Record("d", chat("Name a fruit", "Apple", "Go on").messages)
    assert not is_clean(chat("name a fruit", "Pear", "go on.", "Plum"), dialogue)  # begins with the same questions
    assert not is_clean(chat("name a fruit", "Pear", "go on.", "Plum", "Thanks", "Yes"), dialogue)
    assert is_clean(chat("Name a tool", "Saw", "Go on", "Axe"), dialogue)  # "Go on" alone is nobody's problem
    assert is_clean(chat("Name a fruit", "Pear"), dialogue)


def test_answers_count_from_ngram_words_on() -> None:
    for evaluation in (problem("Q?", answer=LONG), problem("Q?", worked=LONG), Record("f", chat("Q?", LONG).messages)):
        assert not is_clean(chat("Tell me something", f"Well. {LONG}."), evaluation)
        assert is_clean(chat("Tell me something", LONG[: -len(" thirteen fourteen")]), evaluation)
    assert is_clean(chat("Tell me", "it is in the United States"), problem("Q?", answer="in the United States"))


def test_system_prompts_of_evaluations_do_not_count() -> None:
    evaluation = Record("s", ({"role": "system", "content": LONG}, {"role": "user", "content": "Q?"}))
    assert is_clean(Record("t", ({"role": "system", "content": LONG}, *chat("A?", "b").messages)), evaluation)


def test_ngrams_of_other_lengths() -> None:
    evaluation = problem("one two three four five")
    assert not is_clean(chat("zero one two"), evaluation, ngram=2)
    assert is_clean(chat("two one"), evaluation, ngram=2)
    assert not is_clean(chat("about three"), evaluation, ngram=1)
    assert not is_clean(chat("so two three four five six"), evaluation, ngram=4)
    assert is_clean(chat("so two three four five six"), evaluation, ngram=6)  # now it is a short problem of five words
    assert not is_clean(chat("so one two three four five six"), evaluation, ngram=6)


def test_the_report_says_what_was_found_and_where_it_is_from() -> None:
    problems = [problem("e in sleepless?", name="short"), problem(LONG, name="long")]
    records = [
        chat("fine", "x", name="a"),
        chat(f"so {LONG}", "x", name="b"),
        chat("E in sleepless", "2", name="c"),
    ]
    kept, report = decontaminate(records, problems, 13)
    assert kept == records[:1]
    assert (report.kept, report.dropped) == (1, 2)
    thirteen = LONG.removesuffix(" fourteen")
    assert [(e.id, e.text, e.problem) for e in report.examples] == [
        ("b", thirteen, "long"),
        ("c", "e in sleepless", "short"),
    ]
    judge = Decontaminator(problems, 13)
    assert (list(filter(judge.keeps, records)), judge.report()) == (kept, report)


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=4),
    st.lists(st.sampled_from("abc"), max_size=20),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=300)
def test_decontaminate_against_an_oracle(problems: list[list[str]], words: list[str], ngram: int) -> None:
    def inside(run: list[str]) -> bool:
        return f" {' '.join(run)} " in f" {' '.join(words)} "

    found = False
    for asked in problems:
        runs = [asked[start : start + ngram] for start in range(len(asked) - ngram + 1)]
        found |= (
            any(map(inside, runs)) or (4 <= len(asked) < ngram and inside(asked)) or (bool(asked) and asked == words)
        )
    evaluation = [*(problem(" ".join(asked)) for asked in problems), problem("something else")]
    assert is_clean(chat(" ".join(words)), evaluation, ngram) == (not found)


def test_decontamination_needs_something_to_look_for() -> None:
    with pytest.raises(ValueError, match="at least one evaluation problem"):
        decontaminate([chat("x")], [], 13)
    with pytest.raises(ValueError, match="ngram must be 1 or more words, got 0"):
        decontaminate([chat("x")], [problem("y")], 0)
