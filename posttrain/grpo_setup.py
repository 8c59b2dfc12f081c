"""How a GRPO run is put together: what is looked at before Ray starts, the actors, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prompts import PromptStream
from posttrain import checkpoint
from posttrain.audit import RewardAudit, forget_looks
from posttrain.best import BestCheckpoint
from posttrain.breaker import Breaker
from posttrain.bundles import BundleKeeper
from posttrain.curriculum import PassRates
from posttrain.distillation import require_same_vocabulary
from posttrain.episode_reward import episode_scorer
from posttrain.episodes import episodes
from posttrain.fault_log import FaultLog
from posttrain.flight_recorder import LOGS
from posttrain.grpo_job import CRITIC, GrpoJob
from posttrain.grpo_resume import reference_of, renewed_at, restore_prompts
from posttrain.metrics import MetricsLog
from posttrain.recipe import CriticSection, GrpoRecipe, ModelSection
from posttrain.recipe_file import dump_recipe
from posttrain.records import data_errors, load_records
from posttrain.resume import Start, made_with, start_from
from posttrain.rollout import Score
from posttrain.router_log import RouterLog
from posttrain.run_dir import RunDir

if TYPE_CHECKING:
    from posttrain.cluster import CriticGroup, LearnerGroup
    from posttrain.reward_pool import RewardPool


@dataclass(frozen=True)
class _Inputs:
    """What a run is started with; nothing of it needs Ray."""

    run_dir: RunDir
    begin: Start | None  # of a resumed run
    made_with: dict[str, Any]
    model: ModelSection  # to go on from: a checkpoint of this run, or the recipe's
    tokenizer: Any
    prompts: PromptStream
    rates: PassRates | None

    @property
    def resumed_from(self) -> Path | None:
        return self.begin.path if self.begin else None


@contextmanager
def start(recipe: GrpoRecipe, *, resume: bool, allow_change: Sequence[str] = ()) -> Iterator[GrpoJob]:
    """Start Ray, learner and samplers, publish the first version, and stop all of it at the end.

    Raises:
        RunStopped: resuming without a whole checkpoint, or with a recipe that means something else.
        ParityError: the samplers do not hold the learner's weights at the start.
    """
    from posttrain.cluster import SamplerPool, StepGauges, session
    from posttrain.reward_pool import RewardPool
    from posttrain.weights import Publisher, canary_sequences

    inputs = _inputs(recipe, resume=resume, allow_change=allow_change)
    run_dir, tokenizer = inputs.run_dir, inputs.tokenizer
    with session(recipe.ray_address, _cpus(recipe), run_dir.path / LOGS), ExitStack() as stack:
        fault_log = FaultLog(run_dir.path)
        samplers = SamplerPool(
            inputs.model,
            recipe.sampler,
            recipe.seed,
            recipe.faults,
            recipe.rollout,
            origin=recipe.model,
            report=fault_log,
        )
        reference = reference_of(recipe, run_dir.path, inputs.resumed_from)
        learner = _learner(recipe, inputs.model, reference)
        learner.report = fault_log
        critic = _critic(recipe, inputs.model, inputs.resumed_from)
        generate = stack.enter_context(
            episodes(recipe.environment, samplers.generate, tokenizer, recipe.sampler.max_model_len)
        )
        rewards = RewardPool(recipe.rewards) if recipe.rewards else None
        verifier = RewardPool([recipe.audit.verifier]) if recipe.audit else None
        for pool in (rewards, verifier):
            if pool is not None:
                stack.callback(pool.stop)
        nodes = {"learner": learner.wait_until_ready()}
        learner.require_shared(str(run_dir.path.resolve()))
        if critic is not None:
            nodes["critic"] = critic.wait_until_ready()
        nodes["sampler"] = samplers.wait_until_ready()
        run_dir.write_environment(recipe.seed, nodes=nodes)
        canary = canary_sequences(
            len(tokenizer), recipe.parity.canary_sequences, recipe.parity.canary_length, recipe.seed
        )
        publisher = Publisher(learner, samplers, recipe.parity, canary)
        step = checkpoint.load_progress(inputs.resumed_from)["step"] if inputs.resumed_from else 0
        log = MetricsLog(run_dir.path, recipe.report_to, resume_step=step if resume else None)
        stack.callback(log.close)
        job = GrpoJob(
            recipe=recipe,
            run_dir=run_dir,
            log=log,
            router_log=RouterLog(run_dir.path, resume_step=step if resume else None),
            gauges=StepGauges(run_dir.path.name),
            tokenizer=tokenizer,
            prompts=inputs.prompts,
            generate=generate,
            score_rewards=_score(recipe, rewards),
            learner=learner,
            samplers=samplers,
            publisher=publisher,
            bundles=BundleKeeper(run_dir.path),
            audit=RewardAudit(recipe.audit, verifier.score, recipe.seed) if recipe.audit and verifier else None,
            breaker=Breaker(recipe.breaker) if recipe.breaker else None,
            critic=critic,
            best=BestCheckpoint() if recipe.checkpoint.keep_best else None,
            rates=inputs.rates,
            step=step,
            saved_step=step,
            reference_step=renewed_at(reference),
            made_with=inputs.made_with,
        )
        if inputs.begin is not None:
            _go_on(job, inputs.begin)
        publisher.publish(step)
        yield job


def _inputs(recipe: GrpoRecipe, *, resume: bool, allow_change: Sequence[str]) -> _Inputs:
    """Look at everything that can be looked at before anything heavy starts, and write down what the run is."""
    from posttrain.model.load import load_tokenizer

    run_dir = RunDir(recipe.run_dir)
    if not resume:
        checkpoint.require_fresh(run_dir.checkpoints)
    made = made_with(recipe)
    begin = start_from(recipe, run_dir, made, allow_change, from_start=True) if resume else None
    run_dir.write_recipe(dump_recipe(recipe))
    run_dir.write_environment(recipe.seed)
    for place in (recipe.model, recipe.teacher, recipe.critic):
        if place is not None and place.model_name_or_path is not None:
            checkpoint.require_sound(place.model_name_or_path)
    path = str(begin.path) if begin and begin.path else recipe.model.model_name_or_path
    assert path is not None
    model = recipe.model.model_copy(update={"model_name_or_path": path})
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    if recipe.teacher is not None:
        of_teacher = load_tokenizer(recipe.teacher.model_name_or_path, trust_remote_code=model.trust_remote_code)
        require_same_vocabulary(tokenizer, of_teacher, recipe.teacher.model_name_or_path)
    rates = PassRates(recipe.curriculum) if recipe.curriculum else None
    with data_errors("datasets"):
        prompts = PromptStream(
            load_records(recipe.datasets, "train", recipe.seed),
            tokenizer,
            recipe.seed,
            is_wanted=rates.is_wanted if rates else None,
            by_level=recipe.curriculum is not None and recipe.curriculum.order == "level",
        )
    return _Inputs(run_dir, begin, made, model, tokenizer, prompts, rates)


def _go_on(job: GrpoJob, begin: Start) -> None:
    """Put everything that decides the future back as it was at the checkpoint. Without one the run begins again."""
    if not begin.path:
        return
    progress = checkpoint.load_progress(begin.path)
    job.learner.restore(str(begin.path.resolve()))
    if job.critic is not None:
        job.critic.restore(str(begin.path.resolve() / CRITIC))
    restore_prompts(job.prompts, progress["prompts"], begin)
    for name, part in job.kept_parts().items():
        if part is not None and name in progress:
            part.restore(progress[name])
    job.run_dir.forget_samples(job.step)
    forget_looks(job.run_dir.path, job.step)


def _score(recipe: GrpoRecipe, rewards: RewardPool | None) -> Score:
    """The rewards of the recipe, the environment's among them."""
    if recipe.environment is not None:
        return episode_scorer(recipe.environment, rewards.score if rewards else None)
    assert rewards is not None  # the recipe sees to it
    return rewards.score


def _cpus(recipe: GrpoRecipe) -> float:
    """What the actors of a run reserve."""
    rewards = [*recipe.rewards, *([recipe.audit.verifier] if recipe.audit else [])]
    trained = 2 if recipe.algorithm.baseline == "critic" else 1
    engines = trained * recipe.learner.num_workers * recipe.learner.num_cpus + recipe.sampler.cpus
    return engines + sum(reward.num_workers * reward.num_cpus for reward in rewards)


def _learner(recipe: GrpoRecipe, model: ModelSection, reference_path: str | None) -> LearnerGroup:
    from posttrain.cluster import LearnerGroup

    return LearnerGroup(
        recipe.learner,
        model=model,
        optimizer=recipe.optimizer,
        reference_path=reference_path,
        teacher_path=recipe.teacher.model_name_or_path if recipe.teacher else None,
        origin=recipe.model.model_name_or_path,
        lora=recipe.lora,
        router_section=recipe.router,
        temperature=recipe.rollout.temperature,
        max_completion_length=recipe.rollout.max_completion_length,
        total_steps=_total_steps(recipe),
        seed=recipe.seed,
    )


def _critic(recipe: GrpoRecipe, model: ModelSection, resumed_from: Path | None) -> CriticGroup | None:
    """The value model, where the recipe's algorithm has one."""
    from posttrain.cluster import CriticGroup

    if recipe.algorithm.baseline != "critic":
        return None
    section = recipe.critic or CriticSection()
    if resumed_from is not None:
        section = section.model_copy(update={"model_name_or_path": str(resumed_from.resolve() / CRITIC)})
    return CriticGroup(recipe.learner, model=model, section=section, total_steps=_total_steps(recipe), seed=recipe.seed)


def _total_steps(recipe: GrpoRecipe) -> int:
    """Optimizer steps of the whole run."""
    return recipe.max_steps * recipe.algorithm.num_minibatches * recipe.algorithm.num_iterations
