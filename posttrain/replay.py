"""Run one bad optimizer step again: the same samples and weights through the learner, on the CPU of any machine.

    python -m posttrain.replay runs/x/crash/step-12-minibatch-1

Loss and gradient norm come out bit for bit where the run had one learner rank on a CPU and the same torch; of several ranks,
or of a GPU, to rounding. Nothing is stepped or written. Exit codes: 0 the same, 1 something differs, 2 no bundle, or one that
cannot be replayed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from posttrain.bundles import GRAD_NORM, LOSS, POLICY, Bundle, norm, read_bundle
from posttrain.threads import thread_environment


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came out."""

    found: dict[str, float]  # loss, gradient norm
    expected: dict[str, float]
    notes: tuple[str, ...]  # why it may differ, for people

    @property
    def is_same(self) -> bool:
        """Bit for bit, and NaN where there was NaN."""
        return all(self.found[name].hex() == value.hex() for name, value in self.expected.items())


def require_no_code(bundle: Bundle) -> None:
    """Refuse a bundle that would have code run which is not this project's.

    Raises:
        ValueError: its recipe lets the checkpoint's code run, or names a loss of its own.
    """
    loss = bundle.algorithm.policy_loss
    if bundle.recipe.model.trust_remote_code or ":" in loss:
        what = "the code of its checkpoint" if bundle.recipe.model.trust_remote_code else f"the loss {loss!r}"
        raise ValueError(f"{bundle.path}: replaying it would run {what}; read that first, then add --trust-code")


def replay(bundle: Bundle) -> Replayed:
    """Pack the samples as the run did, and take loss and gradient.

    Raises:
        ValueError: the policy is not in the bundle, or was trained through adapters.
    """
    recipe = bundle.recipe
    if recipe.lora is not None:
        raise ValueError(
            f"{bundle.path}: the run trained adapters, which are merged in the bundle; it can only be looked at"
        )
    if not (bundle.path / POLICY / "config.json").is_file():
        raise ValueError(
            f"{bundle.path}: the policy is not in it (it was too large, or its learner was gone); put a checkpoint of "
            f"version {bundle.contents['policy_version']} there as {POLICY}"
        )
    import torch

    from posttrain.learner import Learner
    from posttrain.packing import pack

    torch.set_num_threads(recipe.learner.num_threads)
    section = recipe.learner.model_copy(
        update={
            "parallel": "ddp",
            "num_workers": 1,
            "num_gpus": 0,
            "offload_optimizer": False,
            "offload_reference": False,
        }
    )
    build = partial(
        Learner,
        recipe.model.model_copy(update={"model_name_or_path": str(bundle.path / POLICY)}),
        recipe.optimizer,
        reference_path=None,
        router_section=recipe.router,
        temperature=recipe.rollout.temperature,
        max_completion_length=recipe.rollout.max_completion_length,
        total_steps=1,
        seed=recipe.seed,
    )
    notes = _notes(bundle)
    try:
        learner = build(section)
    except ValueError as error:
        if "by nan" not in str(error):
            raise
        # The look at the head, without which logits cannot be computed chunk by chunk, needs a policy that gives numbers.
        section = section.model_copy(update={"logits_chunk": None, "share_prompts": False})
        learner = build(section)
        notes.append("the policy gives NaN whatever it reads: look at the step before")
    batches = pack(
        bundle.samples,
        world_size=int(bundle.contents["world_size"]),
        max_tokens_per_microbatch=recipe.learner.max_tokens_per_microbatch,
        row_length=recipe.learner.row_length,
        pad_token_id=0,
        with_experts=recipe.router.replay,
        share_prompts=section.share_prompts,
    )
    loss = sum(learner.forward_backward(batch, bundle.algorithm)[LOSS].value for batch in batches)
    return Replayed({LOSS: loss, GRAD_NORM: norm(learner.gradients())}, bundle.expected, tuple(notes))


def _notes(bundle: Bundle) -> list[str]:
    import torch

    notes = []
    if bundle.contents["world_size"] > 1:
        notes.append(f"the run had {bundle.contents['world_size']} learner ranks, which add in another order")
    then = bundle.contents["packages"].get("torch")
    if then != torch.__version__:
        notes.append(f"the run had torch {then}, and this is {torch.__version__}")
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.replay", description="run one bad optimizer step again")
    parser.add_argument("bundle", type=Path, help="its directory, e.g. runs/x/crash/step-12-minibatch-1")
    parser.add_argument("--trust-code", action="store_true", help="code that the bundle's recipe names may run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        bundle = read_bundle(options.bundle)
        if not options.trust_code:
            require_no_code(bundle)
        os.environ.update(thread_environment(bundle.recipe.learner.num_threads))  # before torch starts its threads
        outcome = replay(bundle)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        texts = {
            name: [value.hex() for value in (outcome.expected.get(name), outcome.found[name]) if value is not None]
            for name in outcome.found
        }
        print(json.dumps({"identical": outcome.is_same, "recorded_and_replayed": texts, "notes": outcome.notes}))
        return 0 if outcome.is_same else 1
    contents = bundle.contents
    print(
        f"step {contents['step']}, minibatch {contents['minibatch']}, {len(bundle.samples)} samples: {contents['reason']}"
    )
    for name, value in outcome.found.items():
        before = outcome.expected.get(name)
        same = "was not recorded" if before is None else "the same" if before.hex() == value.hex() else "DIFFERENT"
        print(f"{name:<16} recorded {before!r:<24} replayed {value!r:<24} {same}")
    for note in outcome.notes:
        print(f"note: {note}")
    return 0 if outcome.is_same else 1


if __name__ == "__main__":
    sys.exit(main())
