"""Two rows of each benchmark with the columns of its data set, written for these tests, and answers right and wrong."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fixture:
    """Rows, and for each a completion that is right and one that is wrong."""

    rows: list[dict[str, Any]]
    right: list[str]
    wrong: list[str]
    shots: list[dict[str, Any]] | None = None  # rows of the split with worked examples


def box(text: str) -> str:
    return f"<think>Let me see.</think>So it is \\boxed{{{text}}}."


def answer(text: str) -> str:
    return f"<think>Hm.</think><answer>{text}</answer>"


def program(text: str) -> str:
    return f"<think>Easy.</think>Here it is:\n```python\n{text}\n```"


def aime(number: int, problem: str, answer: Any) -> dict[str, Any]:
    return {"id": number, "problem": problem, "solution": "", "answer": answer, "url": "", "year": "2024"}


def gpqa(question: str, right: str, *wrong: str) -> dict[str, Any]:
    row = {"Question": question, "Correct Answer": right, "Record ID": question[:4], "High-level domain": "Physics"}
    return row | {f"Incorrect Answer {place}": text for place, text in enumerate(wrong, start=1)}


def drop(number: int, question: str, *answers: dict[str, Any]) -> dict[str, Any]:
    full = [{"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [], **a} for a in answers]
    return {
        "section_id": "game_1",
        "query_id": f"q{number}",
        "passage": "The Reds kicked field goals of 31 and 48 yards on 3 May 1998. Ada Low and Bo Hill scored.",
        "question": question,
        "answer": {**full[0], "hit_id": "", "worker_id": ""},
        "validated_answers": {
            **{name: [a[name] for a in full[1:]] for name in ("number", "date", "spans")},
            "worker_id": [""] * (len(full) - 1),
            "hit_id": [""] * (len(full) - 1),
        },
    }


def ifeval(key: int, prompt: str, names: list[str], kwargs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"key": key, "prompt": prompt, "instruction_id_list": names, "kwargs": kwargs}


def contest(number: int, starter: str, public: list[Any], hidden: list[Any], name: str | None) -> dict[str, Any]:
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(hidden)))).decode()
    return {
        "question_title": f"problem {number}",
        "question_content": "Add the two numbers.",
        "platform": "leetcode" if name else "atcoder",
        "question_id": f"p{number}",
        "contest_id": "c1",
        "contest_date": "2024-10-05T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed if number else json.dumps(hidden),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def standard(given: str, wanted: str) -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": "stdin"}


def call(given: str, wanted: str) -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": "functional"}


SHOP = "Lin buys 3 bags with 12 pens each and gives 6 pens away. How many pens are left?"
CHECK = """

METADATA = {}


def check(candidate):
    assert candidate(3) == 9
    assert abs(candidate(0.5) - 0.25) < 1e-6
"""
STARTER = "class Solution:\n    def add(self, left: int, right: int) -> int:\n        "


def translated(language: str, number: int, prompt: str, tests: str, stop: str) -> dict[str, Any]:
    return {
        "name": f"HumanEval_{number}_pair",
        "language": language,
        "prompt": prompt,
        "doctests": "transform",
        "original": f"/data/HumanEval_{number}_pair.py",
        "prompt_terminology": "reworded",
        "tests": tests,
        "stop_tokens": [stop],
    }


def block(tag: str, text: str) -> str:
    return f"<think>Easy.</think>Here it is:\n```{tag}\n{text}\n```"


# One problem in each language of HumanEval-Mul: the sum and the difference of two numbers.
MULTIPLE: dict[str, tuple[dict[str, Any], str, str]] = {  # language -> row, a right answer, a wrong one
    "python": (
        {
            "task_id": "HumanEval/900",
            "prompt": 'from typing import Tuple\n\n\ndef pair(a: int, b: int) -> Tuple[int, int]:\n    """Both."""\n',
            "canonical_solution": "    return a + b, a - b\n",
            "test": "\n\ndef check(candidate):\n    assert candidate(3, 1) == (4, 2)\n    assert candidate(0, 5) == (5, -5)\n",
            "entry_point": "pair",
        },
        "from __future__ import annotations\ndef pair(a: int, b: int) -> Tuple[int, int]:\n    return a + b, a - b",
        "def pair(a, b):\n    return a + b, abs(a - b)",
    ),
    "bash": (
        translated(
            "sh",
            900,
            "#!/bin/bash\n# Sum, difference.\n#\n# $1 is an integer\n# $2 is an integer\npair() {\n",
            '}\n\ncandidate() {\n    pair "$@"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate "3" "1") = "4 2" ]]\n'
            '    [[ $(candidate "0" "5") = "5 -5" ]]\n}\n\nrun_test',
            "\n}",
        ),
        'pair() {\n    while read -r sum; do echo "$sum $(($1 - $2))"; done < <(awk "BEGIN { print $1 + $2 }")\n}',
        'pair() {\n    echo "4 2"\n}',
    ),
    "cpp": (
        translated(
            "cpp",
            900,
            "#include<assert.h>\n#include<bits/stdc++.h>\nunion Unused{\n    long whole;\n};\n// Sum, difference.\n"
            "std::tuple<long, long> pair(long a, long b) {\n",
            "}\nint main() {\n    auto candidate = pair;\n    assert(candidate((3), (1)) == (std::make_tuple(4, 2)));\n"
            "    assert(candidate((0), (5)) == (std::make_tuple(5, -5)));\n}\n",
            "\n}",
        ),
        "#include <tuple>\nstd::tuple<long, long> pair(long a, long b) {\n    Unused sum{a + b};\n"
        "    return {sum.whole, a - b};\n}",
        "std::tuple<long, long> pair(long a, long b) {\n    return {4, 2};\n}",
    ),
    "java": (
        translated(
            "java",
            900,
            "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n    // Sum, difference.\n"
            "    public static Pair<Long, Long> pair(long a, long b) {\n",
            "    }\n    public static void main(String[] args) {\n"
            "    assert(pair((3l), (1l)).equals((Pair.with(4l, 2l))));\n"
            "    assert(pair((0l), (5l)).equals((Pair.with(5l, -5l))));\n    }\n\n}\n",
            "\n    }\n",
        ),
        "import java.util.*;\n\npublic class Problem {\n    public static Pair<Long, Long> pair(long a, long b) {\n"
        "        return new Pair<>(a + b, a - b);\n    }\n}",
        "class Problem {\n    public static Pair<Long, Long> pair(long a, long b) {\n        return null;\n    }\n}",
    ),
    "javascript": (
        translated(
            "js",
            900,
            "//Sum, difference.\nfunction pair(a, b){\n",
            "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = pair;\n"
            "  assert.deepEqual(candidate(3, 1),[4, 2]);\n  assert.deepEqual(candidate(0, 5),[5, -5]);\n}\n\ntest();",
            "\nfunction ",
        ),
        "function pair(a, b) {\n  return [a + b, a - b];\n}",
        "const pair = (a, b) => [a + b, b - a];",
    ),
}
TAGS = {"python": "python", "bash": "sh", "cpp": "c++", "java": "java", "javascript": "js"}

FIXTURES: dict[str, Fixture] = {
    "math_500": Fixture(
        [
            {
                "problem": "Simplify $\\frac{6}{8}$.",
                "solution": "Divide both by 2: $\\boxed{\\frac{3}{4}}$.",
                "answer": "\\frac{3}{4}",
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": "test/prealgebra/1.json",
            },
            {
                "problem": "Solve $x^2=2$ for $x>0$.",
                "solution": "",
                "answer": "\\sqrt{2}",
                "subject": "Algebra",
                "level": 2,
                "unique_id": "test/algebra/2.json",
            },
        ],
        [box("0.75"), box("\\sqrt2")],
        [box("\\frac{4}{3}"), box("1.41")],
    ),
    "aime_2024": Fixture(
        [aime(60, "How many primes are below 10?", "004"), aime(61, "What is 10 squared?", "100")],
        [box("4"), box("100")],
        [box("5"), "<think>100"],
    ),
    "aime_2025": Fixture(
        [
            {"problem": "How many primes are below 20?", "answer": "8", "id": "0"},
            {"problem": "What is $11^2$?", "answer": "121", "id": "1"},
        ],
        [box("8"), box("121")],
        [box("9"), box("11^3")],
    ),
    "cnmo_2024": Fixture(
        [
            {"question": "The side of a square of area 3 is", "answer": "$\\sqrt{3}$", "question_type": "fill"},
            {"question": "Half of 9 is", "answer": "$\\frac{9}{2}$", "question_type": "fill"},
        ],
        [box("\\sqrt{3}"), box("4.5")],
        [box("3"), box("5")],
    ),
    "gsm8k": Fixture(
        [
            {"question": SHOP, "answer": "He has 3*12=<<3*12=36>>36 pens.\nThen 36-6=<<36-6=30>>30.\n#### 30"},
            {"question": "A car costs 1,200 and doubles in price. What does it cost?", "answer": "2*1200\n#### 2,400"},
        ],
        [box("30"), "<think>Twice.</think>It costs $2,400."],
        [box("36"), "It costs 1,200."],
        [{"question": "1+1?", "answer": "1+1=2\n#### 2"}],
    ),
    "gpqa_diamond": Fixture(
        [
            gpqa("Which particle is lightest?", "electron", "proton", "neutron", "muon"),
            gpqa("Speed of light?", "3e8 m/s", "3e6 m/s", "3e5 m/s", "340 m/s"),
        ],
        ["{letter}", "{letter}"],
        ["{other}", "I cannot tell A from B."],
    ),
    "mmlu": Fixture(
        [
            {"question": "2+2?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 1},
            {"question": "Sky?", "subject": "astronomy", "choices": ["red", "green", "grey", "blue"], "answer": 3},
        ],
        [box("B"), box("D. blue")],
        [box("A"), box("B or D")],
    ),
    "mmlu_redux": Fixture(
        [
            {
                "question": "Capital of France?",
                "choices": ["Rome", "Paris", "Bonn", "Oslo"],
                "answer": 1,
                "error_type": "ok",
                "source": "",
                "correct_answer": None,
                "potential_reason": None,
            },
            {
                "question": "Which?",
                "choices": ["a", "b", "c", "d"],
                "answer": 0,
                "error_type": "bad_question_clarity",
                "source": "",
                "correct_answer": None,
                "potential_reason": "nobody knows",
            },
        ],
        [box("B")],
        [box("C")],
    ),
    "mmlu_pro": Fixture(
        [
            {
                "question_id": 7,
                "question": "The tenth letter?",
                "options": list("jihgfedcba"),
                "answer": "A",
                "answer_index": 0,
                "cot_content": "",
                "category": "other",
                "src": "test",
            },
            {
                "question_id": 8,
                "question": "The first letter?",
                "options": list("jihgfedcba"),
                "answer": "J",
                "answer_index": 9,
                "cot_content": "",
                "category": "other",
                "src": "test",
            },
        ],
        [box("A"), box("J")],
        [box("B"), box("A")],
    ),
    "ceval": Fixture(
        [
            {
                "id": 0,
                "question": "1+1等于____",
                "A": "1",
                "B": "2",
                "C": "3",
                "D": "4",
                "answer": "B",
                "explanation": "",
            },
            {
                "id": 1,
                "question": "水的化学式是____",
                "A": "H2O",
                "B": "CO2",
                "C": "O2",
                "D": "N2",
                "answer": "A",
                "explanation": "",
            },
        ],
        [box("B"), box("A")],
        [box("D"), "答案是甲"],
    ),
    "drop": Fixture(
        [
            drop(0, "How long was the longest field goal?", {"number": "48"}, {"spans": ["48 yards"]}),
            drop(1, "Who scored?", {"spans": ["Ada Low", "Bo Hill"]}),
        ],
        [answer("48"), answer("Bo Hill | Ada Low")],
        [answer("31"), answer("the Reds")],
        [drop(2, "When was it?", {"date": {"day": "3", "month": "May", "year": "1998"}})] * 3,
    ),
    "ifeval": Fixture(
        [
            ifeval(1, "Describe rain without commas.", ["punctuation:no_comma"], [{"num_words": None}]),
            ifeval(
                2,
                "Name the sea twice, in at most 5 words.",
                ["keywords:frequency", "length_constraints:number_words"],
                [
                    {"keyword": "sea", "frequency": 2, "relation": "at least", "num_words": None},
                    {"keyword": None, "num_words": 6, "relation": "less than"},
                ],
            ),
        ],
        ["Rain is water that falls.", "<think>ok</think>The sea, the sea!"],
        ["Rain, then sun.", "The sea and the sea and the sea again"],
    ),
    "simpleqa": Fixture(
        [
            {"metadata": "{'topic': 'Art'}", "problem": "Who painted the Night Watch?", "answer": "Rembrandt"},
            {"metadata": "{'topic': 'Art'}", "problem": "Who carved David?", "answer": "Michelangelo"},
        ],
        ["It was Rembrandt.", "Michelangelo did."],
        ["It was Vermeer.", "I do not know."],
    ),
    "frames": Fixture(
        [
            {
                "Unnamed: 0": 0,
                "Prompt": "How old was the author of Emma when it came out?",
                "Answer": "40",
                "wiki_link_1": "x",
                "reasoning_types": "Temporal reasoning",
                "wiki_links": "['x']",
            },
            {
                "Unnamed: 0": 1,
                "Prompt": "Which is taller?",
                "Answer": "the tower",
                "wiki_link_1": "x",
                "reasoning_types": "Numerical reasoning",
                "wiki_links": "['x']",
                "documents": ["The tower is 300 m.", "The hall is 20 m."],
            },
        ],
        ["She was 40.", "It is the tower."],
        ["She was 50.", "It is the hall."],
    ),
    "longbench_v2": Fixture(
        [
            {
                "_id": f"a{place}",
                "domain": "Single-Document QA",
                "sub_domain": "Literary",
                "difficulty": "easy",
                "length": "short",
                "question": "Who came first?",
                "choice_A": "Ada",
                "choice_B": "Bo",
                "choice_C": "Cy",
                "choice_D": "Di",
                "answer": letter,
                "context": "Long ago there was a race. " * 20,
            }
            for place, letter in enumerate("CD")
        ],
        [box("C"), box("D")],
        [box("A"), box("(C)")],
    ),
    "humaneval": Fixture(
        [
            {
                "task_id": f"HumanEval/{place}",
                "prompt": 'import math\n\n\ndef square(x):\n    """The square of x.\n    >>> square(3)\n    9\n    """\n',
                "canonical_solution": "    return x * x\n",
                "test": CHECK,
                "entry_point": "square",
            }
            for place in range(2)
        ],
        [program("def square(x):\n    return x * x"), program("def square(x):\n    return math.pow(x, 2)")],
        [program("def square(x):\n    return 2 * x"), program("def cube(x):\n    return x ** 3")],
    ),
    "humaneval_mul": Fixture(
        [row for row, _, _ in MULTIPLE.values()],
        [block(TAGS[language], right) for language, (_, right, _) in MULTIPLE.items()],
        [block(TAGS[language], wrong) for language, (_, _, wrong) in MULTIPLE.items()],
    ),
    "mbpp": Fixture(
        [
            {
                "task_id": 11,
                "text": "Write a function that doubles a number.",
                "code": "def twice(x):\n    return 2 * x",
                "test_list": ["assert twice(2) == 4", "assert twice(-1) == -2", "assert twice(0) == ZERO"],
                "test_setup_code": "ZERO = 0",
                "challenge_test_list": [],
            },
            {
                "task_id": 12,
                "text": "Write a function that returns the set of letters.",
                "code": "def letters(text):\n    return set(text)",
                "test_list": ["assert letters('aab') == {'a', 'b'}"] * 3,
                "test_setup_code": "",
                "challenge_test_list": [],
            },
        ],
        [program("def twice(x):\n    return x + x"), program("def letters(text):\n    return {c for c in text}")],
        [program("def twice(x):\n    return x ** 2"), program("def letters(text):\n    return list(text)")],
    ),
    "livecodebench": Fixture(
        [
            contest(0, "", [standard("1 2\n", "3\n")], [standard("5 -7\n", "-2\n")], None),
            contest(1, STARTER, [call("1\n2", "3")], [call("5\n-7", "-2")], "add"),
        ],
        [
            program("left, right = map(int, input().split())\nprint(left + right)"),
            program(
                "class Solution:\n    def add(self, left: int, right: int) -> List[int]:\n        return left + right"
            ),
        ],
        [program("print(3)"), program("class Solution:\n    def add(self, left, right):\n        return 3")],
    ),
    "reward_bench": Fixture(
        [
            {
                "prompt": "What is 2+2?",
                "chosen": "4",
                "chosen_model": "x",
                "rejected": "5",
                "rejected_model": "y",
                "subset": "math-prm",
                "id": 1,
            },
            {
                "prompt": "Say hello.",
                "chosen": "Hello!",
                "chosen_model": "x",
                "rejected": "No.",
                "rejected_model": "y",
                "subset": "alpacaeval-easy",
                "id": 2,
            },
        ],
        ["{letter}", "{letter}"],
        ["{other}", "Both are fine."],
    ),
    "arena_hard": Fixture(
        [
            {
                "uid": f"u{place}",
                "category": "hard_prompt",
                "cluster": "Poems",
                "prompt": "Write a line about rain.",
                "model": "baseline",
                "messages": [
                    {"role": "user", "content": "Write a line about rain."},
                    {"role": "assistant", "content": content},
                ],
            }
            for place, content in enumerate(["Rain falls.", {"answer": "Rain falls."}])
        ],
        ["A good line: rain writes on the roof.", "good: the roof hums."],
        ["bad", "bad line"],
    ),
    "alpaca_eval": Fixture(
        [
            {
                "instruction": "Name a colour.",
                "output": "A colour is red.",
                "generator": "gpt4_turbo",
                "dataset": "helpful_base",
            },
            {"instruction": "Name a sea.", "output": "The Dead Sea.", "generator": "gpt4_turbo", "dataset": "koala"},
        ],
        ["A good colour is blue.", "good: the North Sea"],
        ["bad colour", "bad sea"],
    ),
}
