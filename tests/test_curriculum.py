"""Pass rates by hand, which prompts are left out, and a stream that passes them over and resumes exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.chat import build_tokenizer
from data.prompts import PromptStream
from data.records import Record
from posttrain.curriculum import PassRates
from posttrain.recipe import CurriculumSection
from posttrain.types import Group, Prompt


def group(name: str, *scores: float, unjudged: tuple[int, ...] = ()) -> Group:
    completions: Any = (None,) * len(scores)
    return Group(Prompt(name, (), (1,)), completions, scores, {"accuracy": scores}, unjudged=frozenset(unjudged))


def rates(**keys: Any) -> PassRates:
    return PassRates(CurriculumSection(**{"max_pass_rate": 0.9, **keys}))


def test_rates_by_hand() -> None:
    found = rates()
    assert found.rate("a") is None and found.is_wanted("a") and found.metrics() == {}
    found.observe(
        [group("a", 1.0, 0.0, 0.0, 0.0), group("b", 1.0, 1.0, 0.0, unjudged=(2,)), group("c", 0.0, unjudged=(0,))], 1
    )
    assert (found.rate("a"), found.rate("b"), found.rate("c")) == (0.25, 1.0, None)
    # Half of 1 of 4, and 4 of 4: 4.5 of 6.
    found.observe([group("a", 1.0, 1.0, 1.0, 1.0)], 2)
    assert found.rate("a") == pytest.approx(0.75)
    assert (found.is_wanted("a"), found.is_wanted("b")) == (True, False)
    metrics = {name: metric.value for name, metric in found.metrics().items()}
    assert metrics == {"curriculum/measured": 2, "curriculum/pass_rate": 0.875, "curriculum/wanted_fraction": 0.5}


def test_what_is_left_out_may_come_again() -> None:
    found = rates(min_pass_rate=0.1, min_completions=3, retry_steps=5)
    found.observe([group("a", 0.0, 0.0)], 1)
    assert found.is_wanted("a")  # two completions say too little
    found.observe([group("a", 0.0)], 2)
    assert not found.is_wanted("a")
    found.observe([], 7)
    assert found.is_wanted("a")


def test_the_state_survives_json() -> None:
    found, again = rates(retry_steps=3), rates(retry_steps=3)
    found.observe([group("a", 1.0), group("b", 0.0)], 4)
    again.restore(json.loads(json.dumps(found.state())))
    assert again.state() == found.state() and not again.is_wanted("a") and again.is_wanted("b")


def test_another_reward_may_decide() -> None:
    found = rates(reward="accuracy", pass_score=0.5)
    found.observe([group("a", 0.5, 0.4)], 1)
    assert found.rate("a") == 0.5
    with pytest.raises(ValueError, match="'fluency' is none of the rewards"):
        rates(reward="fluency").observe([group("a", 1.0)], 1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [({}, "does nothing"), ({"min_pass_rate": 0.5, "max_pass_rate": 0.4}, "exceeds max_pass_rate")],
)
def test_a_curriculum_without_meaning_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CurriculumSection(**keys)


def records(count: int = 12) -> list[Record]:
    return [
        Record(str(index), ({"role": "user", "content": f"{index}?"},), metadata={"level": index % 3})
        for index in range(count)
    ]


def test_the_stream_passes_over_and_resumes_exactly() -> None:
    tokenizer = build_tokenizer()
    found = rates()
    stream = PromptStream(records(), tokenizer, 0, is_wanted=found.is_wanted)
    plain = [prompt.id for prompt in PromptStream(records(), tokenizer, 0).take(36)]
    drawn = [prompt.id for prompt in stream.take(4)]
    assert drawn == plain[:4]
    found.observe([group(name, 1.0) for name in drawn[:3]], 1)
    state = stream.state(), found.state()
    following = [prompt.id for prompt in stream.take(20)]
    assert following == [name for name in plain[4:] if name not in drawn[:3]][:20]

    restored = rates()
    resumed = PromptStream(records(), tokenizer, 0, is_wanted=restored.is_wanted)
    resumed.restore(state[0])
    restored.restore(state[1])
    assert [prompt.id for prompt in resumed.take(20)] == following


def test_what_was_given_out_and_not_used_comes_first_again() -> None:
    stream = PromptStream(records(), build_tokenizer(), 0)
    drawn = [prompt.id for prompt in stream.take(6)]
    state = json.loads(json.dumps(stream.state([drawn[4], drawn[1]])))
    following = [prompt.id for prompt in stream.take(3)]
    resumed = PromptStream(records(), build_tokenizer(), 0)
    resumed.restore(state)
    assert [prompt.id for prompt in resumed.take(1)] == [drawn[4]]
    resumed.restore(resumed.state())
    assert [prompt.id for prompt in resumed.take(4)] == [drawn[1], *following]


def test_a_stream_of_which_nothing_is_wanted_says_so() -> None:
    stream = PromptStream(records(), build_tokenizer(), 0, is_wanted=lambda name: False)
    with pytest.raises(ValueError, match="none of the 12 records is wanted"):
        stream.take(1)


def test_each_epoch_goes_by_level() -> None:
    stream = PromptStream(records(), build_tokenizer(), 0, by_level=True)
    for _ in range(2):
        levels = [int(prompt.metadata["level"]) for prompt in stream.take(12)]
        assert levels == sorted(levels)
    with pytest.raises(ValueError, match="has no `level`"):
        PromptStream([Record("a", ({"role": "user", "content": "?"},))], build_tokenizer(), 0, by_level=True)
