"""A reward of a recipe: calling it, checking what it says, and putting several together."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

from posttrain.types import Completion, Group, Prompt, RewardResult, RewardStatus
from rewards.errors import RewardError
from rewards.forms import Form, form_of
from rewards.resolve import GIVEN, anchored, resolve, resolve_once

RESERVED = ("completion", "completions", "answer", "answers", "metadata")  # names that no column of the data may have


class Reward(Protocol):
    """What a reward function of the plain form looks like; see `rewards.forms` for the others."""

    def __call__(self, completion: str, answer: str | None, /, **metadata: Any) -> float | RewardResult: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One completion to be judged."""

    completion: str
    answer: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One reward of a recipe. Building it resolves the function, so a wrong name fails before anything is sampled.

    Raises:
        ValueError: a name that does not resolve, a weight that is not finite, a clip that is no interval, kwargs that the
            function does not name.
    """

    name: str  # under which it is logged, `reward/<name>/mean`
    function: str  # "module:function", "path/to/file.py:function" or a published name
    weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] | None = None  # of the score, before the weight
    requires: Mapping[str, float] = field(
        default_factory=dict
    )  # other reward -> the score it must reach for this to count

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight must be a finite number, got {self.weight}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"reward {self.name!r}: clip must be [lower, upper], got {list(self.clip)}")
        object.__setattr__(self, "function", anchored(self.function))
        function = resolve(self.function)
        parameters = inspect.signature(function).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        named = [name for name in named if name not in GIVEN[form_of(function)]]
        for key in self.kwargs:
            if key not in named:
                options = f"its options are {', '.join(named)}" if named else "it has no options"
                raise ValueError(f"reward {self.name!r}: {self.function} has no option {key!r}; {options}")
        # The options of other forms may come from the record.
        needed = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in self.kwargs]
        if needed and form_of(function) == "batch":
            raise ValueError(f"reward {self.name!r}: {self.function} needs the option {needed[0]!r}; give it in kwargs")

    @property
    def form(self) -> Form:
        return form_of(resolve_once(self.function))

    def warm_up(self) -> None:
        """Import the function and, if it has an attribute `warm_up`, call that with the recipe's options.

        It is for what takes long and can be shared: worker processes are copies of the one in which it was called.
        """
        prepare = getattr(resolve_once(self.function), "warm_up", None)
        if prepare is not None:
            prepare(**self.kwargs)

    def __call__(self, completion: str, answer: str | None, metadata: Mapping[str, Any]) -> RewardResult:
        """Score one completion, in this process and without a time limit.

        Raises:
            RewardError: the function raised; chained.
            ValueError: it returned no finite number, or the metadata use a reserved name.
        """
        return self.score([Item(completion, answer, metadata)])[0]

    def score(self, items: Sequence[Item]) -> list[RewardResult]:
        """What the function says in one call. Raises what `__call__` raises.

        Args:
            items: one for a plain or async function, a whole group for a grouped one, any number for a batched one.
        """
        if self.form == "async":
            return asyncio.run(self.score_async(items))
        arguments, options = self._call(items)
        try:
            value = resolve_once(self.function)(*arguments, **options)
        except Exception as error:
            raise self._raised(error, items) from error
        return self._checked(value, items)

    async def score_async(self, items: Sequence[Item]) -> list[RewardResult]:
        """`score` of an async function."""
        arguments, options = self._call(items)
        try:
            value = await resolve_once(self.function)(*arguments, **options)
        except Exception as error:
            raise self._raised(error, items) from error
        return self._checked(value, items)

    def _call(self, items: Sequence[Item]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken = sorted({name for item in items for name in RESERVED if name in item.metadata})
        if taken:
            raise ValueError(f"metadata of a record may not be named {taken[0]!r}; rename that column of the data")
        first = items[0]
        if self.form == "batch":
            columns = [
                list(column)
                for column in zip(*((i.completion, i.answer, dict(i.metadata)) for i in items), strict=True)
            ]
            return tuple(columns), dict(self.kwargs)
        if self.form == "group":
            own = {name: [item.metadata[name] for item in items] for name in PER_COMPLETION if name in first.metadata}
            return ([i.completion for i in items], first.answer), {**first.metadata, **own, **self.kwargs}
        return (first.completion, first.answer), {**first.metadata, **self.kwargs}

    def _raised(self, error: Exception, items: Sequence[Item]) -> RewardError:
        return RewardError(
            f"reward {self.name!r} ({self.function}) raised {type(error).__name__}: {error}; "
            f"completion {_shorten(items[0].completion)}"
        )

    def _checked(self, value: Any, items: Sequence[Item]) -> list[RewardResult]:
        if self.form in ("single", "async"):
            return [self._checked_one(value, items[0].completion)]
        if not isinstance(value, Sequence) and hasattr(value, "tolist"):
            value = value.tolist()  # an array or a tensor
        if not isinstance(value, Sequence) or len(value) != len(items):
            found = f"{len(value)} results" if isinstance(value, Sequence) else f"a {type(value).__name__}"
            raise ValueError(
                f"reward {self.name!r} ({self.function}) returned {found} for {len(items)} completions; it must return a "
                f"list with one result for each, in their order"
            )
        return [self._checked_one(one, item.completion) for one, item in zip(value, items, strict=True)]

    def _checked_one(self, value: Any, completion: str) -> RewardResult:
        result = value if isinstance(value, RewardResult) else None
        score = result.score if result is not None else value
        if not isinstance(score, numbers.Real) or not _is_finite(score):
            awaited = "; it is async inside a plain function: write async def" if inspect.isawaitable(value) else ""
            raise ValueError(
                f"reward {self.name!r} ({self.function}) returned {score!r:.120} ({type(score).__name__}) for completion "
                f"{_shorten(completion)}; it must return a finite number or a RewardResult{awaited}"
            )
        if result is None:
            return RewardResult(float(score))
        if result.status not in get_args(RewardStatus):
            raise ValueError(
                f"reward {self.name!r} ({self.function}) returned the status {result.status!r:.60}; it must be one of "
                f"{', '.join(get_args(RewardStatus))}"
            )
        return RewardResult(float(score), result.status, str(result.detail))


PER_COMPLETION = ("finish_reason", "completion_length")  # metadata that differ within a group


def _is_finite(score: numbers.Real) -> bool:
    try:
        return math.isfinite(score)
    except (OverflowError, ValueError):  # a whole number that no float holds
        return False


def _shorten(text: str, limit: int = 120) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def to_item(prompt: Prompt, completion: Completion) -> Item:
    """What a reward gets to see of a completion."""
    metadata = {
        **prompt.metadata,
        "messages": prompt.messages,
        "finish_reason": completion.finish_reason,
        "completion_length": len(completion.sampled_ids),
    }
    return Item(completion.text, prompt.answer, metadata)


def combine(
    functions: Sequence[RewardFunction], results: Sequence[Sequence[RewardResult]]
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Weighted sums per completion, and the scores by reward name as the functions gave them.

    A reward counts with its score, clipped, times its weight; and not at all where a reward that it requires is below the
    score asked for.

    Args:
        functions: F reward functions with different names.
        results: [G][F], for each completion what each function said.

    Raises:
        ValueError: no function, two of one name, a requirement that names no reward, or a row of another length than F.
    """
    check_together(functions)
    totals = []
    for row in results:
        scores = {function.name: result.score for function, result in zip(functions, row, strict=True)}
        totals.append(sum(_contribution(function, scores) for function in functions))
    components = {function.name: tuple(row[place].score for row in results) for place, function in enumerate(functions)}
    return tuple(totals), components


def _contribution(function: RewardFunction, scores: Mapping[str, float]) -> float:
    if any(scores[name] < least for name, least in function.requires.items()):
        return 0.0
    score = scores[function.name]
    if function.clip is not None:
        score = min(max(score, function.clip[0]), function.clip[1])
    return function.weight * score


def check_together(functions: Sequence[RewardFunction]) -> None:
    """Refuse rewards that cannot be put together.

    Raises:
        ValueError: none, two of one name, or one that requires a reward that is not there.
    """
    names = [function.name for function in functions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards must be one or more with different names, got {names}")
    for function in functions:
        for other in function.requires:
            if other not in names or other == function.name:
                choices = [name for name in names if name != function.name]
                raise ValueError(
                    f"reward {function.name!r} requires {other!r}, which is no other reward; the others are {choices}"
                )


def score_completion(
    functions: Sequence[RewardFunction], prompt: Prompt, completion: Completion
) -> tuple[RewardResult, ...]:
    """[F] What each function says of one completion, in this process. Raises what `RewardFunction.__call__` raises."""
    return tuple(function.score([to_item(prompt, completion)])[0] for function in functions)


def score_group(functions: Sequence[RewardFunction], prompt: Prompt, completions: Sequence[Completion]) -> Group:
    """A prompt's G completions with their rewards, scored in this process and without time limits.

    Raises:
        RewardError: a function raised.
        ValueError: a function returned no finite number.
    """
    items = [to_item(prompt, completion) for completion in completions]
    columns = []
    for function in functions:
        calls = [items] if function.form in ("group", "batch") else [[item] for item in items]
        columns.append([result for call in calls for result in function.score(call)])
    return to_group(functions, prompt, completions, columns)


def to_group(
    functions: Sequence[RewardFunction],
    prompt: Prompt,
    completions: Sequence[Completion],
    results: Sequence[Sequence[RewardResult]],
) -> Group:
    """A group from what its rewards said.

    A completion that a reward with a weight could not judge (status "infrastructure") is not judged as a whole.

    Args:
        functions: F rewards.
        prompt: of the group.
        completions: [G].
        results: [F][G].
    """
    rewards, components = combine(functions, list(zip(*results, strict=True)))
    statuses = {
        function.name: tuple(result.status for result in row) for function, row in zip(functions, results, strict=True)
    }
    weighted = [statuses[function.name] for function in functions if function.weight]
    unjudged = frozenset(index for row in weighted for index, status in enumerate(row) if status == "infrastructure")
    return Group(prompt, tuple(completions), rewards, components, statuses, unjudged)
