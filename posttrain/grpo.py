"""Reinforcement learning with GRPO (DeepSeekMath, arXiv 2402.03300; DeepSeek-R1, arXiv 2501.12948).

    python -m posttrain.grpo recipe.yaml [key.path=value ...] [--dry-run] [--resume]

A step: prompts are sampled from by the current policy, rewards score the completions, each completion's advantage is its
reward relative to its group, and the learner takes one optimizer step per minibatch of the rollout batch. Then the new
weights are published to the samplers, which is proved before they generate again. Generation and learning take turns, so
the sampler's policy is the learner's policy (lag 0), and that is measured on every trained token; with `rollout.max_lag` they
overlap, and each token knows the version that sampled it.

Departures from the paper, each a key of the recipe: the loss is a mean over all tokens rather than a mean of per-answer
means (`algorithm.loss_aggregation: sequence` restores it), and groups whose rewards are all equal may be left out
(`algorithm.drop_zero_signal_groups`).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from posttrain import advantages, distillation, grpo_setup, rollout
from posttrain.breaker import Verdict
from posttrain.cli import run_stage
from posttrain.grpo_job import GrpoJob
from posttrain.grpo_resume import heed_skips
from posttrain.interrupt import StopRequest, graceful_stop
from posttrain.metrics import Metric, merge
from posttrain.parity import Agreement, require_parity
from posttrain.progress import Progress
from posttrain.recipe import AlgorithmSection, GrpoRecipe
from posttrain.rollout import Rollout, Source
from posttrain.types import Sample


def run(recipe: GrpoRecipe, *, resume: bool = False, allow_change: Sequence[str] = ()) -> int:
    """Train as the recipe says. Returns the exit code: 0, or 130 when a signal ended the run early."""
    with graceful_stop() as stop, grpo_setup.start(recipe, resume=resume, allow_change=allow_change) as job:
        before = job.evaluation_before()
        with Progress("grpo", recipe.max_steps) as progress:
            train(job, stop, progress)
        after = None if stop else job.evaluate()
        job.finish(before, after)
    return 130 if stop else 0


def train(job: GrpoJob, stop: StopRequest, progress: Progress) -> None:
    """The loop, from the step the job stands at to the last."""
    recipe = job.recipe
    source = Source(
        job.take_prompts,
        job.generate,
        job.score_rewards,
        num_prompts=recipe.rollout.num_prompts,
        params=job.sampling,
        max_batches=recipe.algorithm.dynamic_sampling_batches,
        cursor=job.prompt_cursor,
        carrying=job.carrying,
    )
    steps = range(job.step, recipe.max_steps)
    stream = rollout.stream(source, steps, lambda: job.samplers.version, max_lag=recipe.rollout.max_lag)
    with closing(stream) as rollouts:
        while job.step < recipe.max_steps and not stop:
            start = time.perf_counter()
            batch = job.next_rollout(rollouts)
            batch_advantages = group_advantages(batch, recipe.algorithm)
            job.bundles.begin(batch)

            sampled = time.perf_counter()
            samples = samples_of(batch, batch_advantages, job)
            if recipe.parity.measured_on == "batch":
                samples, agreement = score(samples, job)
                verdict = job.look_for_mismatch(agreement[1])
                learned, _ = learn(samples, job, verdict)
            else:
                verdict = Verdict(None)
                learned, measured = learn(samples, job, verdict, measure=True)
                agreement = measured or score(samples, job)[1]  # of the batch where nothing of it could be trained on
            heed_skips(job, learned)
            learned |= {**agreement[0].metrics(), **agreement[1].metrics(), **distillation.metrics(samples)}

            trained = time.perf_counter()
            receipts = job.publisher.publish(job.step + 1)
            job.step += 1
            job.renew_reference_when_due()

            seconds = {
                "time/wait": sampled - start,
                "time/learn": trained - sampled,
                "time/publish": time.perf_counter() - trained,
                "time/step": time.perf_counter() - start,
            }
            job.end_step(batch, batch_advantages, samples, learned, receipts, seconds, progress)
            if verdict.action:
                progress.note(f"breaker, step {job.step}: {verdict.action}: {verdict.reason}")


def group_advantages(batch: Rollout, algorithm: AlgorithmSection) -> list[tuple[float, ...]]:
    """[P][G], each completion's advantage: its reward less the baseline, over a deviation if the recipe says so."""
    relative = partial(
        advantages.group_relative,
        # What a critic expects differs from token to token, see `token_advantages`.
        baseline="none" if algorithm.baseline == "critic" else algorithm.baseline,
        scale="group" if algorithm.scale_rewards == "group" else "none",
    )
    found = [advantages.among_judged(relative, group.rewards, group.unjudged) for group in batch.groups]
    if algorithm.scale_rewards == "batch":
        return advantages.over_deviation(found, [reward for group in batch.groups for reward in group.judged_rewards])
    return found


def samples_of(batch: Rollout, batch_advantages: Sequence[Sequence[float]], job: GrpoJob) -> list[Sample]:
    """The samples to train on, as they were sampled."""
    rows = [(number, *pair) for number, pair in enumerate(zip(batch.groups, batch_advantages, strict=True))]
    if job.recipe.algorithm.drop_zero_signal_groups:
        # When no group has signal all are scored, so that parity is still measured.
        rows = [row for row in rows if advantages.has_signal(row[1].judged_rewards)] or rows
    return [
        Sample(
            group.prompt.token_ids,
            completion.token_ids,
            completion.logprobs,
            advantage,
            completion.experts_TLK,
            trained=completion.trained,
            candidates_TC=completion.candidates_TC,
            stale_tokens=completion.stale_tokens(job.step, keeps_cache=job.recipe.rollout.cache_on_update == "keep"),
            place=(number, index),
        )
        for number, group, advantages_G in rows
        for index, (completion, advantage) in enumerate(zip(group.completions, advantages_G, strict=True))
        if index not in group.unjudged
    ]


def score(samples: Sequence[Sample], job: GrpoJob) -> tuple[list[Sample], Agreement]:
    """The samples with the learner's own logprobs (the ratio's old policy), the reference's and all that is made of them.

    Raises:
        ParityError: they are not what was sampled.
    """
    scores = job.learner.score(samples, near_tie_margin=job.recipe.parity.near_tie_margin)
    require_parity(scores.parity, job.recipe.parity)
    scored = [
        replace(
            sample,
            old_logprobs=scores.logprobs[index],
            ref_logprobs=scores.ref_logprobs.get(index),
            teacher_logprobs=scores.teacher_logprobs.get(index),
        )
        for index, sample in enumerate(samples)
    ]
    if job.critic is not None:
        values = job.critic.values(scored)
        scored = [replace(sample, values=values[index]) for index, sample in enumerate(scored)]
    return token_advantages(scored, job.recipe.algorithm), (scores.parity, scores.mismatch)


def token_advantages(samples: Sequence[Sample], algorithm: AlgorithmSection) -> list[Sample]:
    """Samples with an advantage for each token, where the recipe asks for what differs between tokens."""
    if algorithm.baseline == "critic":
        samples = [with_returns(sample, algorithm) for sample in samples]
    elif algorithm.kl_in == "reward" and algorithm.beta:
        paid = partial(advantages.with_kl_to_go, beta=algorithm.beta)
        samples = [replace(s, advantage=paid(s.advantage, s.old_logprobs or (), s.ref_logprobs or ())) for s in samples]
    if algorithm.distill_coef:
        taught = partial(distillation.with_teacher, coef=algorithm.distill_coef)
        samples = [
            replace(s, advantage=taught(s.advantage, s.old_logprobs or (), s.teacher_logprobs or ())) for s in samples
        ]
    if algorithm.whiten_advantages:
        rows = [advantages.of_tokens(sample.advantage, len(sample.completion_ids)) for sample in samples]
        white = advantages.whiten(rows, trained=[sample.trained for sample in samples])
        samples = [replace(s, advantage=row) for s, row in zip(samples, white, strict=True)]
    return list(samples)


def with_returns(sample: Sample, algorithm: AlgorithmSection) -> Sample:
    """The sample with advantages by what the critic expected, and with what the critic is to learn."""
    assert sample.old_logprobs is not None and sample.values is not None and isinstance(sample.advantage, float)
    reference = sample.ref_logprobs if algorithm.kl_in == "reward" else None
    rewards = advantages.token_rewards(sample.advantage, sample.old_logprobs, reference, algorithm.beta)
    # An environment's tokens are no decisions of the policy: time passes from one sampled token to the next.
    found, returns = advantages.generalized(
        advantages.only(rewards, sample.trained),
        advantages.only(sample.values, sample.trained),
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
    )
    return replace(
        sample,
        advantage=advantages.spread(found, sample.trained),
        returns=advantages.spread(returns, sample.trained),
    )


def learn(
    samples: list[Sample], job: GrpoJob, verdict: Verdict, *, measure: bool = False
) -> tuple[dict[str, Metric], Agreement | None]:
    """One optimizer step per minibatch; the minibatches are random parts of the rollout batch.

    With `algorithm.target_kl` the rest of a batch is left when the policy has moved that far from the one it was sampled by.
    What the breaker says comes first: "mask" leaves out the tokens whose ratio to the sampler is too far from 1; after
    "publish" and "rollback" nothing is learnt, and the same or the restored weights are published as the next version.

    Returns:
        metrics: of all minibatches.
        agreement: with `measure`, that of sampler and learner on the minibatch that is trained on first; None if none is.

    Raises:
        ParityError: with `measure`, the first minibatch is not what was sampled. No step has been taken on it.
    """
    algorithm = job.recipe.algorithm
    if verdict.action == "mask":
        algorithm = algorithm.model_copy(update={"importance": "mask", "old_policy": "learner"})
    elif verdict.action:
        return verdict.metrics(), None
    generator = random.Random(f"{job.recipe.seed}/{job.step}")
    metrics, agreement = [verdict.metrics()], None
    if job.critic is not None:
        metrics.append(fit_of_critic(samples))
    for _ in range(algorithm.num_iterations):
        order = generator.sample(samples, len(samples))
        for part in range(algorithm.num_minibatches):
            minibatch = order[part :: algorithm.num_minibatches]
            if job.critic is not None:
                metrics.append({**job.critic.forward_backward(minibatch), **job.critic.optim_step()})
            warming_up = job.step < job.critic_warmup
            if warming_up or not any(advantages.is_felt(sample.advantage) for sample in minibatch):
                continue
            with job.bundles.watch(job, minibatch, algorithm) as seen:
                if measure and agreement is None:
                    losses, agreement = job.learner.forward_backward_compared(
                        minibatch, algorithm, near_tie_margin=job.recipe.parity.near_tie_margin
                    )
                    seen.update(losses)
                    require_parity(agreement[0], job.recipe.parity)
                else:
                    losses = job.learner.forward_backward(minibatch, algorithm)
                    seen.update(losses)
                seen.update(job.learner.optim_step())
            metrics.append(dict(seen))
            if algorithm.target_kl is not None and losses["policy/kl_old"].value > algorithm.target_kl:
                return merge(metrics), agreement
    return merge(metrics), agreement


def fit_of_critic(samples: Sequence[Sample]) -> dict[str, Metric]:
    """How much of the differences between returns the critic foresaw."""
    values = [advantages.only(s.values or (), s.trained) for s in samples]
    returns = [advantages.only(s.returns or (), s.trained) for s in samples]
    return {"critic/explained_variance": Metric(advantages.explained_variance(values, returns), "mean")}


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("grpo", run, argv)


if __name__ == "__main__":
    sys.exit(main())
