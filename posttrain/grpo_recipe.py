"""The recipe of GRPO."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from posttrain.algorithms import POLICY_LOSSES, expand
from posttrain.grpo_sections import (
    CriticSection,
    CurriculumSection,
    GrpoCheckpointSection,
    LearnerSection,
    TeacherSection,
)
from posttrain.lora_section import LoraSection
from posttrain.sections import (
    DatasetSection,
    EnvironmentSection,
    EvalSection,
    Fraction,
    ModelSection,
    NonNegative,
    NonNegativeInt,
    Number,
    OptimizerSection,
    Positive,
    PositiveInt,
    Recipe,
    RewardSection,
    RouterSection,
    SamplerSection,
    Section,
    Tracker,
    no_bool,
    require_checkpoint,
)


class RolloutSection(Section):
    """Prompts x generations of one step. Sampling keys as in TRL's GRPOConfig."""

    num_prompts: PositiveInt = 32  # per step
    num_generations: PositiveInt = 16
    max_completion_length: PositiveInt = 128
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0  # below 1 top_k is needed too
    top_k: NonNegativeInt = 0  # 0 keeps the whole vocabulary
    request_seeds: bool = False  # completions depend on seed, prompt and policy version alone: resuming repeats them
    max_lag: NonNegativeInt = 0  # versions that samples may be older than the policy that trains on them
    in_flight_updates: bool = False  # publish while samplers generate; their completions go on with the new weights
    cache_on_update: Literal["keep", "recompute"] = "keep"  # keys and values of what is being generated then
    oversampling: Annotated[Number, Field(ge=1, le=2)] = 1.0  # groups in the samplers for each that a step waits for
    max_carries: PositiveInt = 1  # versions that a group which a step did not wait for may live through

    @property
    def stale_by(self) -> str:
        """The key by which samples may be older than the policy that trains on them, and its value; else empty."""
        if self.max_lag:
            return f"rollout.max_lag={self.max_lag}"
        return f"rollout.oversampling={self.oversampling:g}" if self.oversampling > 1 else ""

    @model_validator(mode="after")
    def _updates_meet_something(self) -> RolloutSection:
        if self.in_flight_updates and not self.max_lag:
            raise ValueError(
                "in_flight_updates with max_lag=0: nothing is being generated when the weights are published; set max_lag: 1 "
                "or more, or leave it out"
            )
        if self.cache_on_update == "recompute" and not (self.in_flight_updates or self.oversampling > 1):
            raise ValueError(
                "cache_on_update: recompute has no meaning without in_flight_updates or oversampling; remove it"
            )
        if self.max_carries > 1 and self.oversampling == 1:
            raise ValueError(f"max_carries={self.max_carries} has no meaning without oversampling; remove it")
        if self.request_seeds and self.oversampling > 1:
            raise ValueError(
                f"oversampling={self.oversampling:g} with request_seeds: which groups are finished first is a matter of the "
                f"machine, so nothing would repeat; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _candidates_are_bounded(self) -> RolloutSection:
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"top_p={self.top_p:g} without top_k: the tokens that could be sampled are kept for the learner, and without "
                f"a bound that may be the whole vocabulary at each place; set top_k as well, e.g. 64"
            )
        return self


class AlgorithmSection(Section):
    """What is optimised. A preset writes the keys of a published algorithm (see posttrain/algorithms.py)."""

    preset: str | None = None
    policy_loss: str = "clip"  # clip, sequence_clip, cispo, reinforce, or module:function
    epsilon: Positive = 0.2  # lower clip range
    epsilon_high: Positive | None = None  # upper clip range; None takes epsilon
    baseline: Literal["group_mean", "leave_one_out", "none", "critic"] = "group_mean"
    gamma: Fraction = 1.0  # critic: discount of a token's later rewards
    gae_lambda: Fraction = 1.0  # critic: 1 trusts the rewards that came, 0 what the critic expects
    scale_rewards: Literal["group", "batch", "none"] = "group"  # divide by the deviation of the group, of the batch
    whiten_advantages: bool = False  # mean 0 and deviation 1 over all tokens of the batch
    loss_aggregation: Literal["token", "sequence", "fixed"] = "token"  # see docs/grpo.md
    beta: NonNegative = 0.001  # weight of the KL to the reference policy
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    distill_coef: NonNegative = 0.0  # weight of the teacher's logprob less the policy's in each token's advantage
    reference_refresh_steps: NonNegativeInt = 0  # the policy becomes the reference every so many steps; 0: never
    entropy_coef: NonNegative = 0.0  # weight of the entropy, which is maximised
    old_policy: Literal["learner", "sampler"] = "learner"  # whose logprobs the ratio is taken to
    importance: Literal["none", "truncate", "mask"] = "none"  # weight old policy / sampler: TIS, IcePop
    importance_cap: Annotated[Number, Field(ge=1)] = 2.0  # its upper bound
    importance_floor: Fraction = 0.5  # mask: its lower bound
    off_policy_threshold: Positive | None = None  # DeepSeek-V3.2: nats per token; None masks no sample
    target_kl: Positive | None = None  # nats per token from old to new policy, beyond which the batch is left
    drop_zero_signal_groups: bool = False  # leave out groups whose rewards are all equal
    dynamic_sampling_batches: PositiveInt = 1  # sample up to so many batches until the groups with signal fill one
    num_minibatches: PositiveInt = 4  # optimizer steps per pass over a rollout batch
    num_iterations: PositiveInt = 1  # passes over a rollout batch

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, section: Any) -> Any:
        return expand(section)

    @model_validator(mode="after")
    def _keys_fit(self) -> AlgorithmSection:
        if self.policy_loss not in POLICY_LOSSES and ":" not in self.policy_loss:
            raise ValueError(
                f"policy_loss={self.policy_loss!r} is unknown; choose one of {', '.join(POLICY_LOSSES)}, or module:function"
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r} with kl_in: reward: the reward of a token takes the log-ratio itself; "
                f"set kl_estimator: k1"
            )
        if self.baseline == "critic" and (self.scale_rewards != "none" or self.drop_zero_signal_groups):
            raise ValueError(
                "baseline: critic compares with what the critic expects and not with a group; set scale_rewards: none and "
                "drop_zero_signal_groups: false (whiten_advantages scales over the batch)"
            )
        if self.baseline != "critic" and (self.gamma, self.gae_lambda) != (1.0, 1.0):
            raise ValueError(
                f"gamma={self.gamma:g} and gae_lambda={self.gae_lambda:g} have no meaning without baseline: critic; remove"
            )
        if self.old_policy == "sampler" and self.importance != "none":
            raise ValueError(
                f"importance: {self.importance} with old_policy: sampler: the ratio is the sampler's already; take one"
            )
        if self.dynamic_sampling_batches > 1 and not self.drop_zero_signal_groups:
            raise ValueError(
                f"dynamic_sampling_batches={self.dynamic_sampling_batches} replaces groups without signal; set "
                f"drop_zero_signal_groups: true as well, or leave it out"
            )
        if self.policy_loss == "reinforce" and self.num_minibatches * self.num_iterations > 1:
            raise ValueError(
                f"policy_loss: reinforce takes samples of the policy as it is, so one optimizer step for each batch; set "
                f"num_minibatches and num_iterations to 1 (now {self.num_minibatches} and {self.num_iterations}), or take clip"
            )
        return self

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class GrpoRouterSection(RouterSection):
    """The router in RL. By default it routes as it is and its weights train; the correction bias stays."""

    replay: bool = False  # the learner uses the experts that the sampler chose
    bias_counts: Literal["learner", "sampler"] = "learner"  # whose choices move the bias; sampler needs replay

    @model_validator(mode="after")
    def _counts_are_there(self) -> GrpoRouterSection:
        if self.bias_counts == "sampler" and not (self.replay and self.bias_update_speed):
            raise ValueError(
                "bias_counts: sampler counts replayed experts to move the correction bias; set replay: true and a "
                "bias_update_speed as well, or leave it out"
            )
        return self


class ParitySection(Section):
    """When the run must stop because sampler and learner are not the same policy."""

    max_logprob_gap: Positive = 1e-4  # per token, divided by max(1, |logprob|); canary and trained tokens
    near_tie_margin: NonNegative = 1e-5  # a flipped expert is a tie when the two scores differ by no more than this
    min_routing_agreement: Fraction = 0.999
    # The whole batch in a forward pass of its own before it is trained on, or what is trained on first in the forward pass
    # of its training.
    measured_on: Literal["batch", "first_minibatch"] = "batch"
    canary_sequences: PositiveInt = 8
    canary_length: Annotated[int, BeforeValidator(no_bool), Field(ge=2)] = 64  # tokens


BreakerAction = Literal["mask", "publish", "rollback", "stop"]


class BreakerSection(Section):
    """What to do when the policy that samples and the one that trains come apart (see posttrain/breaker.py)."""

    max_kl: Positive | None = None  # mismatch/kl, nats per token
    min_effective_sample_size: Fraction = 0.0  # mismatch/effective_sample_size
    actions: Annotated[tuple[BreakerAction, ...], Field(min_length=1)] = ("mask", "publish", "rollback", "stop")
    healthy_steps: PositiveInt = 5  # steps within the limits after which the first action comes first again

    @model_validator(mode="after")
    def _has_limits(self) -> BreakerSection:
        if self.max_kl is None and not self.min_effective_sample_size:
            raise ValueError("a breaker without limits never trips; set max_kl or min_effective_sample_size")
        return self


class AuditSection(Section):
    """A verifier that the policy is not trained on looks at a sample of completions (see posttrain/audit.py)."""

    verifier: RewardSection
    num_samples: PositiveInt = 64  # completions a step
    pass_score: Number = 1.0  # verifier score of a right completion
    window: PositiveInt = 10  # steps: the first so many are the baseline, the last so many are compared with it
    max_drop: Annotated[Number, Field(gt=0)] = 0.1  # of the verifier's mean, of the share in format; rise of repetition
    max_length_ratio: Annotated[Number, Field(gt=1)] = 3.0  # of completion lengths against the baseline, either way
    on_alarm: Literal["warn", "stop"] = "warn"


class FaultsSection(Section):
    """Deliberate faults, to see that the safety net holds. Leave out in real runs."""

    skip_publication: PositiveInt | None = None  # the samplers pretend to load this version and keep the old weights
    router_noise: Positive | None = None  # deviation of noise that samplers add to the router weights they load
    noisy_versions: tuple[NonNegativeInt, ...] = ()  # router_noise: only of these versions; none named: of all

    @model_validator(mode="after")
    def _noise_is_there(self) -> FaultsSection:
        if self.noisy_versions and self.router_noise is None:
            raise ValueError(f"noisy_versions={list(self.noisy_versions)} without router_noise; set that too")
        return self


class GrpoRecipe(Recipe):
    """Group relative policy optimisation."""

    stage: Literal["grpo"] = "grpo"
    max_steps: PositiveInt
    model: ModelSection
    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    rewards: tuple[RewardSection, ...] = ()  # at least one without an environment
    environment: EnvironmentSection | None = None  # several turns; its reward is one more
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    router: GrpoRouterSection = GrpoRouterSection()
    curriculum: CurriculumSection | None = None
    learner: LearnerSection = LearnerSection()
    lora: LoraSection | None = None  # adapters train; merged weights are published and saved
    sampler: SamplerSection = SamplerSection()
    parity: ParitySection = ParitySection()
    critic: CriticSection | None = None  # for algorithm.baseline: critic; None takes the defaults there
    teacher: TeacherSection | None = None
    breaker: BreakerSection | None = None
    audit: AuditSection | None = None
    eval: EvalSection | None = None
    checkpoint: GrpoCheckpointSection = GrpoCheckpointSection()
    faults: FaultsSection = FaultsSection()
    # Completions of a step of which samples/ keeps every token: text, logprobs, advantage. Whole groups, trained ones first.
    log_token_completions: NonNegativeInt | Literal["all"] = 64
    ray_address: str | None = None  # None: the cluster of the surrounding job, else a local Ray is started
    report_to: tuple[Tracker, ...] = ()

    @property
    def samples_per_step(self) -> int:
        return self.rollout.num_prompts * self.rollout.num_generations

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> GrpoRecipe:
        rows, parts = self.samples_per_step, self.algorithm.num_minibatches
        if rows % parts:
            raise ValueError(
                f"rollout.num_prompts x rollout.num_generations = {rows} samples do not divide into "
                f"algorithm.num_minibatches={parts}; choose a divisor of {rows}"
            )
        alone = self.rollout.num_generations < 2 and not self.algorithm.distill_coef
        if alone and self.algorithm.baseline in ("group_mean", "leave_one_out"):
            raise ValueError(
                f"rollout.num_generations={self.rollout.num_generations} with algorithm.baseline={self.algorithm.baseline}: a "
                f"completion is compared with others of its prompt; give 2 or more, or take baseline: critic"
            )
        if self.rollout.max_completion_length >= self.sampler.max_model_len:
            raise ValueError(
                f"rollout.max_completion_length={self.rollout.max_completion_length} leaves no room for a prompt in "
                f"sampler.max_model_len={self.sampler.max_model_len}; raise sampler.max_model_len"
            )
        if self.learner.row_length < self.sampler.max_model_len:
            raise ValueError(
                f"learner.row_length={self.learner.row_length} cannot hold a sample of sampler.max_model_len="
                f"{self.sampler.max_model_len} tokens; raise learner.row_length or lower sampler.max_model_len"
            )
        if self.parity.canary_length >= self.sampler.max_model_len:
            raise ValueError(
                f"parity.canary_length={self.parity.canary_length} does not fit sampler.max_model_len="
                f"{self.sampler.max_model_len}; lower parity.canary_length"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> GrpoRecipe:
        if self.lora is None:
            return self
        if self.lora.dropout:
            raise ValueError(
                f"lora.dropout={self.lora.dropout:g}: the policy that is scored and trained must be the one that samples, "
                f"which has no dropout; set it to 0"
            )
        if self.lora.quantization is not None:
            raise ValueError(
                f"lora.quantization: {self.lora.quantization}: samplers get the policy with adapters merged, which weights in "
                f"4 bits cannot be; leave it out"
            )
        if self.learner.parallel == "fsdp":
            raise ValueError(
                "lora with learner.parallel: fsdp: adapters are not spread over ranks; set learner.parallel: ddp"
            )
        if self.algorithm.reference_refresh_steps and self.algorithm.beta:
            raise ValueError(
                f"lora with algorithm.reference_refresh_steps={self.algorithm.reference_refresh_steps}: the reference is the "
                f"policy without adapters and cannot be renewed; set reference_refresh_steps: 0"
            )
        if self.router.bias_update_speed:
            raise ValueError(
                f"lora with router.bias_update_speed={self.router.bias_update_speed:g}: what is below the adapters stays, and "
                f"the reference needs it; set bias_update_speed: 0"
            )
        if self.router.freeze and "router" in (self.lora.targets or ()):
            raise ValueError("router.freeze: true contradicts lora.targets with router; remove one")
        return self

    @model_validator(mode="after")
    def _offloading_and_sharing_fit(self) -> GrpoRecipe:
        has_reference = bool(self.algorithm.beta) and self.lora is None
        if self.learner.offload_reference and not has_reference and self.teacher is None:
            why = "adapters need no second model" if self.lora else f"algorithm.beta={self.algorithm.beta:g} needs none"
            raise ValueError(f"learner.offload_reference: there is no reference ({why}) and no teacher; remove it")
        if self.learner.parallel == "fsdp" and self.algorithm.baseline == "critic":
            raise ValueError(
                "learner.parallel: fsdp with algorithm.baseline: critic: the critic is not spread over ranks; set "
                "learner.parallel: ddp"
            )
        if self.learner.context_parallel_size > 1 and self.algorithm.baseline == "critic":
            raise ValueError(
                "learner.context_parallel_size with algorithm.baseline: critic: the critic computes whole rows; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_heard(self) -> GrpoRecipe:
        if self.algorithm.distill_coef and self.teacher is None:
            raise ValueError(
                f"algorithm.distill_coef={self.algorithm.distill_coef:g} without a teacher; add teacher: "
                f"{{model_name_or_path: ...}}, or set it to 0"
            )
        if self.teacher is not None and not self.algorithm.distill_coef:
            raise ValueError(
                "a teacher without algorithm.distill_coef is not listened to; set that, e.g. by the preset "
                "on_policy_distillation, or remove the section"
            )
        return self

    @model_validator(mode="after")
    def _lag_is_corrected(self) -> GrpoRecipe:
        algorithm = self.algorithm
        uncorrected = algorithm.importance == "none" and algorithm.old_policy == "learner"
        stale = self.rollout.stale_by
        if stale and uncorrected:
            raise ValueError(
                f"{stale} trains on samples of older policies, uncorrected; set "
                f"algorithm.importance: truncate (or mask), or algorithm.old_policy: sampler"
            )
        if stale and algorithm.policy_loss == "reinforce" and algorithm.old_policy == "sampler":
            raise ValueError(
                "policy_loss: reinforce has no ratio, so old_policy: sampler corrects nothing; set importance: truncate"
            )
        return self

    @model_validator(mode="after")
    def _nothing_else_is_scored(self) -> GrpoRecipe:
        if self.parity.measured_on == "batch":
            return self
        algorithm = self.algorithm
        needs = {
            f"algorithm.old_policy: {algorithm.old_policy}": algorithm.old_policy == "learner",
            f"algorithm.beta={algorithm.beta:g}": bool(algorithm.beta),
            "algorithm.baseline: critic": algorithm.baseline == "critic",
            "algorithm.distill_coef": bool(algorithm.distill_coef),
            "breaker": self.breaker is not None,
        }
        found = [name for name, is_needed in needs.items() if is_needed]
        if found:
            raise ValueError(
                f"parity.measured_on: first_minibatch with {found[0]}: that asks for logprobs of the whole batch before it is "
                f"trained on; set parity.measured_on: batch, or algorithm.old_policy: sampler without beta, critic, teacher "
                f"and breaker"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> GrpoRecipe:
        require_checkpoint(self.model, "GRPO")
        for index, dataset in enumerate(self.datasets):
            dataset.refuse(f"datasets.{index}", "worked_fraction", "careless_fraction")
        if self.eval is not None:
            self.eval.check_fits(self.sampler, during_training=True)
            if self.eval.environment is not None:
                raise ValueError(
                    "eval.environment: GRPO evaluates with the environment it is trained in; write `environment` at the top"
                )
            if self.environment is not None and self.eval.names_a_grader:
                raise ValueError(
                    "eval.reward: with an environment its episodes are what is evaluated; remove it, or evaluate single turns "
                    "with python -m eval"
                )
        if self.environment is not None and self.rollout.oversampling > 1:
            raise ValueError(
                f"rollout.oversampling={self.rollout.oversampling:g} with an environment: episodes are not carried over a "
                f"publication; set oversampling: 1"
            )
        if not self.rewards and self.environment is None:
            raise ValueError("rewards: none; name at least one, or an environment")
        if self.critic is not None and self.algorithm.baseline != "critic":
            raise ValueError(
                f"a critic has no use with algorithm.baseline={self.algorithm.baseline}; set algorithm.baseline: critic (or "
                f"algorithm: ppo), or remove the section"
            )
        if self.checkpoint.keep_best and not (self.eval and self.eval.eval_steps):
            raise ValueError("checkpoint.keep_best: nothing says which is best; add an eval section with eval_steps")
        labels = Counter(reward.label for reward in self.rewards)
        if self.environment is not None and "environment" in labels:
            raise ValueError("rewards: one is named 'environment', as the environment's own reward is; give it a name")
        known = (*labels, *(["environment"] if self.environment is not None else []))
        if self.curriculum is not None and self.curriculum.reward not in (None, *known):
            raise ValueError(
                f"curriculum.reward={self.curriculum.reward!r} is none of the rewards; choose one of {', '.join(known)}"
            )
        twice = [label for label, count in labels.items() if count > 1]
        if twice:
            raise ValueError(f"rewards: {labels[twice[0]]} are named {twice[0]!r}; give each its own name")
        return self
