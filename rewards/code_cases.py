"""Tests of a program as data: read from a record, turned into cases for the sandbox, and judged outside of it.

A test is one of

    {"stdin": "3 4\\n", "stdout": "7\\n"}                                   the program is a script
    {"function": "add", "args": [3, 4], "kwargs": {}, "expected": 7}        it defines a function
    {"assert": "assert add(3, 4) == 7"}                                     the same, as it stands in many data sets
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.sandbox import Call, Outcome, Stdin, encode, matches

KEYS = ("stdin", "stdout", "function", "args", "kwargs", "expected", "assert")


@dataclass(frozen=True, slots=True)
class CodeTest:
    """What goes into the sandbox, and what stays outside."""

    case: Stdin | Call
    expected: Any  # a Stdin's output as text; a Call's value, plain data

    def passed(self, outcome: Outcome, *, tolerance: float = 0.0, tuples_as_lists: bool = False) -> bool:
        """Whether the program ended well and gave what was expected.

        Standard output is compared line by line, without white space at the ends of lines and empty lines at the end.
        A returned value must have the type and the value; the options are those of `rewards.sandbox.matches`.
        """
        if outcome.status != "ok":
            return False
        if isinstance(self.case, Stdin):
            return _lines(outcome.stdout) == _lines(self.expected)
        return outcome.result is not None and matches(
            self.expected, outcome.result, tolerance=tolerance, tuples_as_lists=tuples_as_lists
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def read_tests(tests: Any) -> list[CodeTest]:
    """The tests of a record: a list, one test, or JSON text of either.

    Raises:
        ValueError: none, or one that is no test; names its place.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise ValueError(f"tests are no JSON: {error}; give a list of tests or JSON text of one") from error
    if isinstance(tests, Mapping):
        tests = [tests]
    if not isinstance(tests, Sequence) or isinstance(tests, bytes) or not tests:
        raise ValueError(f"tests must be a list of at least one test, got {tests!r:.200}")
    found = []
    for place, test in enumerate(tests):
        try:
            found.append(_read_assert(test) if isinstance(test, str) else _read_test(test))
        except ValueError as error:
            raise ValueError(f"test {place}: {error}") from error
    return found


def _read_test(test: Any) -> CodeTest:
    if not isinstance(test, Mapping):
        raise ValueError(f"must be a mapping, got {test!r:.200}")
    for key in test:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            raise ValueError(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else f"; keys: {KEYS}"))
    # Columnar files fill the keys that other tests have with None.
    given = {key for key in KEYS if test.get(key) is not None}
    if given == {"assert"}:
        return _read_assert(test["assert"])
    if given == {"stdin", "stdout"}:
        if not isinstance(test["stdin"], str) or not isinstance(test["stdout"], str):
            raise ValueError("stdin and stdout must be text")
        return CodeTest(Stdin(test["stdin"]), test["stdout"])
    if "function" in given and given <= {"function", "args", "kwargs", "expected"} and "expected" in test:
        args, kwargs = test.get("args") or [], test.get("kwargs") or {}
        if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
            raise ValueError(f"args must be a list and kwargs a mapping, got {args!r:.100} and {kwargs!r:.100}")
        return _call(str(test["function"]), tuple(args), dict(kwargs), test["expected"])
    raise ValueError(f"must have stdin and stdout, or function, args and expected, or assert; it has {sorted(given)}")


def _read_assert(line: str) -> CodeTest:
    """`assert function(literals) == literal`. As text the expected value would have to enter the sandbox."""
    form = "assert tests must read `assert function(literals) == literal`; give others as function, args, expected"
    try:
        statement = ast.parse(line.strip()).body
    except SyntaxError as error:
        raise ValueError(f"{form}; got {line!r:.200}: {error}") from error
    comparison = statement[0].test if len(statement) == 1 and isinstance(statement[0], ast.Assert) else None
    if not (
        isinstance(comparison, ast.Compare)
        and isinstance(comparison.ops[0], ast.Eq | ast.Is)
        and len(comparison.ops) == 1
        and isinstance(comparison.left, ast.Call)
        and isinstance(comparison.left.func, ast.Name)
    ):
        raise ValueError(f"{form}; got {line!r:.200}")
    call = comparison.left
    try:
        args = tuple(ast.literal_eval(argument) for argument in call.args)
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        expected = ast.literal_eval(comparison.comparators[0])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{form}; got {line!r:.200}: {error}") from error
    return _call(comparison.left.func.id, args, kwargs, expected)


def _call(function: str, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> CodeTest:
    encode([list(args), kwargs, expected])  # says now what cannot be passed
    return CodeTest(Call(function, args, tuple(kwargs.items())), expected)
