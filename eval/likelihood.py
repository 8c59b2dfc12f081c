"""Benchmarks through EleutherAI's lm-eval, with our checkpoint: what base models are measured by, log-likelihoods of choices.

Prompts, worked examples, extraction and metric are lm-eval's own; the statistics are those of all benchmarks here.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eval.benchmarks import get_benchmark
from eval.benchmarks.base import Benchmark, LmEval
from eval.benchmarks.loading import rows
from eval.statistics import bootstrap, estimate
from eval.suite import EvalResult
from posttrain.recipe import BenchmarkSection, EvalSuiteSection, ModelSection

BATCH = 16
CURE = "pip install 'posttrain[benchmarks]'"


def check_likelihood(section: BenchmarkSection, suite: EvalSuiteSection) -> None:
    """Say before anything heavy what `method: lm_eval` lacks.

    Raises:
        ValueError: lm-eval is not installed, has no task for the benchmark, or would ignore an option.
    """
    if get_benchmark(section.name).lm_eval is None:
        raise ValueError(f"{section.name} has no task of lm-eval here; leave method out")
    ignored = sorted({"num_samples", "temperature", "max_completion_length"} & suite.options(section).keys())
    ignored += ["languages"] if section.languages is not None else []
    if ignored:
        raise ValueError(f"{section.name}: {ignored[0]} has no meaning with method: lm_eval; remove it")
    if find_spec("lm_eval") is None:
        raise ValueError(f"{section.name}: method: lm_eval needs the package lm-eval: {CURE}")


def run_likelihood(section: BenchmarkSection, suite: EvalSuiteSection, model: ModelSection) -> EvalResult:
    """Measure one benchmark with lm-eval.

    Raises:
        ValueError: the local copy cannot be read, or lm-eval reports nothing.
    """
    from lm_eval.models.huggingface import HFLM

    from posttrain.model.load import load_policy, load_tokenizer

    path = str(model.model_name_or_path)
    policy = load_policy(
        path,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        experts_implementation=model.experts_implementation,
        trust_remote_code=model.trust_remote_code,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    return measure(section, suite, HFLM(pretrained=policy.eval(), tokenizer=tokenizer, batch_size=BATCH))


def measure(section: BenchmarkSection, suite: EvalSuiteSection, lm: Any) -> EvalResult:
    """The same with a model of lm-eval (`lm_eval.api.model.LM`)."""
    from lm_eval import simple_evaluate

    benchmark = get_benchmark(section.name)
    spec, options = benchmark.lm_eval, suite.options(section)
    assert spec is not None  # `check_likelihood` has seen to it
    shots = int(options.get("num_fewshot", spec.num_fewshot))
    manager = task_manager()
    with tempfile.TemporaryDirectory() as folder:
        tasks: list[Any] = [spec.task]
        if section.path is not None:
            members = _local_tasks(benchmark, spec, section.path, shots, Path(folder))
            unknown = [task["task"] for task in members if task["task"] not in manager.all_tasks]
            if unknown:
                raise ValueError(
                    f"{section.path}: lm-eval has no task {unknown[0]!r}; is a subject of the copy misspelt?"
                )
            # As members of a group, tasks are the registered ones with other data; alone they would be new ones.
            tasks = [{"group": "local_copy", "task": members}]
        evaluated = simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=shots,
            limit=options.get("size"),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=suite.seed,
            numpy_random_seed=suite.seed,
            torch_random_seed=suite.seed,
            fewshot_random_seed=suite.seed,
        )
    if not evaluated or not evaluated.get("samples"):
        raise ValueError(f"{section.name}: lm-eval reports no samples of {spec.task}")
    return _result(benchmark, spec, evaluated["samples"], shots)


@cache
def task_manager() -> Any:
    """lm-eval's index of its tasks, some ten thousand files that take seconds to look through."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local_tasks(benchmark: Benchmark, spec: LmEval, path: str, shots: int, folder: Path) -> list[dict[str, Any]]:
    """lm-eval's tasks over a local copy: as they are registered, but for where the rows come from."""
    assert benchmark.hub is not None  # every benchmark with a task of lm-eval has rows
    if spec.subtask is None and len(benchmark.hub.configs) > 1:
        raise ValueError(f"{benchmark.name}: lm-eval measures its subjects one by one, from the hub; remove path")
    splits = [benchmark.hub.split]
    if shots:
        if spec.fewshot_split is None or Path(path).is_file():
            raise ValueError(
                f"{benchmark.name} is {shots}-shot and {path!r} is one split: give a folder with files "
                f"{spec.fewshot_split}* and {benchmark.hub.split}*, or set num_fewshot: 0"
            )
        splits.append(spec.fewshot_split)
    parts: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for split in splits:
        for _, row in rows(benchmark, path, split):
            parts[spec.subtask(row) if spec.subtask else spec.task][split].append(row)
    tasks = []
    for name, found in parts.items():
        files = {}
        for split, part in found.items():
            file = folder / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            files[split] = str(file)
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        if benchmark.hub.split in files:
            tasks.append({"task": name, **source, **({} if shots else {"fewshot_split": None, "training_split": None})})
    return tasks


def _result(benchmark: Benchmark, spec: LmEval, samples: dict[str, Sequence[Any]], shots: int) -> EvalResult:
    rows_found, of_task = [], {}
    for task, found in samples.items():
        kept = [sample for sample in found if sample.get("filter", "none") == spec.filter]
        of_task[task] = [[float(sample[spec.metric])] for sample in kept]
        rows_found += [_row(benchmark, task, sample, spec.metric) for sample in kept]
    scores = [score for part in of_task.values() for score in part]
    if not scores:
        raise ValueError(f"{benchmark.name}: lm-eval reports no {spec.metric} after the filter {spec.filter}")
    return EvalResult(
        pass_at_1=estimate(scores),
        greedy=None,
        by_level={task: estimate(part) for task, part in of_task.items()},
        completion_length_mean=0.0,
        truncated_fraction=0.0,
        rows=rows_found,
        counts={"completions": len(scores), "truncated": 0, "no_answer": 0, "no_verdict": 0},
        metrics={"bootstrap": bootstrap(scores)},
        title=f"{benchmark.title.partition(' (')[0]} (lm-eval, {shots}-shot)",
        details={
            "metric": f"{spec.metric} of lm-eval's {spec.task}",
            "num_samples": 1,
            "num_fewshot": shots,
            "temperature": 0.0,
            "dataset": None if benchmark.hub is None else {"path": benchmark.hub.path, "split": benchmark.hub.split},
            "protocol": "lm-eval",
            "departs": "",
            "published": spec.published if shots == spec.num_fewshot else None,
        },
    )


def _row(benchmark: Benchmark, task: str, sample: Any, metric: str) -> dict[str, Any]:
    """A question as a row of samples/eval-*.parquet."""
    arguments = sample.get("arguments")
    first = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else arguments[0]
    prompt = first.get("arg_0", "") if isinstance(first, dict) else first[0]
    return {
        "mode": "lm_eval",
        "prompt_id": f"{benchmark.name}/{task}/{sample['doc_id']}",
        "sample": 0,
        "kind": task,
        "prompt": str(prompt),
        "completion": str(sample["filtered_resps"]),
        "answer": str(sample["target"]),
        "score": float(sample[metric]),
        "status": "ok",
        "detail": "",
        "finish_reason": "stop",
        "length": 0,
    }
