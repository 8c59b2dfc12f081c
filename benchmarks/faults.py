"""What a run loses when its parts are killed: real runs of each stage, faults at random moments, compared with a calm run.

    python benchmarks/faults.py [--tries 5] [--stages sft grpo ...] [--faults driver sampler ...] [--quick]

Of each stage a calm run comes first. A try is a run under `--max-restarts` with the faults of one chain, each at a random
moment after the one before: those that the run survives (a sampler killed, stopped or slowed down to a tenth; a reward's actor
killed), and those that end it (driver, learner, raylet). The chains draw from --seed and the try's number. Policies are tiny.

    detected     from the fault until the run says so
    recovered    until the run is further than it was
    replaced     until the new sampler serves, its weights proved
    lost, twice  steps (SFT, reward model), completions and steps (GRPO), answers (distillation) that are missing, or too many
    identical    final weights to the bit (distillation: the dataset), and all data, equal to the calm run's

Results are kept in --directory, and what is there is not run again: a benchmark that was stopped goes on. The table of all of
them is written to --write. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
REWARD = (
    "def score(completion, answer, **metadata):\n    return (len(completion) * 7 + completion.count('e')) % 5 / 5\n"
)
BUILD = "{hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 2}"
SAMPLER = "{num_workers: 2, max_model_len: 192, num_threads: 1, timeout_seconds: 30, max_restarts: 20, slow_factor: 5}"
GRPO = f"""
max_steps: 36
model: {{model_name_or_path: HOME/policy/checkpoints/latest}}
datasets: [{{task: letter_counting, levels: [1], size: 400}}]
rewards: [{{func: "HOME/reward.py:score", name: accuracy}}]
rollout: {{num_prompts: 8, num_generations: 8, max_completion_length: 96, request_seeds: true}}
algorithm: {{num_minibatches: 2, beta: 0.0}}
optimizer: {{learning_rate: 1.0e-3}}
sampler: {SAMPLER}
parity: {{canary_length: 32}}
learner: {{row_length: 192, max_tokens_per_microbatch: 1536, num_threads: 1}}
checkpoint: {{save_steps: 2}}
"""
RECIPES = {
    "sft": f"""
model: {{build: {BUILD}}}
datasets: [{{task: letter_counting, levels: [1], size: 400, worked_fraction: 0.5}}]
training: {{max_length: 128, per_device_train_batch_size: 4, max_steps: 240, logging_steps: 1}}
optimizer: {{learning_rate: 2.0e-3}}
checkpoint: {{save_steps: 10}}
""",
    "reward_model": """
model: {model_name_or_path: HOME/policy/checkpoints/latest}
datasets: [{task: letter_counting, levels: [1], size: 400}]
training: {max_length: 96, max_steps: 180, per_device_train_batch_size: 4, logging_steps: 1}
validation: {datasets: [{task: letter_counting, levels: [1], size: 40}], eval_steps: 180}
optimizer: {learning_rate: 2.0e-3}
checkpoint: {save_steps: 10}
""",
    "grpo": GRPO,
    # Weights, experts and optimizer in parts, of which each rank writes and reads its own.
    "grpo-spread": GRPO.replace("learner: {", "learner: {num_workers: 2, parallel: fsdp, expert_parallel_size: 2, "),
    "distill": f"""
teacher: {{model: {{model_name_or_path: HOME/policy/checkpoints/latest}}}}
datasets: [{{task: letter_counting, levels: [1, 2, 3], size: 1000}}]
generation: {{num_generations: 4, max_completion_length: 96}}
rewards: [{{func: "HOME/reward.py:score", name: accuracy}}]
selection: {{pick: all}}
sampler: {SAMPLER.replace("num_threads: 1", "num_threads: 1, max_num_seqs: 16")}
""",
}
CHAINS = {
    "sft": [["driver"] * 5],
    "reward_model": [["driver"] * 5],
    "grpo": [["sampler"] * 4 + ["reward"] * 4, ["driver"] * 4 + ["learner"] * 4 + ["raylet"] * 4, ["hang", "slow"]],
    "grpo-spread": [["driver"] * 4 + ["learner"] * 4],
    "distill": [["sampler"] * 4 + ["reward"] * 4, ["driver"] * 4 + ["raylet"] * 4, ["hang"]],
}
# Ray's names of the processes; a driver is a command of the stage.
PROCESSES = {"learner": "ray::_RankActor", "reward": "ray::_RewardActor"} | dict.fromkeys(
    ("sampler", "hang", "slow"), "ray::_SamplerActor"
)
SAYS = {"driver": "stage_restarted", "learner": "stage_restarted", "raylet": "stage_restarted"} | dict.fromkeys(
    ("sampler", "hang", "slow"), "sampler_lost"
)


class Run:
    """A stage as a command, whose processes are found by a mark in their environment."""

    def __init__(self, stage: str, home: Path, out: Path, *words: str) -> None:
        self.stage, self.out, self.mark = stage, out, uuid.uuid4().hex
        self.module = f"posttrain.{command_of(stage)}"
        out.mkdir(parents=True, exist_ok=True)
        self.output = (out / "output.txt").open("ab")
        command = [sys.executable, "-m", self.module, str(home / f"{stage}.yaml"), f"output_dir={out}"]
        self.process = subprocess.Popen(
            [*command, *words],
            cwd=ROOT,
            env={**os.environ, "POSTTRAIN_BENCH_MARK": self.mark},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self) -> float:
        """Wait for the end. Returns the seconds that the last process outlived the command."""
        code = self.process.wait()
        ended = time.monotonic()
        self.output.close()
        if code:
            raise RuntimeError(f"{self.stage} ended with {code}:\n{(self.out / 'output.txt').read_text()[-3000:]}")
        while self.processes("") and time.monotonic() - ended < 60:
            time.sleep(0.2)
        return time.monotonic() - ended

    def processes(self, name: str) -> list[psutil.Process]:
        """That run, with these letters in their command line."""
        return [process for process in psutil.process_iter() if self._is_ours(process, name)]

    def _is_ours(self, process: psutil.Process, name: str) -> bool:
        try:
            if process.environ().get("POSTTRAIN_BENCH_MARK") != self.mark or process.status() == "zombie":
                return False
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        if name == "driver":
            return self.module in words and "--max-restarts" not in words
        return name in " ".join(words[:1] if name == "raylet" else words)

    def progress(self) -> int:
        return progress(self.stage, self.out)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.out / "faults.jsonl") if event["event"] == name]

    def wait_for(self, condition: Any, seconds: float = 600) -> bool:
        """Until the condition holds; False if the run ended before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            if time.monotonic() > end:
                raise RuntimeError(f"{self.out}: nothing came of {condition} within {seconds} s")
            time.sleep(0.05)
        return True


def command_of(stage: str) -> str:
    """The stage that a recipe of the bench is of."""
    return stage.partition("-")[0]


def progress(stage: str, out: Path) -> int:
    """Steps that are logged, or answers that are on disk."""
    return len(lines(out / ("journal/generations.jsonl" if stage == "distill" else "metrics.jsonl")))


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def inject(run: Run, fault: str, rng: random.Random, least: int, most: int) -> dict[str, Any] | None:
    """One fault between these marks of progress. Returns what was measured; None where the run was over before."""
    wanted = rng.randint(least, most)
    if not run.wait_for(lambda: run.progress() >= wanted):
        return None
    time.sleep(rng.uniform(0, 2))
    return strike(run, fault, rng)


def strike(run: Run, fault: str, rng: random.Random) -> dict[str, Any] | None:
    """One fault now. Returns what was measured; None where there is nothing to strike, or the run was over before that."""
    found = run.processes(PROCESSES.get(fault, fault))
    if not found:
        return None
    before, said = run.progress(), len(run.events(SAYS.get(fault, "")))
    victim, start = rng.choice(found), time.time()
    if fault == "slow":
        threading.Thread(target=slow_down, args=(victim,), daemon=True).start()
    else:
        victim.send_signal(signal.SIGSTOP if fault == "hang" else signal.SIGKILL)
    measured: dict[str, Any] = {"fault": fault, "at": before, "time": start}
    if fault in SAYS:
        if not run.wait_for(lambda: len(run.events(SAYS[fault])) > said):
            return None
        measured["detected"] = run.events(SAYS[fault])[said]["time"] - start
    if run.wait_for(lambda: run.progress() > before):
        measured["recovered"] = time.time() - start
    return measured


def note_replacements(run: Run, faults: Sequence[dict[str, Any]]) -> None:
    """When the new samplers came, which nobody waited for: of each lost one the next that joined."""
    joined = [event["time"] for event in run.events("sampler_joined")]
    for fault in faults:
        later = [moment for moment in joined if moment > fault["time"]]
        if fault["fault"] in ("sampler", "hang", "slow") and later:
            fault["replaced"] = later[0] - fault["time"]
            joined.remove(later[0])


def slow_down(process: psutil.Process) -> None:
    """To a tenth, until it is ended."""
    try:
        while True:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.18)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return


# --- what came of a run ----------------------------------------------------------------------------------------------


def data_of(stage: str, out: Path) -> Counter[Any]:
    """What was trained on or made, each with how often it is there."""
    if stage in ("sft", "reward_model"):
        return Counter((line["step"], line.get("train/loss")) for line in lines(out / "metrics.jsonl"))
    if stage == "distill":
        rows = pq.read_table(out / "samples" / "generations.parquet").to_pylist()
        return Counter((row["sample_id"], row["completion"]) for row in rows)
    found: Counter[Any] = Counter()
    for path in sorted((out / "samples").glob("step-*.parquet")):
        found.update((path.stem, row["prompt_id"], row["completion"]) for row in pq.read_table(path).to_pylist())
    steps = Counter(line["step"] for line in lines(out / "metrics.jsonl"))
    return found + Counter({("step", step): count for step, count in steps.items()})


def result_of(stage: str, out: Path) -> bytes:
    """Weights as they are in the file, or the dataset."""
    if stage == "distill":
        return json.dumps(pq.read_table(out / "dataset.parquet").to_pylist(), sort_keys=True, default=str).encode()
    files = sorted((out / "checkpoints" / "latest").glob("model*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def compare(stage: str, out: Path, calm: Path) -> dict[str, Any]:
    found, wanted = data_of(stage, out), data_of(stage, calm)
    return {
        "lost": (wanted - found).total(),
        "twice": (found - wanted).total(),
        "identical": found == wanted and result_of(stage, out) == result_of(stage, calm),
        "things": wanted.total(),
    }


# --- the bench -------------------------------------------------------------------------------------------------------


def prepare(home: Path, stages: Sequence[str]) -> None:
    """Recipes, a reward and a policy that is random but for a few steps of SFT."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "reward.py").write_text(REWARD)
    for stage, text in RECIPES.items():
        (home / f"{stage}.yaml").write_text(f"stage: {command_of(stage)}\n" + text.replace("HOME", str(home)))
    if not (home / "policy" / "summary.json").exists() and set(stages) - {"sft"}:
        Run("sft", home, home / "policy", "training.max_steps=5", "checkpoint.save_steps=0").finish()


def tries(arguments: argparse.Namespace, done: set[tuple[str, int, int]]) -> Iterator[tuple[str, int, int, list[str]]]:
    """Stage, try, chain, faults: those that have no result yet."""
    for number in range(arguments.tries):
        for stage in arguments.stages:
            for place, chain in enumerate(CHAINS[stage]):
                faults = [fault for fault in chain if not arguments.faults or fault in arguments.faults]
                if faults and (stage, number, place) not in done:
                    yield stage, number, place, faults


def calm_run(home: Path, stage: str) -> tuple[Path, int]:
    """The run without faults, and how far it goes. One sampler is enough: completions have seeds of their own."""
    out = home / f"{stage}-calm"
    if not (out / "summary.json").exists():
        words = ["sampler.num_workers=1"] if "sampler" in RECIPES[stage] else []
        Run(stage, home, out, *words).finish()
    return out, progress(stage, out)


def attempt(home: Path, seed: int, stage: str, number: int, place: int, faults: list[str]) -> dict[str, Any]:
    """A run with the faults of a chain."""
    rng = random.Random(f"{seed}/{stage}/{number}/{place}")
    rng.shuffle(faults)
    calm, end = calm_run(home, stage)
    out = home / f"{stage}-{number}-{place}"
    if out.exists():
        out.rename(out.with_name(f"{out.name}-unfinished-{uuid.uuid4().hex[:6]}"))
    print(f"{stage}, try {number}: {', '.join(faults)}", flush=True)
    # A second sampler matters where one is lost; without it a restart takes less.
    alone = (
        ["sampler.num_workers=1"] if "sampler" in RECIPES[stage] and not {"sampler", "hang", "slow"} & {*faults} else []
    )
    run = Run(stage, home, out, *alone, "--max-restarts", str(2 * len(faults)))
    measured = []
    for index, fault in enumerate(faults):
        # Each in its part of the run, so that there is work left for the others.
        part = max(1, int(0.8 * end / len(faults)))
        measured.append(inject(run, fault, rng, 1 + index * part, (index + 1) * part))
    orphans = run.finish()
    struck = [fault for fault in measured if fault is not None]
    note_replacements(run, struck)
    row = {"stage": stage, "try": number, "chain": place, "faults": struck}
    row |= {**compare(stage, out, calm), "missed": measured.count(None), "last_process_seconds": orphans}
    print(f"  {json.dumps(row)}", flush=True)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each stage and fault."""
    head = "| stage | fault | n | detected, s | recovered, s | replaced, s |\n|---|---|---|---|---|---|\n"
    text = ""
    for stage in RECIPES:
        measured = [fault for row in rows if row["stage"] == stage for fault in row["faults"]]
        for name in dict.fromkeys(fault for chain in CHAINS[stage] for fault in chain):
            of = [fault for fault in measured if fault["fault"] == name]
            if of:
                cells = [seconds(of, key) for key in ("detected", "recovered", "replaced")]
                text += f"| {stage} | {name} | {len(of)} | {' | '.join(cells)} |\n"
    text = head + text + "\n| stage | runs with faults | identical | lost | twice | of |\n|---|---|---|---|---|---|\n"
    for stage in RECIPES:
        of = [row for row in rows if row["stage"] == stage]
        if of:
            sums = [sum(row[key] for row in of) for key in ("identical", "lost", "twice", "things")]
            text += f"| {stage} | {len(of)} | {' | '.join(map(str, sums))} |\n"
    return text


def seconds(faults: Sequence[dict[str, Any]], key: str) -> str:
    values = [fault[key] for fault in faults if key in fault]
    if not values:
        return "-"
    return f"{statistics.median(values):.1f}" + (f" (max {max(values):.1f})" if len(values) > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=5, help="of each chain")
    parser.add_argument("--stages", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--faults", nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/faults"))
    parser.add_argument("--write", type=Path, help="put the table into this file, between its two marks")
    parser.add_argument("--quick", action="store_true", help="one try")
    arguments = parser.parse_args()
    arguments.tries = 1 if arguments.quick else arguments.tries
    home = arguments.directory.resolve()
    prepare(home, arguments.stages)
    results = home / "results.jsonl"
    done = {(row["stage"], row["try"], row["chain"]) for row in lines(results)}
    for stage, number, place, faults in tries(arguments, done):
        row = attempt(home, arguments.seed, stage, number, place, faults)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = lines(results)
    text = table(rows)
    print(text)
    if arguments.write:
        before, mark, rest = arguments.write.read_text().partition("<!-- table -->\n")
        after = rest.partition("<!-- end -->\n")[2]
        arguments.write.write_text(f"{before}{mark}\n{text}\n<!-- end -->\n{after}")
    recovered = [fault["recovered"] for row in rows for fault in row["faults"] if "recovered" in fault] or [0.0]
    print(
        json.dumps(
            {
                "runs": len(rows),
                "identical": sum(row["identical"] for row in rows),
                "lost": sum(row["lost"] for row in rows),
                "duplicated": sum(row["twice"] for row in rows),
                "recovery_seconds_p50": round(statistics.median(recovered), 1),
                "recovery_seconds_max": round(max(recovered), 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
