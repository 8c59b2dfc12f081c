"""What a GRPO run goes on with and goes back to: its reference, its place in the data, its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prompts import PromptStream
from posttrain import checkpoint
from posttrain.disk import warn
from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.recipe import GrpoRecipe
from posttrain.resume import Start

if TYPE_CHECKING:
    from posttrain.grpo_job import GrpoJob

REFERENCES = "references"  # in the run directory


def reference_of(recipe: GrpoRecipe, run_dir: Path, resumed_from: Path | None) -> str | None:
    """The reference policy: the one that training started from, or the one that was renewed last before the checkpoint.

    None where the recipe needs none.

    Raises:
        RunStopped: it was renewed, and is not there or damaged.
    """
    if not recipe.algorithm.beta:
        return None
    progress = checkpoint.load_progress(resumed_from) if resumed_from is not None else {"reference_step": None}
    references = checkpoint.whole(run_dir / REFERENCES)
    if "reference_step" not in progress:  # written by an earlier version
        kept = [path for path in references if checkpoint.load_progress(path)["step"] <= progress["step"]]
        return str(kept[-1]) if kept else recipe.model.model_name_or_path
    step = progress["reference_step"]
    if step is None:
        return recipe.model.model_name_or_path
    path = run_dir / REFERENCES / f"step-{step}"
    if path not in references:
        raise RunStopped(
            f"the reference of {resumed_from}, {path}, is not there, and with another one the run would learn something "
            f"else: put it back, or start a new run from that checkpoint (model.model_name_or_path)"
        )
    checkpoint.require_sound(path)
    return str(path)


def renewed_at(reference: str | None) -> int | None:
    """The step whose policy `reference_of` gave; None for the one that training started from."""
    path = Path(reference or "")
    return int(path.name.removeprefix("step-")) if path.parent.name == REFERENCES else None


def restore_prompts(prompts: PromptStream, cursor: Mapping[str, Any], begin: Start) -> None:
    """Go on in the data; from its beginning where the user has allowed other data.

    Raises:
        RunStopped: the data is other than when the checkpoint was saved.
    """
    try:
        prompts.restore(cursor)
    except ValueError as error:
        if not begin.has_changed("datasets", "seed"):
            raise RunStopped(f"--resume: {error}") from error
        warn("the data has changed, as allowed: it is read from its beginning")


def heed_skips(job: GrpoJob, learned: Mapping[str, Metric]) -> None:
    """Look at the optimizer steps that were not taken, and go back to the newest checkpoint when there are too many.

    Args:
        job: at the step that is being taken.
        learned: the metrics of its batch.

    Raises:
        RunStopped: going back did not help, there is nothing to go back to, or they are the critic's.
    """
    for place, prefix, watch in (
        ("optimizer", "optim", job.skips),
        ("critic.optimizer", "critic", job.critic_skips),
    ):
        action = watch.look(learned)
        skipped = learned[f"{prefix}/skipped"].value if f"{prefix}/skipped" in learned else 0
        if skipped:
            warn(
                f"step {job.step + 1}: {skipped:.0f} steps of the {place} were not taken: the loss or the gradient norm was "
                f"no number, or the norm beyond {place}.skip_grad_norm"
            )
        if action:
            _go_back(job, place, may=action == "rollback" and prefix == "optim")


def _go_back(job: GrpoJob, place: str, *, may: bool) -> None:
    """Take the weights of the newest whole checkpoint, or stop."""
    job.saver.settle()
    path = checkpoint.newest_sound(job.run_dir.checkpoints, start=True)
    if path is None or not may:
        newest = f"{path.name} is the newest whole checkpoint" if path else "there is no checkpoint yet"
        raise RunStopped(
            f"at step {job.step + 1} {place}.max_skipped_steps steps in a row were not taken, and there is nothing else to "
            f"try; {newest}: go on from it with a lower {place}.learning_rate (--resume --allow-change "
            f"{place}.learning_rate), or look at the samples of the last steps"
        )
    job.learner.roll_back(str(path.resolve()))
    warn(
        f"step {job.step + 1}: too many steps in a row were not taken; weights and optimizer are those of {path.name} again"
    )
