"""HumanEval-Mul: HumanEval's functions in several languages, as MultiPL-E (Cassano et al. 2022, arXiv 2208.08227) has them.

DeepSeek-V3's report names eight: Python, Java, C++, C#, JavaScript, TypeScript, PHP and Bash. The five of them that the
sandbox runs are here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from eval.benchmarks.base import Benchmark, Hub, Problem, Row
from eval.benchmarks.humaneval import BENCHMARK as HUMANEVAL
from rewards.program_tests import END, PROGRAM
from rewards.sandbox import get_language

PAIR = """package org.javatuples;

public final class Pair<A, B> {
    private final A first;
    private final B second;

    public Pair(A first, B second) {
        this.first = first;
        this.second = second;
    }

    public static <A, B> Pair<A, B> with(A first, B second) {
        return new Pair<>(first, second);
    }

    public A getValue0() {
        return first;
    }

    public B getValue1() {
        return second;
    }

    @Override
    public boolean equals(Object other) {
        return other instanceof Pair<?, ?> pair
            && java.util.Objects.equals(first, pair.first)
            && java.util.Objects.equals(second, pair.second);
    }

    @Override
    public int hashCode() {
        return java.util.Objects.hash(first, second);
    }

    @Override
    public String toString() {
        return "[" + first + ", " + second + "]";
    }
}
"""  # the part of the package javatuples that the Java problems import and use


@dataclass(frozen=True, slots=True)
class Parts:
    """How a problem is put together for the grader."""

    files: Mapping[str, str]  # see `rewards.program_tests`
    definitions: str = ""


def problem(row: Row) -> Problem:
    """A row of MultiPL-E, or of HumanEval itself, which has the Python problems.

    Raises:
        ValueError: of neither, or a language that is not here.
    """
    if row.get("entry_point") is not None:
        language, parts = "python", _python(row)
    elif {"name", "language", "tests"} <= set(row):
        language = str(_NAMES.get(row["language"], row["language"]))
        if language not in _PARTS:
            raise ValueError(f"the language {row['language']!r} is not one of {', '.join(_NAMES)}")
        parts = _PARTS[language](row)
    else:
        raise ValueError(f"a row of neither nuprl/MultiPL-E nor openai/openai_humaneval: {', '.join(row)}")
    known = get_language(language)
    return Problem(
        prompt=(
            f"Complete this {known.title} program. Answer with {_WHOLE[language]}, in one block that begins with "
            f"```{known.tags[0]}. Leave tests and a main program out.\n\n```{known.tags[0]}\n{row['prompt'].strip()}\n```"
        ),
        question=row["prompt"],
        answer=None,
        metadata={"language": language, "files": parts.files, "definitions": parts.definitions},
        kind=language,
        cluster=_cluster(row.get("name") or row["task_id"]),
        id=f"{language}/{row.get('name') or row['task_id']}",
    )


def _cluster(name: str) -> str:
    """The problem of HumanEval that a translation is of: its languages are no independent observations."""
    found = re.match(r"HumanEval[/_](\d+)", name)
    return f"HumanEval/{found[1]}" if found else name


def _python(row: Row) -> Parts:
    entry = row["entry_point"]
    before = row["prompt"][: row["prompt"].index(f"def {entry}(")]
    return Parts({"program.py": f"{before}\n{PROGRAM}\n\n{row['test']}\n\ncheck({entry})\n{END}\n"})


def _bash(row: Row) -> Parts:
    return Parts({"program.sh": f"{PROGRAM}\n{_after_brace(row)}\n{END}\n"})


def _javascript(row: Row) -> Parts:
    return Parts({"program.js": f"{PROGRAM}\n{row['tests']}\n{END}\n"})


def _cpp(row: Row) -> Parts:
    lines = row["prompt"].split("\n")
    includes = "\n".join(line for line in lines if line.startswith("#include"))
    # Some prompts define a type between includes and description.
    start = next((place for place, line in enumerate(lines) if line.startswith("//")), 0)
    definitions = "\n".join(line for line in lines[:start] if not line.startswith("#include"))
    return Parts({"program.cpp": f"{includes}\n{PROGRAM}\n{_before_braces(_after_brace(row), 1)}"}, definitions)


def _java(row: Row) -> Parts:
    imports = "\n".join(line for line in row["prompt"].split("\n") if line.startswith("import "))
    # A class of its own for the tests: the answer's class is then whole, whatever stands around it.
    main = f"{imports}\nclass Main extends Problem {{\n{_before_braces(_after_brace(row), 2)}"
    return Parts({"Problem.java": f"{imports}\n{PROGRAM}\n", "Main.java": main, "org/javatuples/Pair.java": PAIR})


def _after_brace(row: Row) -> str:
    """The tests without the brace that ends the prompt's function: an answer has its own."""
    before, brace, after = row["tests"].partition("}")
    if before.strip() or not brace:
        raise ValueError(f"the tests do not begin with a closing brace: {row['tests']!r:.80}")
    return str(after)


def _before_braces(tests: str, count: int) -> str:
    """The tests with the place for the grader's last words before the so many last braces, those of main and its class."""
    rest = tests.rstrip()
    for _ in range(count):
        if not rest.endswith("}"):
            raise ValueError(f"the tests do not end with {count} closing braces: {tests!r:.80}")
        rest = rest[:-1].rstrip()
    return f"{rest}\n{END}\n{'}' * count}\n"


_NAMES = {"sh": "bash", "cpp": "cpp", "java": "java", "js": "javascript"}  # MultiPL-E's -> the sandbox's
_PARTS = {"bash": _bash, "cpp": _cpp, "java": _java, "javascript": _javascript}
_WHOLE = {
    "python": "the whole function, and the imports it needs",
    "bash": "the whole function",
    "cpp": "the whole function, and the includes it needs",
    "java": "the whole class Problem, and the imports it needs",
    "javascript": "the whole function",
}

assert HUMANEVAL.hub is not None  # its rows are on the hub
BENCHMARK = Benchmark(
    name="humaneval_mul",
    title="HumanEval-Mul (Pass@1)",
    hub=Hub(
        path="nuprl/MultiPL-E",
        revision="60161426768719d9402e7ce86928a6cb699fdb49",
        split="test",
        configs=tuple(f"humaneval-{name}" for name in _NAMES),
        checked="name and revision as a stored page of the hub shows them, with files in Parquet; not resolved here",
    ),
    more_hubs=(HUMANEVAL.hub,),
    columns=("prompt",),
    problem=problem,
    reward="rewards.program_tests:score",
    metric="pass@1",
    num_samples=1,
    temperature=0.0,
    max_completion_length=2048,
    needs=("sandbox",),
    languages=tuple(_WHOLE),
    published="HumanEval-Mul",
    source="greedy pass@1; languages as DeepSeek-V3's report (arXiv 2412.19437) names them; tests of MultiPL-E and HumanEval",
    departs=(
        "five of the eight languages, without C#, TypeScript and PHP; DeepSeek publishes neither its translations nor its "
        "prompt: the translations are MultiPL-E's, the prompt for chat models is ours"
    ),
)
