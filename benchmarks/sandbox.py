"""Latency and throughput of sandboxed programs, cold and warm, in both modes, beside a bare interpreter.

    python benchmarks/sandbox.py [--quick] [--workers 2]

Cold: a sandbox is started when the program arrives. Warm: one stands ready; the pause before each program leaves time
to start the next. Full load: as many threads as workers hand in programs without a pause. Per case: one program, many
tests, in one sandbox. The program adds two numbers that it reads; in other languages it is compiled for each run, cold.

The last line is one JSON object: {mode: {"cold_p50_ms", "cold_p99_ms", "warm_p50_ms", "warm_p99_ms", "runs_per_second",
"cases_per_second"}, "bare": {"p50_ms", "p99_ms"}, "languages": {name: p50 ms}}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

# ruff: noqa: E402  # a file beside this one would hide the package `rewards`
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rewards.sandbox import Limits, Pool, SandboxUnavailableError, Stdin, launch

PROGRAM = "print(sum(map(int, input().split())))"
PROGRAMS = {
    "python": PROGRAM,
    "bash": "read a b; echo $((a + b))",
    "cpp": "#include <bits/stdc++.h>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
    "java": (
        "import java.util.*;\nclass Main { public static void main(String[] words) { Scanner in = new Scanner(System.in);\n"
        "System.out.println(in.nextLong() + in.nextLong()); } }"
    ),
    "javascript": (
        "console.log(require('fs').readFileSync(0, 'utf8').trim().split(' ').map(Number).reduce((a, b) => a + b))"
    ),
}
CASES_PER_PROGRAM = 20


def run_once(pool: Pool, cases: int = 1, program: str = PROGRAM) -> None:
    """One program with its cases, checked."""
    with pool.sandbox(program, Limits(memory_bytes=2**30)) as sandbox:
        for number in range(cases):
            outcome = sandbox.run(Stdin(f"{number} 1"))
            if (outcome.status, outcome.stdout) != ("ok", f"{number + 1}\n"):
                raise RuntimeError(f"the program gave {outcome}")


def run_bare(executable: str) -> None:
    """The same program in an interpreter without any sandbox."""
    command = [executable, *launch.PYTHON_FLAGS, "-c", PROGRAM]
    subprocess.run(command, input=b"1 2", capture_output=True, check=True)


def latencies(work: Callable[[], None], count: int, pause: float) -> list[float]:
    """[count] milliseconds of calls one after the other, with a pause (seconds) before each that is not counted."""
    found = []
    for _ in range(count):
        time.sleep(pause)
        begin = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begin))
    return found


def rate(pool: Pool, programs: int, workers: int, cases: int) -> float:
    """Cases per second with every worker busy."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda _: run_once(pool, cases), range(programs)))
    return programs * cases / (time.perf_counter() - begin)


def measure(mode: launch.Mode, count: int, workers: int) -> dict[str, float]:
    """All figures of one mode."""
    figures = {}
    for name, warm in (("cold", 0), ("warm", workers)):
        pool = Pool(mode, workers=workers, warm=warm)
        try:
            run_once(pool)
            found = latencies(lambda pool=pool: run_once(pool), count, 0.15 if warm else 0.0)  # type: ignore[misc]
            figures[f"{name}_p50_ms"] = statistics.median(found)
            figures[f"{name}_p99_ms"] = statistics.quantiles(found, n=100)[98]
            if warm:
                figures["runs_per_second"] = rate(pool, count, workers, cases=1)
                figures["cases_per_second"] = rate(pool, max(4, count // 10), workers, CASES_PER_PROGRAM)
        finally:
            pool.close()
    return {name: round(value, 1) for name, value in figures.items()}


def measure_language(name: str, count: int) -> float:
    """Milliseconds to start a sandbox, compile and run, the median."""
    pool = Pool("bubblewrap", warm=0, language=name)
    try:
        return round(statistics.median(latencies(lambda: run_once(pool, program=PROGRAMS[name]), count, 0.0)), 1)
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 runs instead of 500")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    count = 50 if options.quick else 500
    bare = latencies(lambda: run_bare(launch.find_interpreter().executable), count, 0.0)
    results: dict[str, dict[str, float]] = {}
    for mode in launch.MODES:
        try:
            results[mode] = measure(mode, count, options.workers)  # type: ignore[arg-type]
        except SandboxUnavailableError as error:
            print(f"{mode}: not measured: {error}")
    languages: dict[str, float] = {}
    for name in PROGRAMS:
        try:
            languages[name] = measure_language(name, max(10, count // 25))
        except SandboxUnavailableError as error:
            print(f"{name}: not measured: {error}")
    table = Table(title=f"{count} runs each, {options.workers} workers, load {os.getloadavg()[0]:.1f} at the end")
    for column in ("", "cold p50 ms", "p99", "warm p50 ms", "p99", "runs/s", f"tests/s, {CASES_PER_PROGRAM} a program"):
        table.add_column(column, justify="left" if not column else "right")
    plain = (statistics.median(bare), statistics.quantiles(bare, n=100)[98])
    table.add_row("no sandbox", f"{plain[0]:.1f}", f"{plain[1]:.1f}", "", "", "", "")
    for name, figures in results.items():
        table.add_row(name, *(f"{value:.1f}" for value in figures.values()))
    Console().print(table)
    print("cold, p50 ms by language:", ", ".join(f"{name} {value:.0f}" for name, value in languages.items()))
    bare_figures = {"p50_ms": round(plain[0], 1), "p99_ms": round(plain[1], 1)}
    print(json.dumps({**results, "bare": bare_figures, "languages": languages}))


if __name__ == "__main__":
    main()
