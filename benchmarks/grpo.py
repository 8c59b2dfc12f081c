"""Samples per second of GRPO: this project's loop beside TRL's GRPOTrainer.

    python benchmarks/grpo.py [--problems mixed] [--model CHECKPOINT] [--steps 24] [--quick] [--variants lag trl]

All train the same tiny DeepSeek-V3 from the same checkpoint on the same prompts with the same reward: as many prompts,
completions per prompt, tokens per completion and optimizer steps per batch, the same learning rate, no KL. Each runs in
processes of its own, one after the other, with the same two threads in sum. The first two steps are warm-up and are left out
of the speeds. There are two kinds of problems, each with the policy that a recipe makes for it:

  short     letter counting with answers of about equal length (0.9M parameters, `make quickstart`)
  mixed     three kinds of problems with worked solutions of 10 to 100 tokens, as reasoning is: what most batches wait for is a
            few long ones (4.8M parameters, `python -m posttrain.sft recipes/tiny/mixed_sft.yaml`)

  ours      generation and learning take turns
  lag       the same with rollout.max_lag: 1, a thread for the sampler and one for the learner
  carry     lag, with rollout.oversampling: 1.5
  trl       TRL with generation by transformers
  trl-vllm  TRL with vLLM in its own process, where TRL can do that on this machine

The last line is one JSON object: for each variant samples and tokens per second, peak memory, seconds to --accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
PROMPTS, GENERATIONS, MINIBATCHES, LEARNING_RATE = 16, 8, 2, 1e-4
WARMUP = 2
THREADS = 2


@dataclass(frozen=True)
class Problems:
    """What is trained on, and by which policy."""

    datasets: tuple[dict[str, Any], ...]
    length: int  # longest completion, tokens
    model: str


PROBLEMS = {
    "short": Problems(
        ({"task": "letter_counting", "levels": [2, 3], "size": 8000},), 48, "runs/quickstart/sft/checkpoints/latest"
    ),
    "mixed": Problems(
        (
            {"task": "letter_counting", "levels": [1, 2, 3, 4], "size": 3000},
            {"task": "chain_sum", "levels": [1, 2, 3, 4], "size": 3000},
            {"task": "products", "levels": [2, 3], "size": 3000},
        ),
        128,
        "runs/mixed_sft/checkpoints/latest",
    ),
}


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    model: str
    steps: int
    problems: Problems


def recipe(setting: Setting, *, lag: int, oversampling: float) -> dict[str, Any]:
    threads = 1 if lag else THREADS
    length = setting.problems.length
    return {
        "stage": "grpo",
        "max_steps": setting.steps,
        "model": {"model_name_or_path": setting.model},
        "datasets": list(setting.problems.datasets),
        "rewards": [{"func": "rewards.task_answer:score", "name": "accuracy"}],
        "rollout": {
            "num_prompts": PROMPTS,
            "num_generations": GENERATIONS,
            "max_completion_length": length,
            "max_lag": lag,
            "oversampling": oversampling,
        },
        "algorithm": {
            "loss_aggregation": "token",
            "beta": 0.0,
            "num_minibatches": MINIBATCHES,
            "old_policy": "sampler",
        },
        "parity": {"measured_on": "first_minibatch"},
        "optimizer": {"learning_rate": LEARNING_RATE, "adam_beta2": 0.999},
        "sampler": {"num_threads": threads, "max_model_len": length + 64},
        "learner": {"num_threads": threads, "row_length": length + 64, "share_prompts": True},
    }


def ours(setting: Setting, out: Path, *, lag: int = 0, oversampling: float = 1.0) -> list[dict[str, float]]:
    """Run the stage as a user does, and read its metrics."""
    file = out / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(setting, lag=lag, oversampling=oversampling)))
    run = out / "run"
    command = [sys.executable, "-m", "posttrain.grpo", str(file), f"output_dir={run}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": line["time/step"],
            "samples": line["throughput/samples_per_second"] * line["time/step"],
            "tokens": line["throughput/tokens_per_second"] * line["time/step"],
            "accuracy": line["reward/accuracy/mean"],
            **{name: line[name] for name in line if name.startswith("time/")},
        }
        for line in lines
    ]


def trl(setting: Setting, out: Path, *, vllm: bool = False) -> list[dict[str, float]]:
    """TRL's trainer in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.model.load import load_tokenizer
    from posttrain.records import load_records
    from posttrain.sections import DatasetSection
    from rewards.task_answer import score

    torch.set_num_threads(THREADS)
    records = load_records([DatasetSection.model_validate(one) for one in setting.problems.datasets], "train", 0)
    rows = [{"prompt": list(r.messages), "answer": r.answer, "task": r.metadata["task"]} for r in records]
    steps_done: list[dict[str, float]] = []
    current = {"samples": 0.0, "tokens": 0.0, "right": 0.0}
    tokenizer = load_tokenizer(setting.model)

    def accuracy(
        completions: list[Any], answer: list[str], task: list[str], completion_ids: Any, **_: Any
    ) -> list[float]:
        found = [
            score(completion[0]["content"], right, name)
            for completion, right, name in zip(completions, answer, task, strict=True)
        ]
        current["samples"] += len(found)
        current["tokens"] += sum(len(ids) for ids in completion_ids)
        current["right"] += sum(found)
        return found

    class Clock(TrainerCallback):
        begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % MINIBATCHES:
                return
            now = time.perf_counter()
            steps_done.append(
                {
                    "seconds": now - self.begun,
                    "samples": current["samples"],
                    "tokens": current["tokens"],
                    "accuracy": current["right"] / max(1.0, current["samples"]),
                }
            )
            current.update(samples=0.0, tokens=0.0, right=0.0)
            self.begun = now

    settings = GRPOConfig(
        output_dir=str(out),
        max_steps=setting.steps * MINIBATCHES,
        per_device_train_batch_size=PROMPTS * GENERATIONS // MINIBATCHES,
        steps_per_generation=MINIBATCHES,
        num_generations=GENERATIONS,
        max_completion_length=setting.problems.length,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_vllm=vllm,
        **({"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3} if vllm else {}),
    )
    policy = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=accuracy,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    Clock.begun = time.perf_counter()
    trainer.train()
    return steps_done


VARIANTS = {
    "ours": lambda setting, out: ours(setting, out),
    "lag": lambda setting, out: ours(setting, out, lag=1),
    "carry": lambda setting, out: ours(setting, out, lag=1, oversampling=1.5),
    "trl": lambda setting, out: trl(setting, out),
    "trl-vllm": lambda setting, out: trl(setting, out, vllm=True),
}


def measured(variant: str, setting: Setting) -> dict[str, Any]:
    """Run a variant in a process of its own and watch the memory of all its processes."""
    # -P: a file of this directory would hide the package of its name.
    command = [
        sys.executable,
        "-P",
        __file__,
        "--run",
        variant,
        "--model",
        setting.model,
        "--steps",
        str(setting.steps),
    ]
    command += ["--problems", next(name for name, problems in PROBLEMS.items() if problems == setting.problems)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        peak = _Peak(process.pid)
        process.wait()
        peak.stop()
        log.seek(0)
        lines = log.read().splitlines()
    if process.returncode:
        return {"error": next((line for line in reversed(lines) if line.strip()), "no output")[:300]}
    return {"steps": json.loads(lines[-1]), "peak_gib": peak.bytes / 2**30}


class _Peak:
    """The most memory that a process and its descendants held together (proportional set size)."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            try:
                root = psutil.Process(self._pid)
                sizes = [self._size(one) for one in (root, *root.children(recursive=True))]
            except psutil.NoSuchProcess:
                return
            self.bytes = max(self.bytes, sum(sizes))

    @staticmethod
    def _size(process: psutil.Process) -> int:
        try:
            return int(process.memory_full_info().pss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0


def summary(found: dict[str, Any], accuracy: float) -> dict[str, Any]:
    if "error" in found:
        return found
    steps = found["steps"]
    timed = steps[WARMUP:]
    seconds = sum(step["seconds"] for step in timed)
    elapsed, reached = 0.0, None
    for number, step in enumerate(steps):
        elapsed += step["seconds"]
        # One batch may be lucky: the mean of three.
        window = steps[max(0, number - 2) : number + 1]
        if reached is None and len(window) == 3 and statistics.fmean(s["accuracy"] for s in window) >= accuracy:
            reached = elapsed
    return {
        "samples_per_second": sum(step["samples"] for step in timed) / seconds,
        "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
        "seconds_per_step": seconds / len(timed),
        "peak_gib": found["peak_gib"],
        "seconds_to_accuracy": reached,
        "last_accuracy": statistics.fmean(step["accuracy"] for step in steps[-3:]),
        "parts": {
            name: statistics.fmean(step[name] for step in timed) for name in timed[0] if name.startswith("time/")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", choices=list(PROBLEMS), default="short")
    parser.add_argument("--model", help="checkpoint, by default the one made for these problems")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="5 steps: does it run at all")
    parser.add_argument("--accuracy", type=float, default=0.75, help="what seconds_to_accuracy means")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--run", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    problems = PROBLEMS[options.problems]
    model = Path(options.model or problems.model).resolve()
    if not (model / "config.json").exists():
        parser.error(f"{model} is no checkpoint; make it as --help says, or give --model")
    setting = Setting(str(model), 5 if options.quick else options.steps, problems)
    if options.run:
        with tempfile.TemporaryDirectory() as out:
            steps = VARIANTS[options.run](setting, Path(out))
        print(json.dumps(steps))
        return 0
    found = {variant: summary(measured(variant, setting), options.accuracy) for variant in options.variants}
    table = Table(
        "variant", "samples/s", "tokens/s", "s/step", "peak GiB", f"s to {options.accuracy:.0%}", "last accuracy"
    )
    for variant, one in found.items():
        if "error" in one:
            print(f"{variant}: {one['error']}")
            continue
        reached = one["seconds_to_accuracy"]
        table.add_row(
            variant,
            f"{one['samples_per_second']:.1f}",
            f"{one['tokens_per_second']:.0f}",
            f"{one['seconds_per_step']:.2f}",
            f"{one['peak_gib']:.2f}",
            "not reached" if reached is None else f"{reached:.0f}",
            f"{one['last_accuracy']:.1%}",
        )
    Console().print(table)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
