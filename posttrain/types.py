"""What flows through the pipeline: one frozen dataclass per thing, with the shape and unit of every field.

Shape legend, used by names in the whole package:
  P prompts in a step, G completions per prompt (the group), T tokens of one sample, R rows of a packed microbatch,
  W tokens of a row (so a microbatch is R x W), L MoE layers, E routed experts, K experts chosen per token, V vocabulary,
  C candidate tokens that top-k and top-p left to choose from.

One GRPO step in these words: P `Prompt`s go to the sampler, which returns P x G `Completion`s; rewards turn each prompt
and its completions into one `Group`; the advantage turns a group into G `Sample`s; packing turns the samples of one
minibatch into a `TrainBatch` of `Microbatch`es.

Example: the prompt "2+3=" (5 tokens) with the completion "<think></think>5" + EOS (4 tokens) is a sample of T = 9
tokens; its `Completion` holds 4 token ids and 4 logprobs, and `experts_TLK` has shape [8, L, K], because the last
sampled token is never fed through the model.

This module imports nothing of the project, and neither torch nor numpy at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from posttrain.prompt_sharing import SharedRows

FinishReason = Literal["stop", "length", "abort"]
RewardStatus = Literal["ok", "timeout", "crash", "infrastructure"]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, already rendered to tokens."""

    id: str  # unique and stable, e.g. "chain_sum/2/train/17"
    messages: tuple[Message, ...]  # chat messages, each {"role": ..., "content": ...}
    token_ids: tuple[int, ...]  # chat template applied, generation prompt included
    answer: str | None = None  # the reference answer that rewards see
    metadata: Mapping[str, Any] = field(default_factory=dict)  # e.g. task, level, and what a scorer needs

    @property
    def kind(self) -> str:
        """The task and its level, where there are levels: what figures are given for apart."""
        task, level = self.metadata.get("task", "problems"), self.metadata.get("level")
        return f"{task}/{level}" if level is not None else str(task)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. Greedy is `temperature=0`."""

    max_completion_length: int  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    num_generations: int = 1  # completions per prompt
    seed: int | None = (
        None  # with one, a prompt's completions depend on nothing but it, the prompt's id and the policy version
    )

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens cannot be sampled. Which could is then kept with each completion."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer and everything the learner must know about how it was sampled."""

    token_ids: tuple[int, ...]  # [T_completion], EOS included when finish_reason is "stop"
    logprobs: tuple[
        float, ...
    ]  # [T_completion], natural log, under the distribution sampled from (temperature applied); 0 where not sampled
    finish_reason: FinishReason  # "length" means truncated at max_completion_length
    text: str  # decoded, special tokens left out
    policy_version: int  # number of publications before its first token was sampled
    experts_TLK: np.ndarray | None = None  # int16 [T_prompt + T_completion - 1, L, K], None for a dense model
    token_versions: tuple[int, ...] | None = None  # [T_completion], None when all are of policy_version
    candidates_TC: np.ndarray | None = None  # int32 [T_completion, C], -1 fills up; None when nothing was left out
    trained: tuple[bool, ...] | None = None  # [T_completion], False for an environment's tokens; None: all were sampled
    episode: Episode | None = None  # what an environment said; `text` then is the last of the policy's messages

    @property
    def versions(self) -> tuple[int, ...]:
        """[T_completion], the version of the policy that sampled each token; an environment's go with those before."""
        return self.token_versions or (self.policy_version,) * len(self.token_ids)

    def stale_tokens(self, version: int, *, keeps_cache: bool) -> int:
        """How many of the tokens, from the first on, are not those of this version of the policy.

        Args:
            version: the policy's.
            keeps_cache: whether later tokens saw keys and values that an earlier version had left: then none is.
        """
        older = sum(own != version for own in self.versions)
        return len(self.token_ids) if older and keeps_cache else older

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The tokens that the policy sampled."""
        return tuple(self.sampled(self.token_ids))

    def sampled(self, values: Sequence[int]) -> Sequence[int]:
        """Of values for each token, those of the tokens that the policy sampled."""
        return values if self.trained is None else tuple(compress(values, self.trained))


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to a message of the policy."""

    messages: Sequence[Message] = ()  # what the policy sees next, e.g. one of the role tool; none when done
    reward: float = 0.0  # finite; an episode's reward is the sum over its steps
    done: bool = False  # the episode is over


@dataclass(frozen=True, slots=True)
class Episode:
    """What came of several turns with an environment."""

    reward: float  # the sum over its steps
    num_turns: int  # messages of the policy
    messages: tuple[Message, ...]  # the policy's and the environment's, after the prompt
    status: RewardStatus = "ok"  # otherwise the environment failed, and the reward means nothing
    detail: str = ""  # for people: how it failed


@dataclass(frozen=True, slots=True)
class RewardResult:
    """What one reward function says of one completion."""

    score: float  # finite; its range is the function's own, 0 to 1 by convention
    status: RewardStatus = "ok"
    detail: str = ""  # for people: why


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its G completions and their rewards: the unit that is kept, filtered or re-queued."""

    prompt: Prompt
    completions: tuple[Completion, ...]  # [G]
    rewards: tuple[float, ...]  # [G], the combined reward
    components: Mapping[str, tuple[float, ...]]  # reward name -> [G], before clips and weights
    statuses: Mapping[str, tuple[RewardStatus, ...]] = field(default_factory=dict)  # reward name -> [G]
    unjudged: frozenset[int] = frozenset()  # completions that a reward could not judge: they are not trained on

    @property
    def judged_rewards(self) -> tuple[float, ...]:
        """The rewards that mean something, in their order."""
        return tuple(reward for index, reward in enumerate(self.rewards) if index not in self.unjudged)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the learner trains on: one completion with its advantage."""

    prompt_ids: tuple[int, ...]  # [T_prompt]
    completion_ids: tuple[int, ...]  # [T_completion]
    sampler_logprobs: tuple[float, ...]  # [T_completion], see Completion.logprobs
    advantage: float | tuple[float, ...]  # of the whole completion, or [T_completion] of its tokens
    experts_TLK: np.ndarray | None = None  # see Completion.experts_TLK
    old_logprobs: tuple[float, ...] | None = None  # [T_completion], the learner's own before the first minibatch
    ref_logprobs: tuple[float, ...] | None = None  # [T_completion], the reference policy's
    candidates_TC: np.ndarray | None = None  # see Completion.candidates_TC
    teacher_logprobs: tuple[float, ...] | None = None  # [T_completion], the teacher's
    values: tuple[float, ...] | None = None  # [T_completion], the critic's before the first minibatch
    returns: tuple[float, ...] | None = None  # [T_completion], what the critic is to learn
    stale_tokens: int = 0  # the first so many were sampled by an earlier version of the policy, or from its cache
    trained: tuple[bool, ...] | None = None  # see Completion.trained; values of other tokens mean nothing
    place: tuple[int, int] | None = None  # where it came from: which of the step's groups, which of its completions

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return len(self.completion_ids) if self.trained is None else sum(self.trained)

    def is_trained(self, place: int) -> bool:
        """Whether the completion's token at this place is."""
        return self.trained is None or self.trained[place]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """R packed rows of W tokens. A row holds whole samples one after the other, then padding.

    Position ids restart at 0 with each sample, which is what keeps samples from attending to each other; padding
    tokens have position 0 each. Entry [r, w] of the per-token fields speaks of predicting token w from those before it,
    so a sample's first token carries no loss. Entries outside `loss_mask_RW` are 0.
    """

    input_ids_RW: torch.Tensor  # int64
    position_ids_RW: torch.Tensor  # int64
    sample_ids_RW: torch.Tensor  # int64, index into the batch's samples, -1 for padding
    loss_mask_RW: torch.Tensor  # bool, True where the token is trained
    advantages_RW: torch.Tensor  # float32
    sampler_logprobs_RW: torch.Tensor  # float32
    old_logprobs_RW: torch.Tensor  # float32
    ref_logprobs_RW: torch.Tensor  # float32
    values_RW: torch.Tensor | None = None  # float32, of the critic; None without one
    returns_RW: torch.Tensor | None = None  # float32
    experts_NLK: torch.Tensor | None = None  # int16 [R x W, L, K], what the sampler chose; -1 where it chose nothing
    candidates_RWC: torch.Tensor | None = None  # int32, tokens that entry w was sampled from; all -1: the vocabulary
    shared: SharedRows | None = None  # what is computed instead of these rows, which then say where its results belong


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer step's work for one learner rank. The denominators are global: the same number on every rank."""

    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int  # trained tokens of the whole minibatch, over all ranks
    num_samples: int  # samples of the whole minibatch, over all ranks
