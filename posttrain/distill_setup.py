"""How a distillation is put together: teacher, journals, engines, and what is refused before any of them is started."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from posttrain.distill_data import Problems, with_system_prompt
from posttrain.distill_job import DistillJob
from posttrain.endpoint_teacher import EndpointTeacher
from posttrain.errors import RunStopped
from posttrain.fault_log import FaultLog
from posttrain.flight_recorder import LOGS
from posttrain.journal import Journal
from posttrain.metrics import MetricsLog
from posttrain.recipe import DistillRecipe, ModelSection, RecipeError, RewardSection, RolloutSection
from posttrain.recipe_file import dump_recipe
from posttrain.reward_setup import build_rewards
from posttrain.run_dir import RunDir
from posttrain.teachers import LocalTeacher, RecordedTeacher, Teacher, checkpoint_digest
from posttrain.types import SamplingParams
from rewards.languages import count_words
from rewards.resolve import resolve

JOURNAL = "journal"  # in the run directory
GENERATIONS = "generations.jsonl"  # in the journal
_SCORED_BY = ("func", "kwargs", "timeout_seconds", "on_timeout", "on_crash")  # keys of a reward


@contextmanager
def start(recipe: DistillRecipe, run_dir: RunDir, problems: Problems, *, resume: bool) -> Iterator[DistillJob]:
    """Start the teacher and the rewards, open the journals, and stop all of it at the end.

    Raises:
        RunStopped: no prompts, an earlier run's answers are there, or with --resume none are or others.
        RecipeError: a prompt that the teacher's template cannot write, or an unknown language.
    """
    _check_rules(recipe)
    if not problems.asked:
        raise RunStopped(
            f"no prompt is left to be answered: {problems.counts}; give other datasets, or look at selection and at "
            f"{run_dir.path / 'contaminated.jsonl'}"
        )
    path = run_dir.path / JOURNAL / GENERATIONS
    if resume and not path.parent.is_dir():
        raise RunStopped(f"--resume: there is no {path.parent}; start without --resume")
    if not resume and path.exists():
        raise RunStopped(
            f"{path} holds answers of an earlier run: add --resume, or give another output_dir, or delete {run_dir.path}"
        )
    try:
        teacher = build_teacher(recipe)
    except ValueError as error:
        raise RecipeError(f"teacher: {error}") from error
    _leave_out_too_long(problems, teacher, recipe)
    with ExitStack() as stack:
        common = {
            "teacher": {"kind": teacher.kind, "name": teacher.name, "version": teacher.version},
            "sampling": teacher.sampling,
            "system_prompt": recipe.generation.system_prompt,
            "seed": recipe.seed,
        }
        generations = Journal(path, "sample_id", common)
        stack.callback(generations.close)
        fingerprint = _of_rewards(recipe.rewards)
        judgements = Journal(
            path.with_name(f"judgements-{_digest(fingerprint)[:8]}.jsonl"), "sample_id", {"rewards": fingerprint}
        )
        stack.callback(judgements.close)
        run_dir.write_recipe(dump_recipe(recipe))
        run_dir.write_environment(recipe.seed)
        log = MetricsLog(run_dir.path, recipe.report_to, resume_step=len(generations) - 1 if resume else None)
        stack.callback(log.close)
        functions = build_rewards(recipe.rewards)
        job = DistillJob(
            recipe, run_dir, problems, teacher, functions, None, generations, judgements, log, found=len(generations)
        )
        job.missing()  # refuses answers to other prompts before engines are started
        _start_engines(job, stack)
        job.started = time.perf_counter()
        yield job


def build_teacher(recipe: DistillRecipe) -> Teacher:
    """The teacher, not started.

    Raises:
        ValueError: recordings that cannot be read.
    """
    drawn = recipe.generation
    if recipe.teacher.endpoint is not None:
        return EndpointTeacher(recipe.teacher.endpoint, drawn)
    if recipe.teacher.recordings is not None:
        return RecordedTeacher(recipe.teacher.recordings)
    from data.chat import render_prompt
    from posttrain.model.load import load_tokenizer

    model, sampler = recipe.teacher.model, recipe.sampler
    assert model is not None and model.model_name_or_path is not None
    name, trust = model.model_name_or_path, model.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    return LocalTeacher(
        name,
        checkpoint_digest(name, trust_remote_code=trust),
        lambda messages: render_prompt(tokenizer, messages),
        SamplingParams(drawn.max_completion_length, drawn.temperature, drawn.top_p, drawn.top_k, 1, recipe.seed),
        max_model_len=sampler.max_model_len,
        in_flight=sampler.num_workers * sampler.max_num_seqs,
    )


def _start_engines(job: DistillJob, stack: ExitStack) -> None:
    """Ray with the teacher's workers and the rewards' actors, as far as either is needed."""
    recipe, teacher = job.recipe, job.teacher
    is_local = isinstance(teacher, LocalTeacher)
    if isinstance(teacher, EndpointTeacher):
        teacher.num_samples = job.num_samples
        teacher.spent = float(job.usage()["cost"] or 0.0)
    is_complete = not job.missing() and not any(True for _ in job.unjudged(job.problems.asked))
    if is_complete or not (is_local or recipe.rewards):
        return
    from posttrain.cluster import SamplerPool, session
    from posttrain.reward_pool import RewardPool

    workers = recipe.sampler.cpus if is_local else 0
    judges = sum(reward.num_workers * reward.num_cpus for reward in recipe.rewards)
    stack.enter_context(session(recipe.ray_address, workers + judges, recipe.run_dir / LOGS))
    if recipe.rewards:
        job.rewards = RewardPool(recipe.rewards)
        stack.callback(job.rewards.stop)
    if isinstance(teacher, LocalTeacher) and job.missing():
        assert recipe.teacher.model is not None
        rollout = RolloutSection(num_generations=1, top_k=recipe.generation.top_k)
        teacher.pool = SamplerPool(
            _absolute(recipe.teacher.model),
            recipe.sampler,
            recipe.seed,
            rollout=rollout,
            report=FaultLog(job.run_dir.path),
        )
        teacher.pool.wait_until_ready()


def _absolute(model: ModelSection) -> ModelSection:
    """Workers have another working directory."""
    path = Path(str(model.model_name_or_path)).expanduser()
    return model.model_copy(update={"model_name_or_path": str(path.resolve())}) if path.exists() else model


def _check_rules(recipe: DistillRecipe) -> None:
    if recipe.rejection.language is not None:
        try:
            count_words("", recipe.rejection.language.language)
        except ValueError as error:
            raise RecipeError(f"rejection.language.language: {error}") from None


def _leave_out_too_long(problems: Problems, teacher: Teacher, recipe: DistillRecipe) -> None:
    """Prompts that the teacher has no room to answer."""
    prompt = recipe.generation.system_prompt
    try:
        fits = [teacher.reads_whole(with_system_prompt(p.record.messages, prompt)) for p in problems.asked]
    except ValueError as error:
        raise RecipeError(f"teacher: {error}") from error
    asked = [problem for problem, is_read in zip(problems.asked, fits, strict=True) if is_read]
    problems.counts["too_long"] = len(problems.asked) - len(asked)
    problems.asked = asked
    if not asked:
        raise RunStopped("every prompt is too long for the teacher: raise sampler.max_model_len")
    if not any(teacher.count(problem.record, recipe.num_generations) for problem in asked):
        raise RunStopped(
            f"{teacher.name} holds no answer to any of the {len(asked)} prompts: rows belong to a prompt by prompt_id, or by "
            f"the text in prompt; name these columns in teacher.recordings.columns"
        )


def _of_rewards(sections: Sequence[RewardSection]) -> list[dict[str, Any]]:
    """What scores depend on: functions, the files they are in, and options; not how scores are put together."""
    found = []
    for section in sections:
        source = inspect.getsourcefile(inspect.unwrap(resolve(section.func)))
        code = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
        scored_by = section.model_dump(mode="json", include=set(_SCORED_BY))
        found.append({"label": section.label, **scored_by, "code": code})
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
