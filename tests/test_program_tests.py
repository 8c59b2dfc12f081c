"""Programs in several languages: they compile and run in the sandbox, are contained there, and forged passes fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from benchmark_rows import MULTIPLE, block

from eval.benchmarks.humaneval_mul import problem
from posttrain.types import RewardResult
from rewards import RewardFunction
from rewards.program_tests import END, PROGRAM, score
from rewards.sandbox import (
    LANGUAGES,
    Call,
    Limits,
    Outcome,
    SandboxUnavailableError,
    Stdin,
    close_shared_pools,
    get_language,
    run,
    run_cases,
    shared_pool,
)
from rewards.sandbox.__main__ import HELLO


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_warm() -> Iterator[None]:
    yield
    close_shared_pools()


def missing(language: str) -> str:
    try:
        shared_pool("bubblewrap", language=language)
    except SandboxUnavailableError as error:
        return str(error)
    return ""


def needs(language: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing(language)), reason=missing(language) or "-")


OTHERS = [pytest.param(name, marks=needs(name)) for name in LANGUAGES if name != "python"]
ALL = [pytest.param(name, marks=needs(name)) for name in LANGUAGES]
bash = needs("bash")


def execute(language: str, program: str, **limits: Any) -> Outcome:
    return run(program, limits=Limits(**{"seconds": 10, "cpu_seconds": 5, **limits}), language=language)


# ---- running


REVERSE = {
    "bash": 'read -r word; rev <<< "$word"',
    "cpp": "#include <bits/stdc++.h>\nint main() { std::string w; std::cin >> w; std::reverse(w.begin(), w.end()); "
    "std::cout << w << std::endl; }",
    "java": "class Main { public static void main(String[] words) throws Exception { System.out.println(new StringBuilder("
    "new String(System.in.readAllBytes()).trim()).reverse()); } }",
    "javascript": "console.log([...require('fs').readFileSync(0, 'utf8').trim()].reverse().join(''));",
}


@pytest.mark.parametrize("language", OTHERS)
def test_a_program_reads_input_and_ends_well_or_badly(language: str) -> None:
    with shared_pool("bubblewrap", language=language).sandbox(REVERSE[language], Limits(seconds=20)) as sandbox:
        first, second = sandbox.run(Stdin("abc\n")), sandbox.run(Stdin("xyz\n"))
    assert [(o.status, o.stdout, o.step) for o in (first, second)] == [("ok", "cba\n", "run"), ("ok", "zyx\n", "run")]
    compiled = bool(get_language(language).compile)
    broken = execute(language, "this is (no program\n")
    assert (broken.status, broken.step) == ("crash", "compile" if compiled else "run"), broken
    assert "error" in broken.detail.lower() or not compiled, broken


@pytest.mark.parametrize(
    ("language", "program", "status"),
    [
        pytest.param("bash", "while :; do :; done", "timeout", marks=bash),
        pytest.param("bash", "yes", "output", marks=bash),
        pytest.param("bash", "exit 3", "crash", marks=bash),
        pytest.param("bash", "kill -9 $$", "crash", marks=bash),
        pytest.param("cpp", "int main() { for (volatile long i = 0;; ++i); }", "timeout", marks=needs("cpp")),
        pytest.param(
            "cpp", "#include <vector>\nint main() { std::vector<long> v(1L << 30, 1); }", "crash", marks=needs("cpp")
        ),
        pytest.param("javascript", "for (;;);", "timeout", marks=needs("javascript")),
        pytest.param(
            "javascript", "const a = []; for (;;) a.push(new Array(1e5).fill(a.length));", "crash",
            marks=needs("javascript"),
        ),
        pytest.param(
            "java", "class Main { public static void main(String[] w) { long[] a = new long[1 << 28]; } }", "crash",
            marks=needs("java"),
        ),
    ],
)  # fmt: skip
def test_limits_hold_in_every_language(language: str, program: str, status: str) -> None:
    limits = {"seconds": 3, "cpu_seconds": 1, "memory_bytes": 256 * 2**20, "output_bytes": 100_000}
    outcome = execute(language, program, **limits)
    assert outcome.status == status, outcome
    assert outcome.peak_bytes < 600 * 2**20 and len(outcome.stdout) <= 100_000


ATTACKS = {
    "reads the machine's users": "cat /etc/passwd",
    "reads the supervisor's environment": "tr '\\0' '\\n' < /proc/1/environ",
    "looks into the supervisor": "ls /proc/1/fd /proc/1/task/1/fd",
    "writes into the supervisor's memory": "echo x > /proc/1/mem",
    "kills the supervisor": "kill -9 1; kill -0 1 && false",
    "writes beside /tmp": "for d in / /usr/bin /dev /proc/self /var; do echo x > $d/escape && exit 0; done; false",
    "changes the kernel": "echo 1 > /proc/sys/kernel/ns_last_pid",
    "opens a connection": "exec 9<> /dev/tcp/127.0.0.1/22",
    "makes a namespace": "unshare -U true",
    "mounts": "mount -t tmpfs none /tmp",
    "traces": (
        "python3 -c 'import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); result = libc.ptrace(16, 1, 0, 0)\n"
        "sys.exit(result and os.strerror(ctypes.get_errno()))'"
    ),
    "writes its own memory": "echo x > /proc/self/mem",
}


@bash
@pytest.mark.parametrize("name", ATTACKS)
def test_a_program_with_processes_is_still_contained(name: str) -> None:
    outcome = execute("bash", f"set -e\n{ATTACKS[name]}\necho ESCAPED\n")
    assert "ESCAPED" not in outcome.stdout, outcome
    assert outcome.status == "crash", outcome
    assert re.search("denied|not permitted|No such file|superuser|Read-only", outcome.stderr), outcome


@bash
def test_processes_are_bounded_and_end_with_the_program() -> None:
    bomb = execute("bash", "f() { f | f & }; f; wait", seconds=2, tasks=20)
    assert bomb.status in ("ok", "crash", "timeout")
    left = "(sleep 300 &)\n(setsid sleep 300 &)\necho done"
    assert run_cases(left, [], language="bash") == []
    outcome = execute("bash", left)
    assert (outcome.stdout, outcome.seconds < 5) == ("done\n", True)


@bash
def test_what_other_languages_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="a Call needs a Python program; run one in Bash with Stdin"):
        run_cases("f() { :; }", [Call("f")], language="bash")
    with pytest.raises(ValueError, match="must have a file program.sh; it has other.sh"):
        run({"other.sh": "echo"}, language="bash")
    with pytest.raises(ValueError, match="does not know the language 'javascrip'; did you mean 'javascript'"):
        run("1", language="javascrip")


def test_every_language_has_an_example_for_the_command() -> None:
    assert {*HELLO, "python"} == {*LANGUAGES}


# ---- the verdict


def judge(language: str, program: str, **changes: Any) -> RewardResult:
    found = problem(MULTIPLE[language][0])
    assert found is not None
    return score(block(get_language(language).tags[0], program), None, **{**found.metadata, **changes})


FORGED = {
    ("python", "ends early"): "import os\nprint('ok', flush=True)\nos._exit(0)",
    ("python", "prints its source"): "print(open(__file__).read() if '__file__' in globals() else '')\nraise SystemExit(0)",
    ("python", "calls its end itself"): "import sys\nsys.stdout.write('0' * 32 + '\\n')\nsys.exit()",
    ("bash", "ends early"): "exit 0",
    ("bash", "prints the last word of its source"): 'echo; tail -n 1 "$0" | sed "s/.* //"; exit 0',
    ("bash", "goes on after failures"): "pair() { echo no; }\nset() { :; }",
    ("bash", "answers from a trap"): 'trap \'echo; tail -n 1 "$0" | sed "s/.* //"; exit 0\' EXIT\npair() { echo no; }',
    ("javascript", "ends early"): "process.exit(0)",
    ("javascript", "prints the last word of its source"): (
        "console.log('\\n' + require('fs').readFileSync(__filename, 'utf8').match(/[0-9a-f]{32}/)[0]); process.exit(0)"
    ),
    ("javascript", "switches assertions off"): "require('node:assert').deepEqual = () => {};\nfunction pair() {}",
    ("javascript", "swallows what is thrown"): "process.on('uncaughtException', () => {});\nfunction pair() {}",
    ("cpp", "ends early"): (
        "struct Early { Early() { std::puts(\"ok\"); std::exit(0); } } early;\n"
        "std::tuple<long, long> pair(long a, long b) { return {0, 0}; }"
    ),
    ("cpp", "switches assertions off"): (
        "#undef assert\n#define assert(x)\nstd::tuple<long, long> pair(long a, long b) { return {0, 0}; }"
    ),
    ("java", "ends early"): (
        "class Problem { static { System.exit(0); } public static Pair<Long, Long> pair(long a, long b) { return null; } }"
    ),
    ("java", "switches assertions off"): (
        "class Problem { static { Problem.class.getClassLoader().clearAssertionStatus(); }\n"
        "public static Pair<Long, Long> pair(long a, long b) { return Pair.with(0l, 0l); } }"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "trick"), [pytest.param(*key, marks=needs(key[0]), id="-".join(key)) for key in FORGED]
)
def test_forged_passes_fail(language: str, trick: str) -> None:
    result = judge(language, FORGED[language, trick])
    assert result.score == 0.0 and result.status in ("ok", "crash"), result
    assert "does not compile" not in str(result.detail), result


TAMPERING = [
    ("bash", "prints the last word of its source"),
    ("javascript", "prints the last word of its source"),
    ("javascript", "switches assertions off"),
    ("cpp", "switches assertions off"),
    ("java", "switches assertions off"),
]


@pytest.mark.parametrize(("language", "trick"), [pytest.param(*key, marks=needs(key[0])) for key in TAMPERING])
def test_the_run_with_a_false_assertion_is_what_finds_them(language: str, trick: str) -> None:
    assert "tampers" in str(judge(language, FORGED[language, trick]).detail)


@pytest.mark.parametrize("language", ALL)
def test_a_right_program_may_print(language: str) -> None:
    chatter = {
        "python": "print('hello')\n",
        "bash": "echo hello\n",
        "cpp": "struct Chat { Chat() { std::cout << \"hello\"; } } chat;\n",
        "java": "",
        "javascript": "console.log('hello');\n",
    }[language]  # fmt: skip
    assert judge(language, chatter + MULTIPLE[language][1]).score == 1.0


@bash
def test_how_a_program_failed_is_told() -> None:
    assert judge("bash", "while :; do :; done", seconds_per_test=1, cpu_seconds=1).status == "timeout"
    assert judge("bash", "pair() { return 1; }").status == "crash"
    assert "```bash" in str(score("no program", None, language="bash", files={"program.sh": PROGRAM + END}).detail)
    if not missing("cpp"):
        broken = judge("cpp", "std::tuple<long, long> pair(long a, long b) { return nothing; }")
        assert broken.status == "crash" and "does not compile: program.cpp" in str(broken.detail), broken


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "needs the column `files`"),
        ({"program.sh": PROGRAM}, "must have @@end@@ in one place, not in 0"),
        ({"program.sh": PROGRAM * 2 + END}, "must have @@program@@ in one place, not in 2"),
    ],
)
def test_records_without_tests_are_named(files: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score("```bash\n:\n```", None, language="bash", files=files)


@bash
def test_through_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardFunction("accuracy", "rewards.program_tests:score", kwargs={})
    metadata = problem(MULTIPLE["bash"][0]).metadata  # type: ignore[union-attr]
    assert reward(block("bash", MULTIPLE["bash"][1]), None, metadata).score == 1.0
    close_shared_pools()
    monkeypatch.setattr("rewards.sandbox.launch.find_bubblewrap", lambda: "/bin/false")
    result = reward(block("bash", MULTIPLE["bash"][1]), None, metadata)
    assert (result.score, result.status) == (0.0, "infrastructure")
    close_shared_pools()
