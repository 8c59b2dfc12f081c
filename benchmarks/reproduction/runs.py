"""What the stages of recipes/tiny/r1.yaml have left behind, as figures: answers, curves, compute, the funnel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.tasks.bilingual_counting import BilingualCounting, language_of
from eval.statistics import Estimate, bootstrap, estimate
from rewards.language_consistency import prose, reasoning
from rewards.languages import count_words

COUNTING = BilingualCounting.name
Values = dict[str, list[float]]  # problem id -> a value for each of its answers


@dataclass(frozen=True)
class Answers:
    """What a policy wrote on the held-out problems of one task."""

    rows: Sequence[Mapping[str, Any]]  # of an evaluation's samples, see eval/suite.py

    @classmethod
    def of(cls, directory: Path, moment: str, task: str = COUNTING, mode: str = "sampled") -> Answers:
        """Those of a stage: `moment` is before, after, or eval for the stage of that name.

        Raises:
            FileNotFoundError: the stage has not evaluated.
        """
        import pyarrow.parquet as pq

        rows = pq.read_table(directory / "samples" / f"eval-{moment}.parquet").to_pylist()
        return cls([row for row in rows if row["mode"] == mode and row["kind"].partition("/")[0] == task])

    def values(self, value: Callable[[Mapping[str, Any]], float | None]) -> Values:
        """A figure of each answer, by problem; answers of which it is None are left out."""
        found: Values = {}
        for row in self.rows:
            figure = value(row)
            if figure is not None:
                found.setdefault(row["prompt_id"], []).append(figure)
        return found

    @cached_property
    def scores(self) -> Values:
        return self.values(lambda row: row["score"])

    @cached_property
    def lengths(self) -> Values:
        """Tokens."""
        return self.values(lambda row: row["length"])

    @cached_property
    def language_shares(self) -> Values:
        """Share of the words of the reasoning that are in the question's language, where there are words."""
        return self.values(language_share)

    @property
    def accuracy(self) -> Estimate:
        return estimate(list(self.scores.values()))

    @property
    def length(self) -> Estimate:
        return bootstrap(list(self.lengths.values()))

    @property
    def language(self) -> Estimate | None:
        """None where no answer has words in its reasoning."""
        return bootstrap(list(self.language_shares.values())) if self.language_shares else None

    @property
    def worked_share(self) -> float:
        """Share of the answers that reason at all."""
        return sum(is_worked(row) for row in self.rows) / len(self.rows)

    def accuracy_where(self, worked: bool) -> Estimate | None:
        """Accuracy of the answers that reason, or of those that do not; None where there is none."""
        scores = self.values(lambda row: row["score"] if is_worked(row) == worked else None)
        return estimate(list(scores.values())) if scores else None


def is_worked(row: Mapping[str, Any]) -> bool:
    return bool(reasoning(row["completion"]).strip())


def language_share(row: Mapping[str, Any]) -> float | None:
    matching, total = count_words(prose(reasoning(row["completion"])), language_of(row["prompt"]))
    return matching / total if total else None


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps of a stage."""

    steps: list[int]
    values: list[float]


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def curve(directory: Path, metric: str) -> Curve:
    lines = [line for line in metrics(directory) if metric in line]
    return Curve([int(line["step"]) for line in lines], [line[metric] for line in lines])


# --- compute ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compute:
    """What a training took."""

    flops: float  # of matrix products: 2 for a parameter and token forward, 4 more backward
    seconds: float  # of RL and SFT without start-up and evaluations, of sampling with them


def active_parameters(checkpoint: Path) -> int:
    """Parameters that a token of a DeepSeek-V3 policy is multiplied with: of the routed experts only those chosen.

    The embedding is looked up and not multiplied.
    """
    from posttrain.planning.shapes import parameter_count
    from posttrain.recipe import BuildSection

    config = read_json(checkpoint / "config.json")
    names = [name for name in BuildSection.model_fields if name in config]
    build = BuildSection(**{name: config[name] for name in names})
    sparse = build.num_hidden_layers - build.first_k_dense_replace
    idle = sparse * (build.n_routed_experts - build.num_experts_per_tok) * 3 * build.hidden_size
    return (
        parameter_count(build, config["vocab_size"])
        - idle * build.moe_intermediate_size
        - config["vocab_size"] * build.hidden_size
    )


def rl_compute(directory: Path) -> Compute:
    """Of a GRPO stage, evaluations left out of the FLOPs: generation, scoring by policy and reference, training."""
    import pyarrow.parquet as pq

    parameters = active_parameters(directory / "checkpoints" / "latest")
    flops = 0.0
    lines = metrics(directory)
    for line in lines:
        table = pq.read_table(directory / "samples" / f"step-{line['step']:06d}.parquet", columns=["prompt", "length"])
        tokens = sum(table["length"].to_pylist()) + sum(prompt_tokens(text) for text in table["prompt"].to_pylist())
        trained = tokens * line["groups/with_signal"]  # the other groups are dropped before the learner sees them
        flops += 2 * parameters * (tokens + (2 + 3) * trained)
    return Compute(flops, sum(line["time/step"] for line in lines))


def sft_compute(directory: Path) -> Compute:
    """Of an SFT stage, as if every row were full."""
    import yaml

    training = yaml.safe_load((directory / "recipe.yaml").read_text())["training"]
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    tokens = read_json(directory / "summary.json")["steps"] * rows * training["max_length"]
    flops = 6 * active_parameters(directory / "checkpoints" / "latest") * tokens
    return Compute(flops, metrics(directory)[-1]["seconds"])


def teacher_compute(directory: Path) -> Compute:
    """Of the sampling of a distillation stage; what the teacher's training took is not in it."""
    import yaml

    teacher = yaml.safe_load((directory / "recipe.yaml").read_text())["teacher"]["model"]["model_name_or_path"]
    usage = read_json(directory / "data_card.json")["usage"]
    tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    return Compute(2 * active_parameters(Path(teacher)) * tokens, read_json(directory / "summary.json")["seconds"])


def prompt_tokens(text: str) -> int:
    """Of a prompt in the tiny chat template: a token for each character, and <bos>, <|user|>, <|assistant|>."""
    return len(text) + 3


# --- rejection sampling -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Funnel:
    """What became of a teacher's samples."""

    stages: list[tuple[str, int]]  # what they have survived, and how many are left; the first are all
    rejected: int  # for a fault of their own; the others are duplicates, or another of their problem was picked
    prompts: int
    prompts_kept: int  # with a sample that was kept

    @property
    def sampled(self) -> int:
        return self.stages[0][1]

    @property
    def kept(self) -> int:
        return self.stages[-1][1]


def funnel(directory: Path) -> Funnel:
    """Of a distillation stage, by its data card; checks that rejected nothing are left out."""
    card = read_json(directory / "data_card.json")["funnel"]
    steps = card["steps"]
    shown = [step for place, step in enumerate(steps) if step["removed"] or place in (0, len(steps) - 1)]
    return Funnel(
        [(step["step"], step["left"]) for step in shown],
        sum(step["removed"] for step in steps if step.get("reason") not in ("duplicate", "not_picked")),
        card["prompts"]["all"],
        card["prompts"]["with_a_kept_answer"],
    )


def total_seconds(run_dir: Path, stages: Iterable[str]) -> dict[str, float]:
    """Seconds of each stage, by its summary."""
    return {name: float(read_json(run_dir / name / "summary.json")["seconds"]) for name in stages}
