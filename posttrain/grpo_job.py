"""What a GRPO run holds between steps, and how it is logged, saved, evaluated and ended; posttrain/grpo_setup.py starts it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prompts import PromptStream
from eval.report import write_report
from eval.suite import EvalResult, eval_prompts, evaluate
from posttrain import checkpoint
from posttrain.audit import Look, RewardAudit, write_look
from posttrain.best import BestCheckpoint
from posttrain.breaker import Breaker, Verdict
from posttrain.bundles import BundleKeeper
from posttrain.curriculum import PassRates
from posttrain.errors import RunInterrupted, RunStopped
from posttrain.flight_recorder import record
from posttrain.grpo_resume import REFERENCES
from posttrain.metrics import Metric, MetricsLog
from posttrain.parity import Mismatch
from posttrain.progress import Progress, before_after_table, paths_written
from posttrain.recipe import CriticSection, GrpoRecipe
from posttrain.rollout import Carrying, Generate, Rollout, Score
from posttrain.router_log import RouterLog
from posttrain.run_dir import RunDir
from posttrain.saving import Saver
from posttrain.skip_watch import SkipWatch
from posttrain.token_records import token_records
from posttrain.types import Prompt, Sample, SamplingParams

if TYPE_CHECKING:
    from posttrain.cluster import CriticGroup, LearnerGroup, SamplerPool, StepGauges
    from posttrain.weights import Publisher, Receipt


CRITIC = "critic"  # in a checkpoint


@dataclass
class GrpoJob:
    """The state of a run. `step` is also the policy version: both count publications after the first."""

    recipe: GrpoRecipe
    run_dir: RunDir
    log: MetricsLog
    router_log: RouterLog
    gauges: StepGauges
    tokenizer: Any
    prompts: PromptStream
    generate: Generate  # single turns, or episodes
    score_rewards: Score
    learner: LearnerGroup
    samplers: SamplerPool
    publisher: Publisher
    bundles: BundleKeeper
    audit: RewardAudit | None = None
    breaker: Breaker | None = None
    critic: CriticGroup | None = None
    best: BestCheckpoint | None = None
    rates: PassRates | None = None
    step: int = 0
    started: float = field(default_factory=time.perf_counter)
    last_metrics: dict[str, Metric] = field(default_factory=dict)
    saved_step: int = -1
    reference_step: int | None = None  # whose policy is the reference; None: the one that training started from
    made_with: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, see `posttrain.resume`
    cursor: Mapping[str, Any] = field(default_factory=dict)  # of the prompts, after those that were trained on

    def __post_init__(self) -> None:
        self.saver = Saver(self.run_dir.checkpoints, self.recipe.checkpoint.save_total_limit)
        self.skips = SkipWatch(self.recipe.optimizer, "optim")
        critic = self.recipe.critic or CriticSection()
        self.critic_skips = SkipWatch(critic.optimizer, "critic")

    @property
    def critic_warmup(self) -> int:
        """Steps at the start in which only the critic learns."""
        return self.recipe.critic.warmup_steps if self.recipe.critic else 0

    @property
    def sampling(self) -> SamplingParams:
        drawn = self.recipe.rollout
        return SamplingParams(
            max_completion_length=drawn.max_completion_length,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=drawn.top_k,
            num_generations=drawn.num_generations,
            seed=self.recipe.seed if drawn.request_seeds else None,
        )

    def take_prompts(self, n: int) -> Sequence[Prompt]:
        """The next prompts of the data.

        Raises:
            RunStopped: the curriculum leaves out everything, or a record cannot be rendered.
        """
        try:
            return self.prompts.take(n)
        except ValueError as error:
            if self.rates is None:
                raise RunStopped(f"datasets: {error}; mend that record, and go on with --resume") from error
            raise RunStopped(
                f"{error}: the curriculum leaves out every prompt; widen curriculum.min_pass_rate and max_pass_rate, set "
                f"retry_steps, or give other datasets, and go on with --resume"
            ) from error

    def prompt_cursor(self) -> dict[str, Any]:
        """Of the data; a resumed run begins with the prompts whose groups are not finished."""
        return self.prompts.state([prompt.id for prompt in self.samplers.carried])

    @property
    def carrying(self) -> Carrying | None:
        """With `rollout.oversampling`: how groups are begun and gone on with."""
        oversampling = self.recipe.rollout.oversampling
        if oversampling == 1:
            return None
        return Carrying(self.samplers.generate_enough, lambda: self.samplers.carried, oversampling)

    def next_rollout(self, rollouts: Iterator[Rollout]) -> Rollout:
        """The next one. The policy is between two steps: when no sampler is left it is saved as it is.

        Raises:
            RunInterrupted: no sampler is left.
        """
        try:
            return next(rollouts)
        except RunInterrupted:
            if 0 < self.step != self.saved_step and not (self.breaker and self.breaker.is_tripped):
                with suppress(RunInterrupted):  # the learner is gone too
                    self.save()
            raise

    def end_step(
        self,
        batch: Rollout,
        advantages: Sequence[Sequence[float]],
        trained_on: Sequence[Sample],
        learned: dict[str, Metric],
        receipts: Sequence[Receipt],
        seconds: dict[str, float],
        progress: Progress,
    ) -> None:
        """Log the step that just ended, show it, and save when it is time."""
        from posttrain.weights import publication_metrics

        samples = len(batch.completions)
        tokens = sum(len(completion.sampled_ids) for completion in batch.completions)
        metrics = {
            **batch.metrics(self.step - 1),
            **learned,
            **publication_metrics(receipts),
            **self.samplers.metrics(),
            **{name: Metric(value, "mean") for name, value in seconds.items()},
            "throughput/samples_per_second": Metric(samples / seconds["time/step"], "mean"),
            "throughput/tokens_per_second": Metric(tokens / seconds["time/step"], "mean"),
        }
        if self.rates is not None:
            self.rates.observe(batch.sampled, self.step)
            metrics |= self.rates.metrics()
        look = self.audit.look(self.step, batch.groups) if self.audit else None
        metrics |= look.metrics if look else {}
        is_best = False
        eval_steps = self.recipe.eval.eval_steps if self.recipe.eval else 0
        if eval_steps and self.step % eval_steps == 0 and self.step < self.recipe.max_steps:
            result = self.evaluate()
            assert result is not None
            is_best = self._is_best(result)
            metrics["eval/pass_at_1"] = Metric(result.pass_at_1.value, "last")
        self.log.log(self.step, metrics)
        self.router_log.log(self.step, self.learner.take_expert_loads())
        self.gauges.show(self.step, metrics)
        seed = f"{self.recipe.seed}/tokens/{self.step}"
        records = token_records(
            batch.groups, trained_on, self.tokenizer, limit=self.recipe.log_token_completions, seed=seed
        )
        self.run_dir.write_samples(self.step, batch.groups, advantages, records)
        self.last_metrics = metrics
        self.cursor = batch.cursor
        for complaint in batch.complaints:
            progress.note(complaint)
        progress.update(self.step, metrics)
        if look is not None:
            self._heed(look, progress)
        save_steps = self.recipe.checkpoint.save_steps
        # The first step is always saved: a full disk or a missing permission shows before hours are spent.
        is_due = self.step == 1 or (save_steps and self.step % save_steps == 0)
        # A checkpoint of doubtful steps would push out the one to go back to.
        if (is_due and not self._is_doubtful) or is_best:
            self.save()
            if self.step == 1:
                self.saver.require()

    @property
    def _is_doubtful(self) -> bool:
        """Whether the breaker has tripped at the present step, or the learner has not taken its last one."""
        tripped = self.breaker is not None and self.breaker.is_tripped
        return tripped or bool(self.skips.in_a_row or self.critic_skips.in_a_row)

    def _is_best(self, result: EvalResult) -> bool:
        """Whether the present step is to be kept for its pass@1; doubtful steps are not."""
        return self.best is not None and not self._is_doubtful and self.best.take(self.step, result.pass_at_1.value)

    def _heed(self, look: Look, progress: Progress) -> None:
        """Keep what the audit found, say what alarms began, and stop if the recipe asks for that."""
        write_look(self.run_dir.path, self.step, look)
        for alarm in look.alarms:
            progress.note(f"audit, step {self.step}: {alarm}")
        assert self.recipe.audit is not None
        if look.alarms and self.recipe.audit.on_alarm == "stop":
            self.save()
            self.saver.require()
            raise RunStopped(
                f"the audit of the rewards raised an alarm at step {self.step}: {look.alarms[0]}; see alarms.jsonl and "
                f"suspicious.jsonl, mend the reward, and go on with --resume --allow-change rewards, or from an earlier "
                f"checkpoint"
            )

    def look_for_mismatch(self, apart: Mismatch) -> Verdict:
        """Ask the breaker about the samples of the step, and do what concerns more than this step.

        Raises:
            RunStopped: the breaker stops the run, or is to roll back and there is no checkpoint to go to.
        """
        if self.breaker is None:
            return Verdict(None)
        verdict = self.breaker.look(apart, self.step)
        if verdict.action == "rollback":
            self.saver.settle()
            good = [
                path
                for path in checkpoint.whole(self.run_dir.checkpoints)
                if checkpoint.load_progress(path)["step"] < verdict.first_bad_version
            ]
            if not good:
                raise RunStopped(
                    f"{verdict.reason}; there is no checkpoint from before version {verdict.first_bad_version}"
                )
            checkpoint.require_sound(good[-1])
            self.learner.roll_back(str(good[-1].resolve()))
        if verdict.action == "stop":
            self.save()
            self.saver.require()
            raise RunStopped(
                f"{verdict.reason}: sampler and learner are too far apart to train; a checkpoint was saved, mend what the "
                f"causes point to (docs/grpo.md) and go on with --resume"
            )
        return verdict

    def renew_reference_when_due(self) -> None:
        """Make the policy the reference every `reference_refresh_steps` steps, and keep it for a resumed run."""
        every = self.recipe.algorithm.reference_refresh_steps
        if self.recipe.algorithm.beta and every and self.step % every == 0:
            self.learner.renew_reference()
            self.reference_step = self.step
            # As many as a run that goes on from an older checkpoint may need.
            saving = self.recipe.checkpoint
            kept = Saver(self.run_dir.path / REFERENCES, 2 + saving.save_total_limit * saving.save_steps // every)
            kept.save(self.step, self.learner.save, {})
            kept.require()  # no checkpoint from here on is worth anything without it

    def save(self) -> None:
        """Write a checkpoint of the present step; `saver.settle` waits for its end. On a full disk the run goes on."""
        record("checkpoint", step=self.step)
        state = {
            "prompts": self.cursor or self.prompts.state(),
            "reference_step": self.reference_step,
            **self.made_with,
            **{name: part.state() for name, part in self.kept_parts().items() if part is not None},
        }
        if self.saver.save(self.step, self._write, state, best=self.best.step if self.best else None):
            self.saved_step = self.step

    def kept_parts(self) -> dict[str, Any]:
        """What has a state of its own that goes into a checkpoint's progress, by its name there; None where it is not used."""
        return {
            **{"audit": self.audit, "breaker": self.breaker, "best": self.best, "curriculum": self.rates},
            **{"skips": self.skips, "critic_skips": self.critic_skips},
        }

    def _write(self, path: str) -> None:
        """The files of a checkpoint: the policy, and the critic in a directory of its own."""
        self.learner.save(path)
        if self.critic is not None:
            (Path(path) / CRITIC).mkdir()
            self.critic.save(str(Path(path) / CRITIC))

    def evaluate(self) -> EvalResult | None:
        """pass@1 and greedy accuracy of the policy that the samplers hold; None without an `eval` section."""
        section = self.recipe.eval
        if section is None:
            return None
        record("evaluation", step=self.step)
        if self.recipe.environment is not None:
            section = section.model_copy(update={"environment": self.recipe.environment})
        return evaluate(section, eval_prompts(section, self.tokenizer), self.generate)

    def evaluation_before(self) -> dict[str, Any] | None:
        """What `evaluate` found of the policy that the run began with; a run that goes on has it from then."""
        if self.step:
            return self.run_dir.read_evaluation("before")
        result = self.evaluate()
        return None if result is None else self.run_dir.write_evaluation("before", result)

    def finish(self, before: dict[str, Any] | None, after: EvalResult | None) -> None:
        """Save, write summary and report, and show what came of the run."""
        is_best = after is not None and self._is_best(after)
        if not self.saver.settle() or self.saved_step != self.step or is_best:
            self.save()
        self.saver.require()
        self.run_dir.write_waiting()
        results = {} if before is None else {"before": before}
        if after is not None:
            results["after"] = self.run_dir.write_evaluation("after", after)
        self.run_dir.write_summary(
            {
                "stage": "grpo",
                "seconds": time.perf_counter() - self.started,
                "steps": self.step,
                "finished": self.step >= self.recipe.max_steps,
                "metrics": {name: metric.value for name, metric in self.last_metrics.items()},
                "eval": results,
            }
        )
        report = write_report(self.run_dir.path)
        if results:
            before_after_table(results)
        paths_written(self.run_dir.path, [self.run_dir.checkpoints / checkpoint.LATEST, report])
