"""Episodes with a scripted policy and real environments: which tokens come out, which are trained, how an episode ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat import build_tokenizer, render_prompt
from posttrain.environment_pool import EnvironmentPool
from posttrain.environments import EnvironmentLimits, EnvironmentSpec
from posttrain.episode_reward import episode_scorer, is_success
from posttrain.episodes import EpisodeSampler
from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.recipe import EnvironmentSection
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Episode, Group, Prompt, SamplingParams

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
PARAMS = SamplingParams(64, num_generations=1)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def prompt(text: str, answer: str) -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(f"{text}{answer}", messages, render_prompt(TOKENIZER, messages), answer)


class Script:
    """A sampler that says what it is told; each token's logprob is minus its place among all that were sampled."""

    def __init__(self, *turns: Sequence[str], versions: Sequence[int] = (), with_candidates: bool = False) -> None:
        self.turns = iter(turns)
        self.versions = iter(versions)
        self.with_candidates = with_candidates
        self.asked: list[list[Prompt]] = []
        self.params: list[SamplingParams] = []

    def __call__(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        self.asked.append(list(prompts))
        self.params.append(params)
        texts = iter(next(self.turns))
        version = next(self.versions, 7)
        return [[self.say(p, next(texts), version, params) for _ in range(params.num_generations)] for p in prompts]

    def say(self, before: Prompt, text: str, version: int, params: SamplingParams) -> Completion:
        ids = (*ids_of(text), EOS)[: params.max_completion_length]
        total = len(before.token_ids) + len(ids)
        return Completion(
            ids,
            tuple(-float(len(before.token_ids) + place) for place in range(len(ids))),
            "stop" if ids[-1] == EOS else "length",
            TOKENIZER.decode(ids, skip_special_tokens=True),
            version,
            np.arange(total - 1, dtype=np.int16)[:, None, None],
            candidates_TC=np.array([[token, 3] for token in ids], np.int32) if self.with_candidates else None,
        )


Make = Callable[..., EpisodeSampler]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    pools = []

    def made(script: Any, spec: str = "rewards.guessing:Guessing", **changes: Any) -> EpisodeSampler:
        pools.append(EnvironmentPool(EnvironmentSpec(spec), EnvironmentLimits(1.0)))
        return EpisodeSampler(script, pools[-1], TOKENIZER, **{"max_turns": 4, "max_model_len": 128, **changes})

    yield made
    for pool in pools:
        pool.close()


def test_an_episode_token_by_token(make: Make) -> None:
    script = Script(["c"], ["8"], ["a"])
    ((done,),) = make(script).generate([prompt("5-j?", "a")], PARAMS)
    first, second = ids_of("<|user|>5-b?<|assistant|>"), ids_of("<|user|>9-b?<|assistant|>")
    turns = [(*ids_of(text), EOS) for text in ("c", "8", "a")]
    assert done.token_ids == (*turns[0], *first, *turns[1], *second, *turns[2])
    yes, no = (True, True), (False,)
    assert done.trained == (*yes, *no * len(first), *yes, *no * len(second), *yes)
    assert done.sampled_ids == turns[0] + turns[1] + turns[2]
    # A sampled token has the logprob that the sampler gave it, which here is its place; others 0.
    start = len(prompt("5-j?", "a").token_ids)
    places = [-float(start + place) for place in range(len(done.token_ids))]
    assert list(done.logprobs) == [place * trained for place, trained in zip(places, done.trained, strict=True)]
    assert done.experts_TLK is not None and len(done.experts_TLK) == start + len(done.token_ids) - 1
    assert (done.text, done.finish_reason, done.policy_version, done.token_versions) == ("a", "stop", 7, None)
    assert done.episode == Episode(
        1.0,
        3,
        tuple(
            {"role": role, "content": content}
            for role, content in [
                ("assistant", "c"),
                ("user", "5-b?"),
                ("assistant", "8"),
                ("user", "9-b?"),
                ("assistant", "a"),
            ]
        ),
    )
    # Each turn was asked for with exactly the tokens before it.
    asked = [prompts[0].token_ids for prompts in script.asked]
    whole = prompt("5-j?", "a").token_ids + done.token_ids
    assert all(whole[: len(ids)] == ids for ids in asked)
    assert [len(ids) for ids in asked] == [start, start + 2 + len(first), start + 4 + len(first) + len(second)]


def test_unfinished_episodes_go_on_together(make: Make) -> None:
    script = Script(["1", "2", "3", "4"], ["2", "5", "9"], ["9"])
    params = replace(PARAMS, num_generations=2)
    first, second = make(script).generate([prompt("1-9?", "2"), prompt("1-9?", "9")], params)
    assert [len(prompts) for prompts in script.asked] == [2, 3, 1]
    assert [drawn.num_generations for drawn in script.params] == [2, 1, 1]
    episodes = [completion.episode for completion in (*first, *second)]
    assert [episode and (episode.reward, episode.num_turns) for episode in episodes] == [(1, 2), (1, 1), (1, 3), (1, 2)]


def test_how_an_episode_ends(make: Make) -> None:
    task = [prompt("1-9?", "2")]
    start = len(task[0].token_ids)
    ((turns,),) = make(Script(["1"], ["9"]), max_turns=2).generate(task, PARAMS)
    assert (turns.finish_reason, turns.token_ids[-1]) == ("stop", EOS)  # max_turns: the last turn was finished
    # 2 + 6 + 2 tokens; what follows ("2-8?") would need 6 and one more.
    ((room,),) = make(Script(["1"], ["9"])).generate(task, replace(PARAMS, max_completion_length=16))
    assert (room.finish_reason, len(room.token_ids), room.text) == ("length", 10, "9")
    ((window,),) = make(Script(["1"], ["9"]), max_model_len=start + 17).generate(task, PARAMS)
    assert (window.finish_reason, len(window.token_ids)) == ("length", 10)
    # A turn that is cut off is not shown to the environment: 2 would have been right.
    script = Script(["2 and more"])
    ((cut,),) = make(script, max_turn_length=4).generate(task, PARAMS)
    assert (cut.finish_reason, cut.text, cut.episode and cut.episode.reward) == ("length", "2 an", 0.0)
    assert script.params[0].max_completion_length == 4


def test_room_is_each_episodes_own(make: Make) -> None:
    """All turns are asked for with one limit; a turn that has more than its episode has room for is cut to it."""
    long = "x" * 40
    script = Script(["1", "1234567"], [long, long])
    ((most, least),) = make(script).generate(
        [prompt("1-9?", "2")], replace(PARAMS, num_generations=2, max_completion_length=40)
    )
    # After 2 + 6 tokens one has room for 32; after 8 + 6 the other for 26, and it got 32 too.
    assert script.params[1].max_completion_length == 32
    for done, room in ((most, 32), (least, 26)):
        assert (len(done.token_ids), done.finish_reason, done.text) == (40, "length", "x" * room)
        assert len(done.logprobs) == 40 and done.experts_TLK is not None
        assert len(done.experts_TLK) == len(prompt("1-9?", "2").token_ids) + 40 - 1


def test_versions_and_candidates_stay_aligned(make: Make) -> None:
    script = Script(["1"], ["2"], versions=(3, 4), with_candidates=True)
    ((done,),) = make(script).generate([prompt("1-9?", "2")], PARAMS)
    assert done.trained is not None and done.candidates_TC is not None
    assert done.versions == (3,) * 8 + (4,) * 2 and done.policy_version == 3
    assert done.candidates_TC.shape == (10, 2)
    for token, row, trained in zip(done.token_ids, done.candidates_TC.tolist(), done.trained, strict=True):
        assert row == ([token, 3] if trained else [-1, -1])


WILD = """
import time
from posttrain.types import Step

class Wild:
    def reset(self, prompt): ...
    def step(self, text):
        if text == "hang":
            time.sleep(60)
        if text == "crash":
            raise KeyError("oh")
        role = "nobody" if text == "role" else "user"
        return Step([{"role": role, "content": "go on"}], reward=0.25)
"""


def test_failing_environments_leave_the_others_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "wild.py").write_text(WILD)
    script = Script(["hang", "crash", "role", "fine"], ["hm"])
    ((hang, crash, role, fine),) = make(script, f"{tmp_path}/wild.py:Wild", max_turns=2).generate(
        [prompt("?", "2")], replace(PARAMS, num_generations=4)
    )
    statuses = [completion.episode.status for completion in (hang, crash, role, fine) if completion.episode]
    assert statuses == ["timeout", "crash", "crash", "ok"]
    assert role.episode is not None and "unknown role nobody" in role.episode.detail
    assert fine.episode is not None and fine.episode.reward == 0.5

    section = EnvironmentSection(func="x:Y", weight=2.0, success_reward=0.5, max_failed_fraction=0.75)
    task = prompt("?", "2")
    scored = episode_scorer(section, None)([task], [[hang, crash, role, fine]])
    (group,) = scored.groups
    assert group.unjudged == {0, 1, 2} and group.judged_rewards == (1.0,)
    assert group.statuses["environment"] == ("timeout", "crash", "crash", "ok")
    values = {name: metric.value for name, metric in scored.metrics.items()}
    assert values["reward/environment/crash"] == 2 and values["reward/environment/mean"] == 0.5
    assert values["reward/unjudged"] == 3 and values["episode/turns_mean"] == 1.25
    assert "unknown role" in scored.complaints[0]
    assert [is_success(section, completion) for completion in (crash, fine)] == [False, True]
    with pytest.raises(RunStopped, match="failed in 3 of 4 episodes"):
        episode_scorer(section.model_copy(update={"max_failed_fraction": 0.5}), None)(
            [task], [[hang, crash, role, fine]]
        )


def test_the_environments_reward_is_one_of_several() -> None:
    def episode(reward: float, status: Any = "ok") -> Completion:
        return Completion((5,), (-1.0,), "stop", "x", 0, episode=Episode(reward, 1, (), status))

    def others(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scored:
        group = Group(
            prompts[0], tuple(completions[0]), (0.1, 0.2, 0.3), {"short": (1.0, 2.0, 3.0)}, unjudged=frozenset({2})
        )
        return Scored((group,), {"reward/short/mean": Metric(2.0, "mean")}, ("hm",))

    section = EnvironmentSection(func="x:Y", weight=0.5)
    scored = episode_scorer(section, others)([prompt("?", "2")], [[episode(1.0), episode(9.0, "crash"), episode(0.0)]])
    (group,) = scored.groups
    assert group.rewards[0] == pytest.approx(0.6) and group.unjudged == {1, 2}
    assert dict(group.components) == {"environment": (1.0, 9.0, 0.0), "short": (1.0, 2.0, 3.0)}
    assert scored.metrics["reward/short/mean"].value == 2.0 and scored.complaints[0] == "hm"
    assert scored.metrics["reward/environment/mean"].value == 0.5
