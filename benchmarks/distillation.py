"""Samples that a student needs: on-policy distillation beside SFT and logit distillation on the teacher's answers.

    python benchmarks/distillation.py [--student CHECKPOINT] [--teacher CHECKPOINT] [--seed 0] [--out DIRECTORY] [--quick]

Student and teacher are the quickstart's SFT and GRPO checkpoints (`make quickstart` writes them). A sample is one completion,
whoever wrote it: on-policy distillation takes the student's own and asks the teacher for the logprobs of their tokens; the
others take the teacher's, one for each problem, as they come. On-policy distillation sees each sample once, in the order
they were drawn, so each of its steps is a point of its curve; the others are trained anew for each number of samples, and
may go over them several times. Each point is evaluated on the same 400 held-out problems, one sampled answer each.

The last line is one JSON object: student, teacher, threshold (80% of the gap closed), and for each method its points
and `samples_to_80_percent`, null where no point reaches it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

# ruff: noqa: E402  # a file beside this one would hide the package `rewards`
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.prompts import to_prompts
from eval.statistics import Estimate
from eval.suite import eval_prompts, evaluate
from posttrain import sft_parts
from posttrain.model.load import load_tokenizer
from posttrain.ranks import join_ranks
from posttrain.recipe import DatasetSection, EvalSection, SftRecipe
from posttrain.records import load_records
from posttrain.run_dir import RunDir
from posttrain.sampler import Sampler, engine_environment
from posttrain.types import Completion, Prompt, SamplingParams

ROOT = Path(__file__).parent.parent
PROBLEMS: dict[str, Any] = {"task": "letter_counting", "levels": [2, 3]}
MAX_COMPLETION = 48
SAMPLES_PER_STEP = 64  # on policy
ON_POLICY_STEPS = 16
COUNTS = (64, 128, 256, 512, 1024)  # the teacher's answers
EPOCHS = 4
THRESHOLD = 0.8


@dataclass
class Curve:
    """pass@1 after so many samples."""

    name: str
    points: dict[int, Estimate] = field(default_factory=dict)
    seconds: float = 0.0  # of training; on-policy sampling included

    def add(self, samples: int, found: Estimate) -> None:
        self.points[samples] = found
        print(f"{self.name}, {samples} samples: {_text(found)}", flush=True)

    def reaches(self, value: float) -> int | None:
        """The first point at or above a value."""
        return next((samples for samples, found in sorted(self.points.items()) if found.value >= value), None)


# --- vLLM in a process of its own ---------------------------------------------------------------------------------------


_SAMPLER: Sampler | None = None  # of the engine's process


def _start(path: str, seed: int) -> None:
    global _SAMPLER
    _SAMPLER = Sampler(
        path,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=256,
        gpu_memory_utilization=0.3,
        trust_remote_code=False,
        seed=seed,
    )


def _load(path: str, version: int) -> None:
    assert _SAMPLER is not None
    _SAMPLER.update_weights(_weights(Path(path)), version)


def _weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(path.glob("*.safetensors")):
        yield from sorted(load_file(file).items())


def _generate(prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
    assert _SAMPLER is not None
    return _SAMPLER.generate(prompts, params)


class Engine:
    """One vLLM engine that student, teacher and all that is trained take turns in: they have the same shape."""

    def __init__(self, path: Path, seed: int, threads: int) -> None:
        os.environ.update(engine_environment(threads, 1))  # read by the process that is about to start
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._version = 0
        self._pool.submit(_start, str(path), seed).result()
        self.tokenizer = load_tokenizer(str(path))
        self._section = EvalSection.model_validate(
            {"datasets": [{**PROBLEMS, "size": 400}], "greedy": False, "max_completion_length": MAX_COMPLETION}
        )
        self._held_out = eval_prompts(self._section, self.tokenizer)

    def load(self, path: Path) -> None:
        self._version += 1
        self._pool.submit(_load, str(path.resolve()), self._version).result()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return self._pool.submit(_generate, prompts, params).result()

    def pass_at_1(self, path: Path) -> Estimate:
        """Of a checkpoint, on the held-out problems."""
        self.load(path)
        return evaluate(self._section, self._held_out, self.generate).pass_at_1

    def close(self) -> None:
        self._pool.shutdown()


# --- the methods --------------------------------------------------------------------------------------------------------


def on_policy(engine: Engine, student: Path, teacher: Path, out: Path, *, steps: int, seed: int, threads: int) -> Curve:
    """`python -m posttrain.grpo` with the preset on_policy_distillation, a checkpoint after each step."""
    run_dir = out / "on_policy"
    recipe = {
        "stage": "grpo",
        "seed": seed,
        "max_steps": steps,
        "output_dir": str(run_dir),
        "model": {"model_name_or_path": str(student)},
        "teacher": {"model_name_or_path": str(teacher)},
        "datasets": [{**PROBLEMS, "size": 8000}],
        "rewards": [{"func": "rewards.task_answer:score", "name": "accuracy", "weight": 0.0}],
        "rollout": {
            "num_prompts": SAMPLES_PER_STEP,
            "num_generations": 1,
            "max_completion_length": MAX_COMPLETION,
        },
        "algorithm": {"preset": "on_policy_distillation", "num_minibatches": 2},
        "optimizer": {"learning_rate": 2e-4, "adam_beta2": 0.99},
        "sampler": {"max_model_len": 128, "num_threads": threads},
        "learner": {"row_length": 128, "num_threads": threads},
        "checkpoint": {"save_steps": 1, "save_total_limit": steps + 1},
    }
    file = out / "on_policy.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "posttrain.grpo", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    curve = Curve("on-policy distillation")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    curve.seconds = sum(json.loads(line)["time/step"] for line in lines)
    for step in range(1, steps + 1):
        curve.add(step * SAMPLES_PER_STEP, engine.pass_at_1(run_dir / "checkpoints" / f"step-{step}"))
    return curve


def write_answers(engine: Engine, teacher: Path, file: Path, count: int, seed: int) -> float:
    """One answer of the teacher to each of `count` training problems, as chats. Returns the seconds it took."""
    records = load_records([DatasetSection.model_validate({**PROBLEMS, "size": count})], "train", seed)
    prompts = to_prompts(records, engine.tokenizer)
    engine.load(teacher)
    start = time.perf_counter()
    groups = engine.generate(prompts, SamplingParams(MAX_COMPLETION, 1.0))
    seconds = time.perf_counter() - start
    with file.open("w") as lines:
        for prompt, (completion,) in zip(prompts, groups, strict=True):
            messages = [*map(dict, prompt.messages), {"role": "assistant", "content": completion.text}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return seconds


def first_lines(file: Path, count: int) -> Path:
    """A file with the first lines of another."""
    part = file.with_name(f"{file.stem}-{count}.jsonl")
    part.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:count]))
    return part


def fine_tuned(student: Path, chats: Path, out: Path, teacher: Mapping[str, Any] | None, seed: int) -> Path:
    """The SFT stage's own parts, as `python -m posttrain.sft` puts them together. Returns the checkpoint."""
    recipe = SftRecipe.model_validate(
        {
            "run_name": out.name,
            "output_dir": str(out),
            "seed": seed,
            "model": {"model_name_or_path": str(student)},
            "teacher": teacher,
            "datasets": [{"path": str(chats)}],
            "training": {"max_length": 256, "num_train_epochs": EPOCHS, "per_device_train_batch_size": 2},
            "optimizer": {
                "learning_rate": 5e-4,
                "lr_scheduler_type": "cosine",
                "min_learning_rate": 5e-5,
                "adam_beta2": 0.99,
            },
        }
    )
    job = sft_parts.load_job(recipe, student, None, join_ranks())
    trainer = sft_parts.build_trainer(recipe, RunDir(out), job)
    trainer.train()
    return trainer.save_last(finished=True)


def on_answers(
    name: str,
    engine: Engine,
    student: Path,
    answers: Path,
    out: Path,
    *,
    counts: Sequence[int],
    teacher: Mapping[str, Any] | None,
    seed: int,
) -> Curve:
    """Trained on the first answers of the teacher, anew for each number of them."""
    curve = Curve(name)
    for count in counts:
        start = time.perf_counter()
        path = fine_tuned(student, first_lines(answers, count), out / f"{name.split()[0]}-{count}", teacher, seed)
        curve.seconds = time.perf_counter() - start  # of the longest
        curve.add(count, engine.pass_at_1(path))
    return curve


# --- the table ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=Path("runs/quickstart/sft/checkpoints/latest"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/grpo/checkpoints/latest"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of each process; 1 where others keep the cores busy")
    parser.add_argument("--out", type=Path, help="keep all runs there")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    options = parser.parse_args()
    for path in (options.student, options.teacher):
        if not (path / "config.json").exists():
            parser.error(f"{path} is no checkpoint; run `make quickstart` first, or give --student and --teacher")
    if options.out is not None:
        options.out.mkdir(parents=True)
        return measure(options, options.out.resolve())
    with tempfile.TemporaryDirectory() as directory:
        return measure(options, Path(directory))


def measure(options: argparse.Namespace, out: Path) -> int:
    student, teacher, seed = options.student.resolve(), options.teacher.resolve(), options.seed
    counts, steps = (COUNTS[:3], 4) if options.quick else (COUNTS, ON_POLICY_STEPS)
    torch.set_num_threads(options.threads)
    engine = Engine(student, seed, options.threads)
    ends = {"student": engine.pass_at_1(student), "teacher": engine.pass_at_1(teacher)}
    threshold = ends["student"].value + THRESHOLD * (ends["teacher"].value - ends["student"].value)
    answers = out / "answers.jsonl"
    sampling = write_answers(engine, teacher, answers, max(counts), seed)
    shared: dict[str, Any] = {"counts": counts, "seed": seed}
    logits = {"model_name_or_path": str(teacher), "weight": 1.0}
    curves = [
        on_policy(engine, student, teacher, out, steps=steps, seed=seed, threads=options.threads),
        on_answers("SFT on the teacher's answers", engine, student, answers, out, teacher=None, **shared),
        on_answers("logit distillation on them", engine, student, answers, out, teacher=logits, **shared),
    ]
    engine.close()
    report(ends, threshold, curves, sampling)
    return 0


def report(ends: Mapping[str, Estimate], threshold: float, curves: Sequence[Curve], sampling: float) -> None:
    """A table to read and a line to parse."""
    title = ", ".join(f"{name} {_text(found)}" for name, found in ends.items())
    table = Table(title=f"pass@1: {title}; 80% of the gap is closed at {threshold:.1%}")
    table.add_column("samples", justify="right")
    for curve in curves:
        table.add_column(curve.name, justify="right")
    for samples in sorted({samples for curve in curves for samples in curve.points}):
        found = [curve.points.get(samples) for curve in curves]
        table.add_row(f"{samples:,}", *(_text(point) if point else "" for point in found))
    table.add_section()
    table.add_row("samples to 80%", *(str(curve.reaches(threshold) or "not reached") for curve in curves))
    table.add_row("seconds", *(f"{curve.seconds:.0f}" for curve in curves))
    Console(width=140).print(table)
    print(
        json.dumps(
            {
                **{name: found.to_dict() for name, found in ends.items()},
                "threshold": threshold,
                "teacher_sampling_seconds": round(sampling, 2),
                "methods": {
                    curve.name: {
                        "points": {samples: found.to_dict() for samples, found in sorted(curve.points.items())},
                        "samples_to_80_percent": curve.reaches(threshold),
                        "seconds": round(curve.seconds, 1),
                    }
                    for curve in curves
                },
            }
        )
    )


def _text(found: Estimate) -> str:
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


if __name__ == "__main__":
    sys.exit(main())
