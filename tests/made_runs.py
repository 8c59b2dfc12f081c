"""Run directories written by the real writers, without a model: quick, and with any text in them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from data.chat import build_tokenizer
from posttrain.metrics import Metric, MetricsLog
from posttrain.router_log import RouterLog
from posttrain.run_dir import RunDir
from posttrain.token_records import token_records
from posttrain.types import Completion, Group, Prompt, Sample

RECIPE = """
stage: grpo
run_name: made
max_steps: 6
rewards:
- {func: "rewards.task_answer:score", name: accuracy}
- {func: "rewards.format:score", name: format, weight: 0.1}
"""
TEXTS = ("<think>l0e1</think><answer>1</answer>", "<think>a0</think><answer>0</answer>", "<answer>2</answer>")


def make_run(path: Path, *, steps: int = 6, texts: Sequence[str] = TEXTS, ids: Sequence[str] = ("a/1", "b/1")) -> Path:
    """A GRPO run: each step one group for each id, each group one completion for each text."""
    run_dir, tokenizer, chance = RunDir(path), build_tokenizer(), random.Random(0)
    run_dir.write_recipe(RECIPE)
    run_dir.write_environment(0)
    log, router_log = MetricsLog(path), RouterLog(path)
    for step in range(1, steps + 1):
        log.log(step, metrics_of(step, chance))
        router_log.log(step, [[10 + step, 10, 10, 10 - step], [5, 5, 5, 5]])
        groups = [group_of(name, texts, step, tokenizer) for name in ids]
        samples = [
            Sample(group.prompt.token_ids, c.token_ids, c.logprobs, 0.5, old_logprobs=c.logprobs, place=(number, index))
            for number, group in enumerate(groups)
            for index, c in enumerate(group.completions)
        ]
        records = token_records(groups, samples, tokenizer, limit="all", seed=str(step))
        run_dir.write_samples(step, groups, [[0.5] * len(texts) for _ in ids], records)
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}
    result = {"pass_at_1": estimate, "greedy": None, "by_level": {"a/1": estimate}, "completion_length_mean": 9.5}
    summary = {
        "stage": "grpo",
        "seconds": 12.5,
        "steps": steps,
        "finished": True,
        "eval": {"before": result, "after": result},
    }
    run_dir.write_summary(summary)
    return path


def metrics_of(step: int, chance: random.Random) -> dict[str, Metric]:
    """A line of metrics.jsonl with a name of every kind that is drawn."""
    names = (
        "reward/mean", "reward/accuracy/mean", "reward/format/mean", "completion/length_mean", "policy/entropy",
        "policy/kl_ref", "parity/logprob_abs_max", "parity/logprob_abs_mean", "router/max_violation",
        "router/layer_00/max_violation", "router/layer_00/entropy", "lag/max", "time/rollout", "time/learn",
        "throughput/tokens_per_second", "custom/number",
    )  # fmt: skip
    found = {name: Metric(math.exp(-step / 3) * (1 + chance.random() / 4), "mean") for name in names}
    return {**found, "groups/sampled": Metric(2, "mean"), "groups/with_signal": Metric(0.5, "mean")}


def group_of(name: str, texts: Sequence[str], step: int, tokenizer: object) -> Group:
    """A prompt with these texts as its completions; the first is right."""
    encode = tokenizer.encode  # type: ignore[attr-defined]
    ids = [tuple(encode(text, add_special_tokens=False)) or (0,) for text in texts]
    completions = tuple(
        Completion(tokens, tuple(-0.1 * (place + 1) for place in range(len(tokens))), "stop", text, step - 1)
        for text, tokens in zip(texts, ids, strict=True)
    )
    prompt = Prompt(
        f"{name}/train/0/7", ({"role": "user", "content": f"count in {name}?"},), (1, 2), "1", {"task": name}
    )
    right = tuple(float(place == 0) for place in range(len(texts)))
    return Group(prompt, completions, tuple(1.1 * score for score in right), {"accuracy": right, "format": right})
