"""The sandbox under attack: each attack fails, and leaves neither a process nor a file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sandbox_attacks import ATTACKS, LIBC, SYSTEM_CALLS, THREADS, Attack

from rewards.sandbox import Call, Limits, Mode, Outcome, Pool, SandboxUnavailableError, Stdin, launch
from rewards.sandbox.confine import landlock_version
from rewards.sandbox.seccomp import build_filter
from rewards.sandbox.syscalls import ALWAYS, CHECKED, METADATA, NEWEST, OTHER_PROCESSES, SUBPROCESSES

REPOSITORY = Path(__file__).resolve().parent.parent
SECRET = "sesame-" + uuid.uuid4().hex
QUICK = Limits(seconds=5, cpu_seconds=2, memory_bytes=256 * 2**20, disk_bytes=4 * 2**20, files=200, tasks=20)


def missing(mode: str) -> str:
    """Why a mode cannot be tested here; "" when it can."""
    try:
        launch.command(mode, launch.find_interpreter(), info=0)  # type: ignore[arg-type]
    except SandboxUnavailableError as error:
        return str(error)
    return ""


def needs(mode: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing(mode)), reason=missing(mode) or "-")


MODES = [pytest.param(mode, marks=needs(mode)) for mode in launch.MODES]
bubblewrap = needs("bubblewrap")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process of a test outlives it, wherever it was re-parented to. A secret stands in the environment."""
    monkeypatch.setenv("POSTTRAIN_TEST_SECRET", SECRET)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of all depths become our children
    before = children()
    yield
    # What was killed a moment ago is a zombie until we, its parent now, have asked for its end.
    deadline = time.monotonic() + 5
    while left := children() - before:
        for process in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    assert not left


def children() -> set[psutil.Process]:
    """Every process below this one."""
    return set(psutil.Process().children(recursive=True))


def execute(program: str, mode: Mode = "bubblewrap", limits: Limits = QUICK, stdin: str = "") -> Outcome:
    """Run in a pool of its own, so that nothing is kept warm."""
    pool = Pool(mode, warm=0)
    try:
        with pool.sandbox(program, limits) as sandbox:
            return sandbox.run(Stdin(stdin))
    finally:
        pool.close()


@pytest.fixture
def target() -> Iterator[dict[str, object]]:
    """What attacks aim at: a port and an abstract socket that accept, names, paths. Looks for files afterwards."""
    marker = f"escape-{uuid.uuid4().hex}"
    places = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run", "/usr", "/etc", str(REPOSITORY), str(Path.home())]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{marker}")
        abstract.listen()
        clone = CHECKED["clone"][0 if os.uname().machine == "x86_64" else 1]
        yield {
            "marker": marker, "port": server.getsockname()[1], "repository": REPOSITORY, "home": Path.home(),
            "secret": SECRET, "clone": clone, "threads": THREADS,
        }  # fmt: skip
    assert [path for place in places for path in Path(place).glob(f"{marker}*")] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_stopped(attack: Attack, mode: Mode, target: dict[str, object]) -> None:
    library = next(iter(Path(os.__file__).parent.glob("json/__init__.py"))).read_bytes()
    outcome = execute(attack.program(**target), mode)
    assert outcome.status == "ok", outcome
    assert outcome.stdout.startswith("stopped "), outcome
    assert "SyntaxError" not in outcome.stdout and "NameError" not in outcome.stdout
    assert next(iter(Path(os.__file__).parent.glob("json/__init__.py"))).read_bytes() == library


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.harmless], ids=lambda attack: attack.name)
def test_attack_works_outside(attack: Attack, target: dict[str, object]) -> None:
    environment = {**os.environ, "POSTTRAIN_TEST_SECRET": SECRET}
    done = subprocess.run(
        [sys.executable, "-c", attack.program(**target)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "ESCAPED" in done.stdout, done


@bubblewrap
@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_system_call_is_refused(name: str) -> None:
    number = {**ALWAYS, **CHECKED}[name][0 if os.uname().machine == "x86_64" else 1]
    outcome = execute(f"{LIBC}\nprint(libc.syscall({number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())")
    assert outcome.stdout == f"-1 {errno.EPERM}\n"


@bubblewrap
def test_system_calls_from_the_future_and_the_x32_table_do_not_exist() -> None:
    numbers = [NEWEST + 1, 462, 600, 0x40000000 + 39, 435]
    outcome = execute(f"{LIBC}\nfor n in {numbers}: print(libc.syscall(n, 0, 0), ctypes.get_errno())")
    assert outcome.stdout.splitlines() == [f"-1 {errno.ENOSYS}"] * len(numbers)


# ---- time, memory, output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
        ("import signal\nfor n in (15, 24, 1, 2): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", "timeout"),
        ("9**9**9**9", "timeout"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
        ("print('x' * (1 << 30))", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nfor _ in range(1 << 10): sys.stderr.write('x' * (1 << 20))", "output"),
        ("import os\nwhile True: os.write(3, b'x' * 4096)", "output"),
        ("import sys; sys.setrecursionlimit(10**9)\nexec('def f(): return f() + 1'); f()", "crash"),
        ("f = lambda: f()\nf()", "crash"),
        ("import os; os.abort()", "crash"),
        ("import ctypes; ctypes.string_at(0)", "crash"),
        ("raise SystemExit(3)", "crash"),
        ("def broken(:", "crash"),
        ("(" * 1000, "crash"),
        ("\0", "crash"),
    ],
)
def test_program_that_does_not_end_well(program: str, status: str, mode: Mode) -> None:
    begin = time.monotonic()
    limits = Limits(seconds=1.5, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=100_000)
    outcome = execute(program, mode, limits)
    # Which bound a recursion hits first depends on Python and on the machine.
    accepted = {"crash", "memory", "timeout"} if "recursion" in program else {status}
    assert outcome.status in accepted, outcome
    assert time.monotonic() - begin < 10
    assert len(outcome.stdout) <= 100_000 and len(outcome.stderr) <= 100_000
    assert list(Path("/tmp").glob("core*")) == []


@pytest.mark.parametrize("mode", MODES)
def test_unread_input_and_closed_descriptors(mode: Mode) -> None:
    assert execute("print('done')", mode, stdin="x" * (1 << 22)).stdout == "done\n"
    assert execute("import os; os.closerange(0, 4096)", mode, stdin="x" * (1 << 22)).status in ("ok", "crash")
    assert execute("import sys; print(len(sys.stdin.read()))", mode, stdin="é" * (1 << 20)).stdout == f"{1 << 20}\n"


# ---- processes


@bubblewrap
def test_fork_bomb_is_bounded() -> None:
    limits = Limits(seconds=2, cpu_seconds=1, tasks=20, subprocesses=True)
    begin = time.monotonic()
    seen: list[int] = []
    stop = threading.Event()
    others = children()

    def watch() -> None:
        while not stop.wait(0.05):
            seen.append(len(children() - others))

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = execute("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", limits=limits)
    stop.set()
    watcher.join()
    assert outcome.status == "timeout"
    assert 5 < max(seen) <= 20 + 3  # and bubblewrap, its first process
    assert time.monotonic() - begin < 10


@bubblewrap
def test_daemons_die_with_the_program() -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 100)
        time.sleep(600)
    os._exit(0)
os.wait()
print(len([n for n in range(3, 30) if os.path.exists(f'/tmp/{n}')]))
"""
    begin = time.monotonic()
    outcome = execute(program, limits=Limits(subprocesses=True))
    assert outcome.status == "ok" and time.monotonic() - begin < 5  # the fixture looks for what is left


@bubblewrap
def test_subprocesses_cannot_reach_the_supervisor() -> None:
    program = f"""{LIBC}
for number in (2, 9, 15, 19):
    try:
        os.kill(1, number)
    except PermissionError:
        pass
print(libc.ptrace(16, 1, 0, 0))
"""
    pool = Pool("bubblewrap", warm=0)
    try:
        with pool.sandbox(program, Limits(subprocesses=True)) as sandbox:
            assert [sandbox.run(Stdin()).stdout for _ in range(2)] == ["-1\n"] * 2
    finally:
        pool.close()


@pytest.mark.parametrize("mode", MODES)
def test_runs_do_not_see_each_other(mode: Mode) -> None:
    marker = uuid.uuid4().hex
    program = (
        "import os\nprint(os.listdir('/tmp') if os.access('/tmp', os.R_OK) and os.getcwd() == '/tmp' else [])\n"
        f"try: os.mkdir('/tmp/{marker}'); os.chmod('/tmp/{marker}', 0)\nexcept OSError: pass"
    )
    pool = Pool(mode, warm=0)
    try:
        for _ in range(2):
            with pool.sandbox(program, QUICK) as sandbox:
                assert [sandbox.run(Stdin()).stdout for _ in range(3)] == ["[]\n"] * 3
    finally:
        pool.close()
    assert not Path("/tmp", marker).exists()


@bubblewrap
def test_root_gives_up_root() -> None:
    pool = Pool("bubblewrap", warm=0)
    others = children()
    try:
        with pool.sandbox("import time; time.sleep(60)", Limits(seconds=1)) as sandbox:
            thread = threading.Thread(target=sandbox.run, args=(Stdin(),))
            thread.start()
            time.sleep(0.5)
            users = [process.uids().real for process in children() - others]
            thread.join()
            # bubblewrap, the first process inside, the program: as the machine sees them.
            assert users == [os.getuid() or launch.NOBODY] * 3
    finally:
        pool.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to hand a file to another user")
@needs("landlock")
def test_landlock_mode_cannot_change_metadata(tmp_path: Path) -> None:
    path = Path(f"/var/tmp/{uuid.uuid4().hex}")
    path.write_text("x")
    try:
        os.chown(path, launch.NOBODY, launch.NOBODY)
        os.chmod(path, 0o600)
        outcome = execute(f"import os\nos.chmod({str(path)!r}, 0o777)", "landlock")
        assert "PermissionError" in outcome.stderr and path.stat().st_mode & 0o777 == 0o600
        outcome = execute(f"import os\nos.utime({str(path)!r}, (0, 0))", "landlock")
        assert "PermissionError" in outcome.stderr and path.stat().st_mtime > 1e9
    finally:
        path.unlink()


@bubblewrap
def test_everything_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import threading\nfrom rewards.sandbox import run\nthreading.Thread(target=run, args=('while True: pass',)).start()\n"
        "print('up', flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    deadline = time.monotonic() + 20
    while len(psutil.Process(parent.pid).children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    inside = psutil.Process(parent.pid).children(recursive=True)
    assert len(inside) >= 3
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(inside, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


# ---- the machinery itself


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_in_a_row(mode: Mode) -> None:
    pool = Pool(mode, warm=1)
    try:
        for number in range(100):
            with pool.sandbox("print(int(input()) ** 2)", QUICK) as sandbox:
                outcome = sandbox.run(Stdin(str(number)))
            assert (outcome.status, outcome.stdout) == ("ok", f"{number**2}\n"), outcome
    finally:
        pool.close()
    assert len(os.listdir("/proc/self/fd")) < 200


@pytest.mark.parametrize("mode", MODES)
def test_sandboxes_that_are_still_starting_are_ended_whole(mode: Mode) -> None:
    for milliseconds in range(0, 60, 3):
        pool = Pool(mode, warm=1)
        time.sleep(milliseconds / 1000)
        pool.close()  # the fixture looks for what is left


@bubblewrap
def test_no_more_than_the_workers_run_at_a_time() -> None:
    pool = Pool("bubblewrap", workers=2, warm=0)
    running, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with pool.sandbox("import time; time.sleep(0.5); print(1)", QUICK) as sandbox:
            with lock:
                running += 1
                most = max(most, running)
            assert sandbox.run(Stdin()).stdout == "1\n"
            with lock:
                running -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert most == 2
    with pytest.raises(RuntimeError, match="closed"), pool.sandbox("", QUICK):
        pass


@bubblewrap
def test_same_program_same_output() -> None:
    program = "print({str(n) for n in range(50)}, hash('a'))"
    assert len({execute(program).stdout for _ in range(3)}) == 1


def test_missing_bubblewrap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.find_bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailableError, match="apt-get install bubblewrap"):
        Pool("bubblewrap", python=sys.executable if os.getuid() else "/usr/bin/python3")
    launch.find_bubblewrap.cache_clear()
    with pytest.raises(ValueError, match="bubblewrap, landlock, got 'none'"):
        Pool("none")  # type: ignore[arg-type]


def test_sandbox_that_does_not_start_is_infrastructure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "command", lambda *_, **__: ["/bin/sh", "-c", "echo no namespaces >&2; exit 1"])
    outcome = execute("print(1)")
    assert outcome.status == "infrastructure" and "no namespaces" in outcome.detail


def test_sandbox_lost_under_a_program_is_the_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the supervisor: says that it started the program, then ends."""
    frames = "".join(f"\\000\\000\\000\\{len(text):03o}{text}" for text in ('{"ready": 1}', '{"started": 1}'))
    monkeypatch.setattr(launch, "command", lambda *_, **__: ["/bin/sh", "-c", f"printf '{frames}'; sleep 0.3"])
    pool = Pool("landlock", warm=0)
    try:
        with pool.sandbox("print(1)", QUICK) as sandbox:
            assert [sandbox.run(Stdin()).status for _ in range(2)] == ["crash", "crash"]
    finally:
        pool.close()


def test_limits_are_checked() -> None:
    for bad in ({"seconds": 0}, {"cpu_seconds": 0.5}, {"memory_bytes": 1}, {"tasks": True}, {"seconds": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Limits(**bad)  # type: ignore[arg-type]


@needs("landlock")
def test_landlock_mode_refuses_subprocesses() -> None:
    with pytest.raises(ValueError, match="subprocesses"):
        execute("", "landlock", Limits(subprocesses=True))


@bubblewrap
def test_total_time_over_all_cases() -> None:
    pool = Pool("bubblewrap", warm=0)
    try:
        with pool.sandbox("import time; time.sleep(0.4)", Limits(seconds=1, total_seconds=1)) as sandbox:
            statuses = [sandbox.run(Stdin()).status for _ in range(5)]
    finally:
        pool.close()
    assert statuses[0] == "ok" and statuses[-1] == "timeout"


@bubblewrap
def test_calls_pass_plain_data() -> None:
    pool = Pool("bubblewrap", warm=0)
    try:
        with pool.sandbox("class Solution:\n    def same(self, *a, **k): return a, k", QUICK) as sandbox:
            outcome = sandbox.run(Call("same", (1, "é\ud800", (2.5, None)), (("k", {b"x": {3}}),)))
    finally:
        pool.close()
    from rewards.sandbox import decode

    assert outcome.result is not None
    assert decode(outcome.result) == ((1, "é\ud800", (2.5, None)), {"k": {b"x": {3}}})


def test_system_call_numbers_agree_with_the_headers() -> None:
    headers = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")]
    if not all(header.exists() for header in headers):
        pytest.skip("the kernel's headers (linux-libc-dev) are not installed")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n")
    known = [{name: int(number) for name, number in pattern.findall(header.read_text())} for header in headers]
    for name, numbers in (ALWAYS | CHECKED | METADATA | OTHER_PROCESSES | SUBPROCESSES).items():
        for column, number in enumerate(numbers):
            assert number is None or known[column].get(name, number) == number, name
            assert number is not None or name not in known[column], name


def test_filter_refuses_unknown_machines() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        build_filter("bubblewrap", Limits(), "riscv64")
    assert len(build_filter("landlock", Limits(), "aarch64")) % 8 == 0


def test_landlock_version_is_a_number() -> None:
    assert 0 <= landlock_version() < 100
