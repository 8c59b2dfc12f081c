"""The reward code_tests: extraction, tests as data, right programs pass, forged passes do not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.types import RewardResult
from rewards import RewardFunction
from rewards.code_cases import read_tests
from rewards.code_tests import extract_program, score
from rewards.sandbox import Call, SandboxUnavailableError, close_shared_pools, decode, encode, launch, matches


def missing() -> str:
    try:
        launch.command("bubblewrap", launch.find_interpreter(), info=0)
    except SandboxUnavailableError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_warm() -> Iterator[None]:
    yield
    close_shared_pools()


bubblewrap = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

ADD: list[Any] = [
    {"function": "add", "args": [1, 2], "expected": 3},
    {"function": "add", "args": [-1, 1], "expected": 0},
    {"function": "add", "args": [2, 2], "expected": 4},
    {"function": "add", "args": [10**30, 1], "expected": 10**30 + 1},
]
ECHO = [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "1 1\n", "stdout": "2\n"}]


def answer(program: str) -> str:
    return f"<think>hm ```python\nno\n```</think>\n<answer>Here it is:\n```python\n{program}\n```\n</answer>"


def judge(program: str, tests: Any = ADD, **options: Any) -> RewardResult:
    return score(answer(program), None, tests=tests, **options)


# ---- which text is the program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"),
        ("```python\na\n```\nor\n```py\nb\n```", "b"),
        ("```Python3\na\n```\n```text\nb\n```", "a"),
        ("<think>\n```python\na\n```\n</think>\nnothing", None),
        ("<think>x</think>\n```python\na\nb\n```", "a\nb"),
        ("<answer>\n```python\na\n```\n</answer>", "a"),
        ("```python\na\n```\n<answer>none</answer>", None),
        ("<answer>```python\na\n```</answer><answer>\n```python\nb\n```\n</answer>", None),
        ("```python\nnever closed", None),
        ("```python\na\n```\n```python\nnever closed", "a"),
        ("```\na\n```", None),
        ("```text\n```python\na\n```", None),
        ("```python\n  \n```", None),
        ("a", None),
        ("", None),
    ],
)
def test_program_is_the_last_python_block_of_the_answer(text: str, program: str | None) -> None:
    assert extract_program(text) == program


# ---- tests as data


def test_three_ways_to_write_a_test() -> None:
    asserted = read_tests(["assert add(1, b=-2) == -1", {"assert": "assert f({1}, 'x') is None"}])
    assert asserted[0].case == Call("add", (1,), (("b", -2),)) and asserted[0].expected == -1
    assert asserted[1].expected is None
    assert read_tests(json.dumps(ADD)) == read_tests(ADD)
    filled = {"stdin": None, "stdout": None, "function": "f", "args": [], "kwargs": None, "expected": None}
    assert read_tests([filled])[0].case == Call("f")


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[", "no JSON"),
        ([], "at least one"),
        (7, "at least one"),
        ([3], "test 0: must be a mapping"),
        ([ECHO[0], {"stdin": "a"}], "test 1: must have"),
        ([{"stdin": "a", "stdut": "b"}], "did you mean 'stdout'"),
        ([{"stdin": 1, "stdout": "b"}], "must be text"),
        ([{"function": "f", "args": [1]}], "must have"),
        ([{"function": "f", "args": 1, "expected": 1}], "args must be a list"),
        ([{"function": "f", "args": [object()], "expected": 1}], "cannot be passed"),
        (["assert f(1)"], "must read"),
        (["assert f(x) == 1"], "must read"),
        (["assert f(1) == 1; import os"], "must read"),
        (["assert f(1) > 1"], "must read"),
        (["f(1) == 1"], "must read"),
        (["assert f(1 == 1"], "must read"),
    ],
)
def test_bad_tests_are_named(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_no_tests_at_all() -> None:
    with pytest.raises(ValueError, match="needs the tests"):
        score(answer("x = 1"), None)


# ---- values

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = st.booleans() | st.integers(-3, 3) | st.text(max_size=2) | st.tuples(st.integers(0, 2), st.booleans())
data = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
        | st.frozensets(keys, max_size=3)
        | st.sets(keys, max_size=3)
    ),
    max_leaves=8,
)


def has_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return any(has_nan(item) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(has_nan(item) for item in value)
    return isinstance(value, float) and math.isnan(value)


@settings(max_examples=200, deadline=None)
@given(value=data)
def test_values_survive_the_way_out(value: Any) -> None:
    text = encode(value)
    assert repr(decode(text)) == repr(value) or decode(text) == value
    assert matches(value, text) is not has_nan(value)


PAIRS: list[tuple[Any, Any]] = [
    (1, True), (1, 1.0), (0, False), (0.0, 0), ("1", 1), ("a", b"a"), ([1], (1,)), ({1}, frozenset({1})), ({1}, {True}),
    ({1: 2}, {True: 2}), ({(1,)}, {(True,)}), ([], ()), (None, False), ({}, set()), ([1, 2], [1]), ({"a": 1}, {"a": True}),
    (float("nan"), float("nan")), ([float("nan")], [float("nan")]), (1.0, math.nextafter(1.0, 2)), ("é", "e\u0301"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "returned"), PAIRS)
def test_type_and_value_must_agree(expected: Any, returned: Any) -> None:
    assert not matches(expected, encode(returned))


def test_looser_comparisons_are_asked_for() -> None:
    assert matches([0.3], encode([0.1 + 0.2]), tolerance=1e-9) and not matches([0.3], encode([0.1 + 0.2]))
    assert not matches(3.0, encode(3), tolerance=1.0)
    assert not matches(float("nan"), encode(float("nan")), tolerance=1.0)
    assert matches([[1, 2]], encode([(1, 2)]), tuples_as_lists=True)
    assert not matches((1, 2), encode([1, 2]), tuples_as_lists=True)


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "null", "[]", "{}", '["int"]', '["int",3]', '["int","zz"]', '["int",true]', '["bool",1]', '["list",3]',
        '["list",[3]]', '["set",[["list",[]]]]', '["dict",[[["int","0x3"]]]]', '["object",3]', '["int","0x3"', "NaN",
        '["float","nan"]', "[" * 100_000, "9" * 100_000, '["int","0x3"]\n["int","0x3"]', '["int","' + "f" * 100_000 + '"]',
        '["set",[' + '["int","0x3"],' * 50_000 + '["int","0x3"]]]',
    ],
)  # fmt: skip
def test_malformed_results_match_nothing(text: str) -> None:
    for expected in (3, [3], {3}, {3: 3}, True, None, 0.0):
        assert not matches(expected, text)


# ---- right and wrong programs


@bubblewrap
def test_right_programs_pass() -> None:
    assert judge("def add(a, b):\n    return a + b") == RewardResult(1.0, "ok", "4 of 4 tests")
    assert judge("print(sum(map(int, input().split())))", ECHO).score == 1.0
    assert judge("class Solution:\n    def add(self, a, b):\n        return a + b").score == 1.0
    assert score(answer("def add(a, b): return a + b"), json.dumps(ADD)).score == 1.0
    assert judge("def add(a, b): return a + b", ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]).score == 1.0
    assert judge("def pair(a): return a, [a]", [{"function": "pair", "args": [1], "expected": (1, [1])}]).score == 1.0
    assert (
        judge("if __name__ == '__main__':\n    print('7  ', end='\\n\\n')", [{"stdin": "", "stdout": "7"}]).score == 1.0
    )


@bubblewrap
def test_a_hundred_right_ones_in_a_row() -> None:
    for number in range(100):
        assert judge(f"def add(a, b): return a + b  # {number}").score == 1.0


@bubblewrap
def test_wrong_programs_fail_with_a_reason() -> None:
    wrong = judge("def add(a, b): return abs(a) + abs(b)")
    assert (wrong.score, wrong.status) == (0.0, "ok") and "test 1 expected 0, got" in wrong.detail
    assert judge("def add(a, b): return abs(a) + abs(b)", partial_credit=True).score == 0.75
    assert judge("def ad(a, b): return a + b").status == "crash"
    late = judge("while True: pass", seconds_per_test=0.5)
    assert (late.score, late.status) == (0.0, "timeout")
    assert judge("x = bytearray(1 << 40)").status == "crash"
    assert judge("print(8)", ECHO).score == 0.0
    assert score("no code", None, tests=ADD) == RewardResult(
        0.0, "ok", "no single final answer with a closed ```python block"
    )


@bubblewrap
def test_partial_credit_goes_on_after_a_crash() -> None:
    program = (
        "def add(a, b):\n    if a < 0: raise ValueError\n    if a == 2: __import__('os')._exit(0)\n    return a + b"
    )
    result = judge(program, partial_credit=True)
    assert (result.score, result.status) == (0.5, "crash")
    assert judge(program).score == 0.0


# ---- forged passes

FORGED = {
    "exit code 0": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit in the call": "def add(a, b): raise SystemExit(0)",
    "_exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "a verdict on stdout": "print('PASS\\n1.0\\n{\"score\": 1.0}\\nall tests passed')\ndef add(a, b): return None",
    "equal to everything": "class E:\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\ndef add(a, b): return E()",
    "an int that is equal to everything": (
        "class E(int):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 0\n"
        "def add(a, b): return E(5)"
    ),
    "a str that claims to be an int": (
        "class E(str):\n    __class__ = int\n    __eq__ = lambda s, o: True\ndef add(a, b): return E('3')"
    ),
    "patched builtins": (
        "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.len = lambda x: 0\nbuiltins.hex = lambda x: 'nan'\n"
        "builtins.isinstance = lambda *a: True\ndef add(a, b): return 5.5"
    ),
    "patched json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef add(a, b): return None",
    "patched encoder": (
        "import sys\nvalues = sys.modules['values']\n"
        'values.encode = lambda value: \'["int","0x3"] or ["bool",true]\'\ndef add(a, b): return 0'
    ),
    "patched stdout": (
        "import sys\nclass Out:\n    closed = False\n    def write(self, text): return len(text)\n"
        "    def flush(self): pass\nsys.stdout = Out()\ndef add(a, b): print('3'); return None"
    ),
    "a result of its own": (
        'import os\nos.write(3, b\'["bool",true]\')\nos.write(3, b\'{"score": 1.0, "status": "ok"}\')\nos._exit(0)'
    ),
    "a report of its own": (
        'import os, struct\nbody = b\'{"exit_code": 0, "ended": "", "sizes": [0, 0, 13]}\'\n'
        "for fd in range(256):\n    try: os.write(fd, struct.pack('>I', len(body)) + body)\n    except OSError: pass\n"
        "os._exit(0)"
    ),
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise ValueError",
    "a thread that ends it": (
        "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\n"
        "def add(a, b): time.sleep(1); return 0"
    ),
    "a huge int": "def add(a, b): return 1 << 3_000_000",
    "nan": "def add(a, b): return float('nan')",
    "infinity": "def add(a, b): return float('inf')",
    "a bool": "def add(a, b): return True",
    "a float": "def add(a, b): return float(a + b)",
    "text": "def add(a, b): return str(a + b)",
    "all answers at once": "def add(a, b): return [3, 0, 4]",
    "a deep list": "def add(a, b):\n    x = []\n    for _ in range(5000): x = [x]\n    return x",
    "a list that holds itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "a generator": "def add(a, b): yield a + b",
    "the expected value from the frames": (
        "import sys, gc\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
        "        for name, value in {**frame.f_locals, **frame.f_globals}.items():\n"
        "            if name in ('expected', 'answer', 'tests'): return value\n        frame = frame.f_back\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and 'expected' in thing: return thing['expected']\n    return None"
    ),
}


@bubblewrap
@pytest.mark.parametrize("name", FORGED)
def test_forged_passes_fail(name: str) -> None:
    result = judge(FORGED[name], partial_credit=True)
    assert result.score == 0.0, result
    assert result.status in ("ok", "crash", "timeout")  # never "infrastructure": being masked would pay


@bubblewrap
def test_forged_output_fails_too() -> None:
    for program in (
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "print('7\\n2')",
        "print('PASS')",
        "print(open(0).read())",
    ):
        assert judge(program, ECHO, partial_credit=True).score == 0.0
    # The right output does not save a program that then fails.
    assert judge("print(sum(map(int, input().split()))); raise ValueError", ECHO).status == "crash"


@bubblewrap
def test_nan_is_never_right() -> None:
    tests = [{"function": "f", "args": [], "expected": float("nan")}]
    assert judge("def f(): return float('nan')", tests).score == 0.0


# ---- as a reward


@bubblewrap
def test_through_the_door() -> None:
    reward = RewardFunction(
        "code", "rewards.code_tests:score", kwargs={"partial_credit": True, "seconds_per_test": 5.0}
    )
    program = "def add(a, b): return 3"
    result = reward(answer(program), None, {"tests": json.dumps(ADD), "finish_reason": "stop", "task": "x"})
    assert result.score == 0.25


def test_a_sandbox_that_does_not_start_says_nothing_of_the_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards import code_tests
    from rewards.sandbox import Pool

    monkeypatch.setattr(launch, "command", lambda *_, **__: ["/bin/sh", "-c", "echo denied >&2; exit 1"])
    pool = Pool("landlock", warm=0)
    monkeypatch.setattr(code_tests, "shared_pool", lambda *_: pool)
    result = judge("def add(a, b): return a + b")
    pool.close()
    assert (result.score, result.status) == (0.0, "infrastructure") and "denied" in result.detail


def test_code_around_the_program_is_put_in_order() -> None:
    from rewards.code_tests import assemble

    assert assemble("", "x = 1", "") == "x = 1"
    whole = assemble("import math", "from __future__ import annotations\nx = math.pi", "def check():\n    return x")
    assert whole.splitlines()[0] == "from __future__ import annotations"
    names: dict[str, object] = {}
    exec(whole, names)
    assert names["check"]() > 3  # type: ignore[operator]
