"""Episodes: the policy and an environment take turns, for all unfinished episodes of a batch together.

    prompt -> turn (sampled) -> environment -> its messages as tokens -> turn (sampled) -> ... -> one Completion

An episode's `Completion` holds all tokens after the prompt, in the order the policy saw them. What the environment wrote is
marked as not trained and has logprob 0; what the policy sampled is kept as the sampler returned it, token by token. It ends
with a turn of the policy: what an environment says at the very end nobody has to read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data.turns import added_ids, require_turns
from posttrain.environment_pool import Answer, EnvironmentPool, Failure
from posttrain.environments import build_environment
from posttrain.recipe import EnvironmentSection
from posttrain.types import Completion, Episode, FinishReason, Message, Prompt, RewardStatus, SamplingParams

Generate = Callable[[Sequence[Prompt], SamplingParams], list[list[Completion]]]


@dataclass(slots=True)
class _State:
    """An episode under way."""

    prompt: Prompt
    number: int  # among the episodes of its prompt
    room: int  # tokens that may follow the prompt
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    experts_TLK: np.ndarray | None = None
    messages: list[Message] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    text: str = ""
    versions: list[int] = field(default_factory=list)
    candidates: list[np.ndarray | None] = field(default_factory=list)  # piece by piece; None: nothing was left out
    num_turns: int = 0
    reward: float = 0.0
    status: RewardStatus = "ok"
    detail: str = ""
    is_over: bool = False

    @property
    def left(self) -> int:
        return self.room - len(self.token_ids)

    def so_far(self) -> Prompt:
        """The prompt of the next turn."""
        # A name of its own: where completions have seeds, the episodes of a prompt must not all go the same way.
        name = f"{self.prompt.id}/{self.number}/{self.num_turns}"
        return replace(self.prompt, id=name, token_ids=(*self.prompt.token_ids, *self.token_ids))

    def fail(self, failure: Failure) -> None:
        self.status, self.detail, self.is_over = failure.status, failure.detail, True

    def add_turn(self, turn: Completion) -> None:
        """What the policy wrote. A turn that was cut off ends the episode: the environment does not get to see it."""
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.trained += [True] * len(turn.token_ids)
        self.experts_TLK = turn.experts_TLK  # of all tokens before as well
        self.messages.append({"role": "assistant", "content": turn.text})
        self.finish_reason, self.text = turn.finish_reason, turn.text
        self.versions += turn.versions
        self.candidates.append(turn.candidates_TC)
        self.num_turns += 1
        self.is_over = self.is_over or turn.finish_reason != "stop"

    def add_messages(self, ids: Sequence[int]) -> None:
        """What the environment wrote, if there is room for it and a token more."""
        if self.left < len(ids) + 1:
            self.finish_reason, self.is_over = "length", True
            return
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.trained += [False] * len(ids)
        self.versions += [self.versions[-1]] * len(ids)
        self.candidates.append(np.full((len(ids), 1), -1, np.int32))

    def completion(self) -> Completion:
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            text=self.text,
            policy_version=self.versions[0],
            experts_TLK=self.experts_TLK,
            token_versions=tuple(self.versions) if len(set(self.versions)) > 1 else None,
            candidates_TC=_joined(self.candidates),
            trained=tuple(self.trained),
            episode=Episode(self.reward, self.num_turns, tuple(self.messages), self.status, self.detail),
        )


def _joined(pieces: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Candidates [T, C] of turns and messages one after the other; None if the turns have none."""
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces):
        return None
    width = max(piece.shape[1] for piece in known)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in known])


@contextmanager
def episodes(
    section: EnvironmentSection | None, generate: Generate, tokenizer: Any, max_model_len: int
) -> Iterator[Generate]:
    """`generate` of single turns made into one of episodes for the length of the block; as it is without an environment.

    Raises:
        ValueError: an environment that does not exist, or a chat template with which several turns are not possible.
    """
    if section is None:
        yield generate
        return
    pool = EnvironmentPool(*build_environment(section))
    try:
        yield EpisodeSampler(
            generate,
            pool,
            tokenizer,
            max_turns=section.max_turns,
            max_turn_length=section.max_turn_length,
            max_model_len=max_model_len,
        ).generate
    finally:
        pool.close()


class EpisodeSampler:
    """Samples episodes where a sampler samples completions: `generate` has the signature of `SamplerPool.generate`.

    Args:
        generate: samples one turn, e.g. `SamplerPool.generate`.
        pool: the environments.
        tokenizer: of the policy; its chat template writes the environment's messages.
        max_turns: messages of the policy in an episode.
        max_turn_length: tokens of one of them; None sets no limit of its own.
        max_model_len: tokens of prompt and episode together, less one.

    Raises:
        ValueError: a chat template with which several turns are not possible.
    """

    def __init__(
        self,
        generate: Generate,
        pool: EnvironmentPool,
        tokenizer: Any,
        *,
        max_turns: int,
        max_turn_length: int | None = None,
        max_model_len: int,
    ) -> None:
        if max_turns > 1:
            require_turns(tokenizer)
        self._generate = generate
        self._pool = pool
        self._tokenizer = tokenizer
        self._max_turns = max_turns
        self._max_turn_length = max_turn_length
        self._max_model_len = max_model_len
        self._busy = threading.Lock()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """`params.num_generations` episodes of each prompt.

        Args:
            prompts: how the episodes begin.
            params: how a token is drawn; `max_completion_length` is of the whole episode, the environment's tokens included.

        Returns:
            For each prompt, in order, its episodes.
        """
        states = [
            _State(prompt, number, min(params.max_completion_length, self._max_model_len - len(prompt.token_ids) - 1))
            for prompt in prompts
            for number in range(params.num_generations)
        ]
        # An evaluation waits while a thread that samples ahead has the environments.
        with self._busy, self._pool.session([state.prompt for state in states]) as environments:
            for state, reset in zip(states, environments.resets, strict=True):
                if isinstance(reset, Failure):
                    state.fail(reset)
            live = list(enumerate(states))
            groups = self._generate(prompts, self._turn_params(params, params.num_generations, states))
            turns = [turn for group in groups for turn in group]
            while True:
                for (_, state), turn in zip(live, turns, strict=True):
                    state.add_turn(self._fitting(turn, state))
                asking = [(place, state) for place, state in live if not state.is_over]
                answers = environments.step([place for place, _ in asking], [state.text for _, state in asking])
                for (_, state), answer in zip(asking, answers, strict=True):
                    self._take(state, answer)
                live = [(place, state) for place, state in asking if not state.is_over]
                if not live:
                    break
                drawn = self._turn_params(params, 1, [state for _, state in live])
                turns = [group[0] for group in self._generate([state.so_far() for _, state in live], drawn)]
        done = iter([state.completion() for state in states])
        return [[next(done) for _ in range(params.num_generations)] for _ in prompts]

    def _turn_params(self, params: SamplingParams, num_generations: int, states: Sequence[_State]) -> SamplingParams:
        """One request's limit is the same for all, so it is that of the episode with most room; `_fitting` cuts the others."""
        longest = max(state.left for state in states)
        return replace(
            params,
            num_generations=num_generations,
            max_completion_length=min(longest, self._max_turn_length or longest),
        )

    def _fitting(self, turn: Completion, state: _State) -> Completion:
        """The turn as it would have been sampled with the room that its own episode has left."""
        if len(turn.token_ids) <= state.left:
            return turn
        ids = turn.token_ids[: state.left]
        before = len(state.prompt.token_ids) + len(state.token_ids)
        return replace(
            turn,
            token_ids=ids,
            logprobs=turn.logprobs[: state.left],
            finish_reason="length",
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
            experts_TLK=None if turn.experts_TLK is None else turn.experts_TLK[: before + len(ids) - 1],
            token_versions=None if turn.token_versions is None else turn.token_versions[: state.left],
            candidates_TC=None if turn.candidates_TC is None else turn.candidates_TC[: state.left],
        )

    def _take(self, state: _State, answer: Answer) -> None:
        if isinstance(answer, Failure):
            state.fail(answer)
            return
        state.reward += answer.reward
        state.messages += answer.messages
        if answer.done or state.num_turns == self._max_turns:
            state.is_over = True
            return
        try:
            ids = added_ids(self._tokenizer, state.prompt.messages, answer.messages, state.token_ids[-1])
        except ValueError as error:  # messages that the chat template cannot write are the environment's fault
            state.fail(Failure("crash", str(error)))
            return
        state.add_messages(ids)
