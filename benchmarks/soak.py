"""Hours of faults: GRPO on the tiny task, a process of it killed about every minute, beside a calm run of the same recipe.

    python benchmarks/soak.py [--model CHECKPOINT] [--hours 2] [--steps 400] [--directory runs/soak] [--write FILE]

A calm run with one sampler comes first, unless it is there. Then the same recipe runs with two samplers under
`--max-restarts`, round after round until the time is up, and the last round is let finish. A fault kills with SIGKILL: driver,
learner, a sampler, a reward's actor or the raylet, whichever comes next of a shuffled row of all of them. It comes 30 to 90
seconds after the one before, or as soon as the run is further than it was then, if that takes longer. Every round must end
with the calm run's weights to the bit, its completions and its accuracy.

Meanwhile the memory of all processes is read every 5 seconds. What counts is read while the run is at work: all of its
processes are there, and it has made three steps with just these. Two slopes are fitted: of the sum, over all of the hours,
and of each process that was at work for a minute and more, of which the mean is given. At the end nothing of the run may be
alive, and nothing left in /dev/shm.

Ended rounds with their faults, and readings of memory, are appended to files in --directory, and what is there counts: a soak
that was stopped goes on, without the round that it was in. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.faults import PROCESSES, Run, calm_run, compare, note_replacements, seconds, strike  # noqa: E402

KINDS = ("driver", "learner", "sampler", "reward", "raylet")
ROLES = {"driver", "learner", "sampler", "reward", "raylet"}
INTERVAL = 5.0
RECIPE = """
stage: grpo
max_steps: STEPS
model: {model_name_or_path: MODEL}
datasets: [{task: letter_counting, levels: [2, 3], size: 8000}]
rewards:
  - {func: "rewards.task_answer:score", name: accuracy}
  - {func: "rewards.format:score", name: format, weight: 0.1}
rollout: {num_prompts: 16, num_generations: 8, max_completion_length: 48, request_seeds: true}
algorithm: {num_minibatches: 2, beta: 0.0}
optimizer: {learning_rate: 1.0e-4, adam_beta2: 0.99}
sampler: {num_workers: 2, num_threads: 1, max_restarts: 1000000, start_timeout_seconds: 600}
learner: {num_threads: 1}
checkpoint: {save_steps: 5}
eval:
  datasets: [{task: letter_counting, levels: [2, 3], size: 400}]
  max_completion_length: 48
  greedy: false
"""


class Memory:
    """Resident memory of the run's processes while it is at work, read in a thread."""

    def __init__(self, path: Path) -> None:
        self.run: Run | None = None
        self._path = path
        # seconds, process -> (what it is, bytes)
        self.readings: list[tuple[float, dict[str, tuple[str, int]]]] = read_lines(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        since = 0
        together: set[int] = set()
        while not self._stop.wait(INTERVAL):
            if self.run is None:
                continue
            found = read_processes(self.run)
            kinds = [kind for kind, _ in found.values()]
            here = {number for number, (kind, _) in found.items() if kind in ROLES}
            if here != together:
                together, since = here, self.run.progress()
            if kinds.count("sampler") == 2 and not ROLES - set(kinds) and self.run.progress() >= since + 3:
                reading = (time.time(), {str(number): value for number, value in found.items()})
                self.readings.append(reading)
                append(self._path, reading)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def slopes(self) -> dict[str, Any]:
        """MiB an hour: of the sum, with its standard error, and of each kind of process."""
        whole = [(at, sum(size for _, size in found.values())) for at, found in self.readings]
        of: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        for at, found in self.readings:
            for number, (kind, size) in found.items():
                of[number, kind].append((at, size))
        each: dict[str, list[float]] = defaultdict(list)
        for (_, kind), values in of.items():
            if len(values) > 60 / INTERVAL:
                each[kind].append(slope(values)[0])
        return {
            "whole": slope(whole) if len(whole) > 2 else None,
            "whole_mib": statistics.fmean(size for _, size in whole) / 2**20 if whole else None,
            "first_and_last_mib": [
                statistics.fmean(size for _, size in part) / 2**20 for part in (whole[:60], whole[-60:])
            ]
            if whole
            else None,
            "readings": len(whole),
            "each": {kind: [statistics.fmean(values), len(values)] for kind, values in sorted(each.items())},
        }


def read_processes(run: Run) -> dict[int, tuple[str, int]]:
    """Process -> what it is, and its resident bytes."""
    found = {}
    for process in run.processes(""):
        try:
            found[process.pid] = (kind_of(process), process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return found


def kind_of(process: psutil.Process) -> str:
    words = process.cmdline() or [""]
    for kind in ("sampler", "learner", "reward"):
        if PROCESSES[kind] in words[0]:
            return kind
    if any(word.startswith("posttrain.") for word in words):
        return "supervisor" if "--max-restarts" in words else "driver"
    return next((name for name in ("raylet", "gcs_server", "EngineCore") if name in words[0]), "other")


def slope(points: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Of a line through (seconds, bytes) by least squares, in MiB an hour, and its standard error."""
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points) / max(1, len(points) - 2)
    unit = 3600 / 2**20
    return found * unit, (rest / spread) ** 0.5 * unit


def soak_round(run: Run, row: list[str], rng: random.Random, end: float, keep: Any) -> None:
    """Faults until the time is up or the run is over; the row of what comes next goes on in the next round."""
    last = time.monotonic()
    while True:
        wait = last + rng.uniform(30, 90)
        while time.monotonic() < min(wait, end) and run.process.poll() is None:
            time.sleep(0.2)
        if time.monotonic() >= end or run.process.poll() is not None:
            return
        if not row:
            row += rng.sample(KINDS, len(KINDS))
        # It may be starting just now: then as soon as it is there.
        last = time.monotonic()
        while (found := strike(run, row[-1], rng)) is None and run.process.poll() is None:
            time.sleep(0.5)
            last = time.monotonic()
        if found is not None:
            row.pop()
            keep(found)


def append(path: Path, row: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def accuracy(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "summary.json").read_text())["eval"]["after"]["pass_at_1"]
    return found


def share(value: dict[str, float]) -> str:
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def table(rounds: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]], whole: dict[str, Any]) -> str:
    text = "| killed | n | detected, s | recovered, s | replaced, s |\n|---|---|---|---|---|\n"
    for kind in KINDS:
        of = [fault for fault in faults if fault["fault"] == kind]
        cells = [seconds(of, key) for key in ("detected", "recovered", "replaced")]
        text += f"| {kind} | {len(of)} | {' | '.join(cells)} |\n"
    text += "\n| run | minutes | faults | identical | lost | twice | pass@1 |\n|---|---|---|---|---|---|---|\n"
    for number, row in enumerate(rounds, 1):
        cells = [
            f"round {number}", f"{row['minutes']:.0f}", row["faults"], "yes" if row["identical"] else "no", row["lost"],
            row["twice"], share(row["accuracy"]),
        ]  # fmt: skip
        text += f"| {' | '.join(map(str, cells))} |\n"
    text += f"| calm | - | 0 | - | - | - | {share(whole['calm'])} |\n"
    if whole["memory"]["whole"]:
        rate, error = whole["memory"]["whole"]
        each = ", ".join(f"{kind} {mean:+.0f} (n {n})" for kind, (mean, n) in whole["memory"]["each"].items())
        text += (
            f"\nMemory: {whole['memory']['whole_mib']:,.0f} MiB in all, slope {rate:+.0f} MiB an hour (standard error "
            f"{error:.0f}, {whole['memory']['readings']} readings); of single processes, MiB an hour: {each}.\n"
        )
    return text + (
        f"\nAlive 60 s after the end: {whole['orphans']}. Left in /dev/shm: {len(whole['left_in_shared_memory'])}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/sft/checkpoints/latest")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=400, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"))
    parser.add_argument("--write", type=Path, help="put the table into this file, between its marks for the soak")
    parser.add_argument("--calm-only", action="store_true", help="the run without faults, and no more")
    parser.add_argument("--calm-later", action="store_true", help="faults first, the run without after them")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").exists():
        parser.error(f"{options.model} is no checkpoint; run `make quickstart` first, or give --model")
    home = options.directory.resolve()
    home.mkdir(parents=True, exist_ok=True)
    settings = RECIPE.replace("STEPS", str(options.steps)).replace("MODEL", str(Path(options.model).resolve()))
    (home / "grpo.yaml").write_text(settings)
    if not options.calm_later or options.calm_only:
        calm_run(home, "grpo")
    if options.calm_only:
        return 0
    results = home / "soak.jsonl"
    ended = read_lines(results)
    coming: list[str] = []
    before, memory = shared_memory(), Memory(home / "memory.jsonl")
    while (left := options.hours * 3600 - 60 * sum(row["minutes"] for row in ended)) > 0:
        began = time.monotonic()
        struck: list[dict[str, Any]] = []
        out = home / f"round-{int(time.time())}"
        run = memory.run = Run("grpo", home, out, "--max-restarts", "1000000")

        def keep(fault: dict[str, Any], struck: list[dict[str, Any]] = struck) -> None:
            struck.append(fault)
            print(json.dumps(fault), flush=True)

        soak_round(run, coming, random.Random(f"{options.seed}/{len(ended)}"), began + left, keep)
        run.finish()
        note_replacements(run, struck)
        row = {"round": out.name, "minutes": (time.monotonic() - began) / 60, "faults": struck}
        ended.append(row | {"orphans": len(run.processes(""))})
        append(results, ended[-1])
    memory.close()
    calm, _ = calm_run(home, "grpo")
    faults = [fault for row in ended for fault in row["faults"]]
    rounds = [
        {
            **compare("grpo", home / row["round"], calm),
            "minutes": row["minutes"],
            "faults": len(row["faults"]),
            "accuracy": accuracy(home / row["round"]),
        }
        for row in ended
    ]
    whole = {
        "rounds": rounds,
        "calm": accuracy(calm),
        "memory": memory.slopes(),
        "orphans": sum(row["orphans"] for row in ended),
        "left_in_shared_memory": sorted(shared_memory() - before),
        "hours": sum(row["minutes"] for row in ended) / 60,
    }
    text = table(rounds, faults, whole)
    print(text)
    if options.write:
        head, mark, rest = options.write.read_text().partition("<!-- soak -->\n")
        tail = rest.partition("<!-- end of soak -->\n")[2]
        options.write.write_text(f"{head}{mark}\n{text}\n<!-- end of soak -->\n{tail}")
    print(json.dumps(whole))
    return 0


if __name__ == "__main__":
    sys.exit(main())
