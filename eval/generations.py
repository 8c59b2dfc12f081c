"""Answers on disk as they come, so that a crash, an interrupt or a grader that fails costs none that was paid for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import UserDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.grading import has_failed
from eval.samplers import UNKNOWN_ID, Stream
from posttrain.errors import RunStopped
from posttrain.types import Completion, Prompt, RewardResult, SamplingParams


class Generations:
    """generations/<name>.jsonl of a run directory: a line per answer.

    Args:
        run_dir: of the evaluation.
        model: what gives the answers; those of another are not used.
        resume: use what is there.

    Raises:
        RunStopped: there are answers of an evaluation that did not end, and nobody said what to do with them.
    """

    def __init__(self, run_dir: Path, model: str, *, resume: bool) -> None:
        self.path = run_dir / "generations"
        self._model = model
        is_unfinished = any(self.path.glob("*.jsonl")) and not _is_finished(run_dir)
        if is_unfinished and not resume:
            raise RunStopped(
                f"{self.path} holds answers of an evaluation that did not end: add --resume to use them, or delete that folder"
            )
        if not resume and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, stream: Stream) -> Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]:
        """A function like `SamplerPool.generate` that asks only for what is not on disk yet.

        Args:
            name: of the suite.
            stream: gives answers.
        """

        def generate(prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
            known = self._read(name)
            keys = [[self._key(prompt, params, n) for n in range(params.num_generations)] for prompt in prompts]
            wanted = [(p, n) for p, row in enumerate(keys) for n, key in enumerate(row) if key not in known]
            failed: dict[str, Completion] = {}
            with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                for p, n, completion in stream(prompts, params, wanted):
                    if has_failed(completion):
                        failed[keys[p][n]] = completion  # asked for again when the run is resumed
                        continue
                    known[keys[p][n]] = completion
                    file.write(json.dumps({"key": keys[p][n], "prompt_id": prompts[p].id, **_line(completion)}) + "\n")
                    file.flush()
            return [[known.get(key) or failed[key] for key in row] for row in keys]

        return generate

    def verdicts(self, name: str) -> Verdicts:
        """What a judge said of the suite's answers, on disk too."""
        return Verdicts(self.path / f"{name}-verdicts.jsonl")

    def _key(self, prompt: Prompt, params: SamplingParams, sample: int) -> str:
        """What an answer depends on."""
        asked = [[message["role"], message["content"]] for message in prompt.messages]
        drawn = [params.max_completion_length, params.temperature, params.top_p, params.top_k, sample]
        text = json.dumps([self._model, prompt.id, asked, drawn])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _read(self, name: str) -> dict[str, Completion]:
        return {row["key"]: _completion(row) for row in _whole_lines(self.path / f"{name}.jsonl")}


class Verdicts(UserDict[str, RewardResult]):
    """Key -> verdict, each written to a file when it is put in."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.data = {row["key"]: RewardResult(row["score"], "ok", row["detail"]) for row in _whole_lines(file)}
        self._file = file

    def __setitem__(self, key: str, result: RewardResult) -> None:
        self.data[key] = result
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "score": result.score, "detail": result.detail}) + "\n")


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, without a line that was being written when the run was killed."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append(row)
    return found


def _is_finished(run_dir: Path) -> bool:
    try:
        return bool(json.loads((run_dir / "summary.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def _line(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "length": len(completion.sampled_ids),
        "policy_version": completion.policy_version,
    }


def _completion(row: dict[str, Any]) -> Completion:
    """Without ids and logprobs, which grading does not need."""
    ids = (UNKNOWN_ID,) * int(row["length"])
    return Completion(ids, (0.0,) * len(ids), row["finish_reason"], row["text"], row["policy_version"])
