"""The episode's reward as one of the rewards of a recipe, beside those that look at the last message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from posttrain.errors import RunStopped
from posttrain.metrics import Metric
from posttrain.recipe import EnvironmentSection
from posttrain.reward_pool import Scored
from posttrain.types import Completion, Episode, Group, Prompt

NAME = "environment"  # of the component: reward/environment/mean
FAILURES = ("timeout", "crash", "infrastructure")
Score = Callable[[Sequence[Prompt], Sequence[Sequence[Completion]]], Scored]


def episode_scorer(section: EnvironmentSection, others: Score | None) -> Score:
    """A function from prompts [P] and episodes [P][G] to groups with rewards, like `RewardPool.score`.

    Args:
        section: weight and bounds.
        others: the recipe's other rewards; None if there are none.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scored:
        counts, complaint = failures(completions)
        require_working(section, completions)
        if others is not None:
            scored = others(prompts, completions)
        else:
            pairs = zip(prompts, completions, strict=True)
            scored = Scored(
                tuple(Group(prompt, tuple(row), (0.0,) * len(row), components={}) for prompt, row in pairs), {}
            )
        groups = tuple(with_episodes(group, section.weight) for group in scored.groups)
        episodes = [episode_of(completion) for group in groups for completion in group.completions]
        judged = [episode.reward for episode in episodes if episode.status == "ok"]
        metrics = {
            **scored.metrics,
            **{f"reward/{NAME}/{status}": Metric(counts[status], "sum") for status in FAILURES},
            "reward/unjudged": Metric(sum(len(group.unjudged) for group in groups), "sum"),
            "episode/turns_mean": Metric(sum(episode.num_turns for episode in episodes) / len(episodes), "mean"),
        }
        if judged:
            metrics[f"reward/{NAME}/mean"] = Metric(sum(judged) / len(judged), "mean")
        return Scored(groups, metrics, (*scored.complaints, *([f"environment: {complaint}"] if complaint else [])))

    return score


def with_episodes(group: Group, weight: float) -> Group:
    """The group with the episodes' rewards added. One whose environment failed is not judged."""
    episodes = [episode_of(completion) for completion in group.completions]
    failed = frozenset(index for index, episode in enumerate(episodes) if episode.status != "ok")
    rewards = tuple(episode.reward for episode in episodes)
    return replace(
        group,
        rewards=tuple(own + weight * reward for own, reward in zip(group.rewards, rewards, strict=True)),
        components={NAME: rewards, **group.components},
        statuses={NAME: tuple(episode.status for episode in episodes), **group.statuses},
        unjudged=group.unjudged | failed,
    )


def episode_of(completion: Completion) -> Episode:
    """Raises ValueError for a completion of a single turn."""
    if completion.episode is None:
        raise ValueError("this completion is not of an episode; sample it with EpisodeSampler")
    return completion.episode


def is_success(section: EnvironmentSection, completion: Completion) -> bool:
    """Whether an episode reached `success_reward`, with an environment that worked."""
    episode = episode_of(completion)
    return episode.status == "ok" and episode.reward >= section.success_reward - 1e-9


def failures(completions: Sequence[Sequence[Completion]]) -> tuple[Counter[str], str]:
    """How many environments failed in which way, and the last of them in words."""
    episodes = [episode_of(completion) for group in completions for completion in group]
    failed = [episode for episode in episodes if episode.status != "ok"]
    words = f"{failed[-1].status}: {failed[-1].detail}" if failed else ""
    return Counter(episode.status for episode in failed), words


def require_working(section: EnvironmentSection, completions: Sequence[Sequence[Completion]]) -> None:
    """An environment that fails in most episodes is broken.

    Raises:
        RunStopped: more failed than `max_failed_fraction` allows.
    """
    counts, complaint = failures(completions)
    total = sum(len(group) for group in completions)
    if counts.total() > section.max_failed_fraction * total:
        raise RunStopped(
            f"the environment failed in {counts.total()} of {total} episodes, more than max_failed_fraction="
            f"{section.max_failed_fraction:g} allows; the last time: {complaint}; mend {section.func}, or raise "
            f"environment.max_failed_fraction"
        )
