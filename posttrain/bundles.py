"""Crash bundles: everything that one bad optimizer step of GRPO was computed from, to be computed again elsewhere.

    crash/step-12-minibatch-1/
      bundle.json          why, versions, the resolved recipe, loss and gradient norm, completions with their rewards, seeds
      samples.safetensors  for each sample: tokens, logprobs of sampler, learner, reference and teacher, advantages, routes
      policy/              the weights that the step started from, and the tokenizer

A step is bad if it raises, if the learner skips it, or if its loss or gradient norm is not finite. JSON and safetensors only:
whoever is sent a bundle can open it. `python -m posttrain.replay` runs it through the learner.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.disk import write_atomically
from posttrain.flight_recorder import CRASH, record
from posttrain.metrics import Metric
from posttrain.recipe import AlgorithmSection, GrpoRecipe
from posttrain.recipe_file import recipe_tree
from posttrain.redaction import redact
from posttrain.run_dir import package_versions
from posttrain.types import Sample

if TYPE_CHECKING:
    from posttrain.grpo_job import GrpoJob
    from posttrain.rollout import Rollout

FORMAT = 1
BUNDLE, SAMPLES, POLICY = "bundle.json", "samples.safetensors", "policy"
LOSS, GRAD_NORM = "policy/loss", "optim/grad_norm"
SKIPPED, SKIPPED_NORM = "optim/skipped", "optim/skipped_grad_norm"  # of a step that the learner did not take
KEPT = 5  # bundles of a run, the first ones: what went wrong first is what explains the rest
MOST_WEIGHTS = 16 * 2**30  # bytes of a policy that is written into a bundle
INTEGERS = ("prompt_ids", "completion_ids", "trained", "experts_TLK", "candidates_TC")  # the other arrays are float64


@dataclass
class BundleKeeper:
    """Keeps bundles of a run's bad steps.

    Args:
        run_dir: of the run.
    """

    run_dir: Path
    batch: Rollout | None = None  # of the present step
    _count: int = field(default=0, init=False)  # minibatches of the present step

    def begin(self, batch: Rollout) -> None:
        """A step starts; what was sampled for it."""
        self.batch, self._count = batch, 0

    @contextmanager
    def watch(
        self, job: GrpoJob, minibatch: Sequence[Sample], algorithm: AlgorithmSection
    ) -> Iterator[dict[str, Metric]]:
        """Around one optimizer step: if it goes wrong, a bundle is written, and what was raised is raised again.

        Yields:
            Where to put the metrics of the step as soon as they are known.
        """
        seen: dict[str, Metric] = {}
        number, self._count = self._count, self._count + 1
        try:
            yield seen
        except Exception as error:
            self._keep(job, minibatch, algorithm, seen, number, f"{type(error).__name__}: {error}")
            raise
        wrong = [name for name in (LOSS, GRAD_NORM) if name in seen and not math.isfinite(seen[name].value)]
        wrong += [SKIPPED] if SKIPPED in seen and seen[SKIPPED].value else []
        if wrong:
            said = ", ".join(f"{name} is {seen[name].value}" for name in wrong)
            self._keep(job, minibatch, algorithm, seen, number, said)

    def _keep(
        self,
        job: GrpoJob,
        minibatch: Sequence[Sample],
        algorithm: AlgorithmSection,
        seen: Mapping[str, Metric],
        number: int,
        reason: str,
    ) -> None:
        """Write the bundle. What goes wrong with that is said, and hides nothing."""
        directory = self.run_dir / CRASH / f"step-{job.step + 1}-minibatch-{number}"
        if directory.exists() or len(list(directory.parent.glob("step-*-minibatch-*"))) >= KEPT:
            return
        try:
            contents = self._contents(job, minibatch, algorithm, reason)
            contents["minibatch"] = number
            contents["expected"] = {name: value.hex() for name, value in _expected(job, seen).items()}
            write_bundle(directory, contents, minibatch, lambda path: _save_policy(job, path))
        except Exception as error:  # also of a learner that is gone
            record("no bundle", error=f"{type(error).__name__}: {error}")
            return
        record("bundle", path=str(directory), reason=reason)
        print(f"crash bundle: {directory} (python -m posttrain.replay {directory})", flush=True)

    def _contents(
        self, job: GrpoJob, minibatch: Sequence[Sample], algorithm: AlgorithmSection, reason: str
    ) -> dict[str, Any]:
        groups = self.batch.groups if self.batch is not None else ()
        return {
            "format": FORMAT,
            "reason": reason[:2000],
            "step": job.step + 1,
            "policy_version": job.step,
            "recipe": recipe_tree(job.recipe),
            "algorithm": algorithm.model_dump(),  # what the breaker has changed is in it
            "world_size": job.learner.world_size,
            "packages": package_versions(),
            # The learner draws nothing at random; these are what its order and its adapters' start were drawn from.
            "rng": {"seed": job.recipe.seed, "minibatches": f"{job.recipe.seed}/{job.step}"},
            "completions": [_completion(groups, sample) for sample in minibatch],
        }


def _completion(groups: Sequence[Any], sample: Sample) -> dict[str, Any]:
    """What a sample was, in words; only its place where that is not known."""
    if sample.place is None or sample.place[0] >= len(groups):
        return {"place": sample.place}
    number, index = sample.place
    group = groups[number]
    return {
        "place": sample.place,
        "prompt_id": group.prompt.id,
        "text": group.completions[index].text,
        "policy_version": group.completions[index].policy_version,
        "reward": group.rewards[index],
        "components": {name: scores[index] for name, scores in group.components.items()},
    }


def _expected(job: GrpoJob, seen: Mapping[str, Metric]) -> dict[str, float]:
    """Loss and gradient norm, as far as the step got."""
    found = {name: seen[name].value for name in (LOSS, GRAD_NORM) if name in seen}
    if SKIPPED_NORM in seen:
        found[GRAD_NORM] = seen[SKIPPED_NORM].value
    elif LOSS in found and GRAD_NORM not in found:
        gradients = job.learner.gradients()
        if gradients:  # the step was refused, and the gradient is still there
            found[GRAD_NORM] = norm(gradients)
    return found


def norm(gradients: Mapping[str, Any]) -> float:
    """As the learner computes it before it clips."""
    import torch

    return float(torch.nn.utils.get_total_norm(list(gradients.values())))


def _save_policy(job: GrpoJob, path: Path) -> bool:
    receipts = job.publisher.receipts
    if receipts and receipts[0].num_bytes > MOST_WEIGHTS:
        return False
    from posttrain.optimizer_files import DIRECTORY

    path.mkdir()
    job.learner.save(str(path.resolve()))
    (path / "trainer_state.pt").unlink(missing_ok=True)  # the optimizer has no part in loss and gradient
    shutil.rmtree(path / DIRECTORY, ignore_errors=True)
    return True


# --- on disk ----------------------------------------------------------------------------------------------------------


def write_bundle(directory: Path, contents: dict[str, Any], samples: Sequence[Sample], save_policy: Any) -> None:
    """Write a bundle, whole or not at all.

    Args:
        directory: that does not exist yet.
        contents: of bundle.json; secrets are taken out.
        samples: of the minibatch.
        save_policy: called with a path, writes the policy there and says whether it did.
    """
    from safetensors.torch import save_file

    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_tensors(samples), partial / SAMPLES)
    contents = {
        **contents,
        "samples": [_scalars(sample) for sample in samples],
        "has_policy": save_policy(partial / POLICY),
    }
    write_atomically(partial / BUNDLE, redact(json.dumps(contents, indent=1, default=str)))
    partial.rename(directory)


def _tensors(samples: Sequence[Sample]) -> dict[str, Any]:
    import numpy as np
    import torch

    found = {}
    for number, sample in enumerate(samples):
        for entry in fields(sample):
            value = getattr(sample, entry.name)
            if entry.name == "place" or value is None or isinstance(value, int | float):
                continue
            kind = torch.int64 if entry.name in INTEGERS else torch.float64
            found[f"{number}.{entry.name}"] = torch.tensor(
                np.asarray(value), dtype=kind
            )  # a copy; Ray's arrays are read-only
    return found


def _scalars(sample: Sample) -> dict[str, Any]:
    advantage = None if isinstance(sample.advantage, tuple) else float(sample.advantage).hex()
    return {"place": sample.place, "stale_tokens": sample.stale_tokens, "advantage": advantage}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read."""

    path: Path
    contents: Mapping[str, Any]
    recipe: GrpoRecipe
    algorithm: AlgorithmSection
    samples: tuple[Sample, ...]

    @property
    def expected(self) -> dict[str, float]:
        """Loss and gradient norm, as far as the step got."""
        return {name: float.fromhex(text) for name, text in self.contents["expected"].items()}


def read_bundle(path: Path) -> Bundle:
    """Read what `write_bundle` wrote.

    Raises:
        ValueError: it is no whole bundle of this format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        contents = json.loads((path / BUNDLE).read_text(encoding="utf-8"))
        if contents["format"] != FORMAT:
            raise ValueError(f"format {contents['format']!r} is not {FORMAT}")
        tensors = load_file(path / SAMPLES)
        samples = tuple(_sample(number, kept, tensors) for number, kept in enumerate(contents["samples"]))
        recipe = GrpoRecipe.model_validate(contents["recipe"])
        algorithm = AlgorithmSection.model_validate(contents["algorithm"])
        bundle = Bundle(path, contents, recipe, algorithm, samples)
        assert isinstance(bundle.expected, dict) and samples
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        SafetensorError,
        RecursionError,
    ) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise ValueError(
            f"{path}: no whole crash bundle ({why}); give a directory that holds {BUNDLE} and {SAMPLES}"
        ) from e
    return bundle


def _sample(number: int, kept: Mapping[str, Any], tensors: Mapping[str, Any]) -> Sample:
    import numpy as np

    values: dict[str, Any] = {
        "place": kept["place"] and tuple(kept["place"]),
        "stale_tokens": int(kept["stale_tokens"]),
    }
    if kept["advantage"] is not None:
        values["advantage"] = float.fromhex(kept["advantage"])
    for entry in fields(Sample):
        tensor = tensors.get(f"{number}.{entry.name}")
        if tensor is None:
            continue
        if entry.name in ("experts_TLK", "candidates_TC"):
            values[entry.name] = tensor.numpy().astype(np.int16 if entry.name == "experts_TLK" else np.int32)
        else:
            values[entry.name] = tuple(tensor.tolist())
    if "trained" in values:
        values["trained"] = tuple(map(bool, values["trained"]))
    return Sample(**values)
