"""From a name in a recipe to a checked number per completion: resolve, call, combine."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from posttrain.types import Completion, Group, Prompt, RewardResult

GIVEN = ("completion", "answer")  # what every reward receives by position


class Reward(Protocol):
    """What a reward function looks like."""

    def __call__(self, completion: str, answer: str | None, /, **metadata: Any) -> float | RewardResult: ...


class RewardError(RuntimeError):
    """A reward function raised, or could not judge because of its infrastructure; names the function."""


def resolve(spec: str) -> Reward:
    """The function that `module:function` or `path/to/file.py:function` names.

    Raises:
        ValueError: malformed name, nothing there, or not a function that takes (completion, answer, **metadata).
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"reward {spec!r} must be module:function or path/to/file.py:function")
    module = _load_file(place, spec) if place.endswith(".py") else _load_module(place, spec)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"reward {spec!r}: {place} has no {attribute!r}{_nearest(attribute, names)}")
    function = getattr(module, attribute)
    _check_signature(function, spec)
    return function


@cache
def _resolve_once(spec: str) -> Reward:
    return resolve(spec)


def _load_file(place: str, spec: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"reward {spec!r}: file {place!r} does not exist in {Path.cwd()}{_nearest(path.name, files)}")
    return _execute_file(path)


@cache
def _execute_file(path: Path) -> ModuleType:
    name = f"_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # the path ends with .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(place: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A missing import inside the reward's own module is that module's fault: let it show.
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise
        parent = place.rpartition(".")[0]
        siblings: list[str] = []
        if parent and parent != error.name and not parent.startswith(f"{error.name}."):
            paths = getattr(sys.modules[parent], "__path__", [])
            siblings = [f"{parent}.{module.name}" for module in pkgutil.iter_modules(paths)]
        raise ValueError(
            f"reward {spec!r}: no module {error.name!r}{_nearest(place, siblings)}; for a file write path/to/file.py"
        ) from error


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(known)[:8])}" if known else ""


def _check_signature(function: Any, spec: str) -> None:
    wanted = "(completion, answer, **metadata)"
    if not callable(function):
        found = type(function).__name__
        raise ValueError(f"reward {spec!r} is a {found}, not a function {wanted}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {spec!r} is async; make it a plain function {wanted}")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not takes_two or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"reward {spec!r} has the signature {inspect.signature(function)}, but must take {wanted}; "
            f"add what is missing"
        )


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One reward of a recipe. Building it resolves the function, so a wrong name fails before anything is sampled.

    Raises:
        ValueError: a name that does not resolve, a weight that is not finite, kwargs that the function does not name.
    """

    name: str  # under which it is logged, `reward/<name>/mean`
    function: str  # "module:function" or "path/to/file.py:function"
    weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight must be a finite number, got {self.weight}")
        parameters = inspect.signature(resolve(self.function)).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        named = [name for name in named if name not in GIVEN]
        for key in self.kwargs:
            if key not in named:
                options = f"its options are {', '.join(named)}" if named else "it has no options"
                raise ValueError(f"reward {self.name!r}: {self.function} has no option {key!r}; {options}")

    def __call__(self, completion: str, answer: str | None, metadata: Mapping[str, Any]) -> RewardResult:
        """Score one completion.

        Raises:
            RewardError: the function raised; chained.
            ValueError: it returned no finite number, or the metadata use a reserved name.
        """
        taken = sorted(set(GIVEN) & metadata.keys())
        if taken:
            raise ValueError(f"metadata of a record may not be named {taken[0]!r}; rename that column of the data")
        function = _resolve_once(self.function)
        try:
            value = function(completion, answer, **{**metadata, **self.kwargs})
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} ({self.function}) raised {type(error).__name__}: {error}; "
                f"completion {_shorten(completion)}"
            ) from error
        return self._checked(value, completion)

    def _checked(self, value: Any, completion: str) -> RewardResult:
        result = value if isinstance(value, RewardResult) else None
        score = result.score if result is not None else value
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise ValueError(
                f"reward {self.name!r} ({self.function}) returned {score!r} ({type(score).__name__}) for completion "
                f"{_shorten(completion)}; it must return a finite number or a RewardResult"
            )
        if result is None:
            return RewardResult(float(score))
        return RewardResult(float(score), result.status, result.detail)


def _shorten(text: str, limit: int = 120) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def combine(
    functions: Sequence[RewardFunction], results: Sequence[Sequence[RewardResult]]
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Weighted sums per completion, and the unweighted scores by reward name.

    Args:
        functions: F reward functions with different names.
        results: [G][F], for each completion what each function said.

    Raises:
        ValueError: no function, two of one name, or a row of another length than F.
    """
    names = [function.name for function in functions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards must be one or more with different names, got {names}")
    totals = tuple(
        sum(function.weight * result.score for function, result in zip(functions, row, strict=True)) for row in results
    )
    return totals, {name: tuple(row[place].score for row in results) for place, name in enumerate(names)}


def score_completion(
    functions: Sequence[RewardFunction], prompt: Prompt, completion: Completion
) -> tuple[RewardResult, ...]:
    """[F] What each function says of one completion. Raises what `RewardFunction.__call__` raises."""
    metadata = {
        **prompt.metadata,
        "finish_reason": completion.finish_reason,
        "completion_length": len(completion.token_ids),
    }
    return tuple(function(completion.text, prompt.answer, metadata) for function in functions)


def score_group(functions: Sequence[RewardFunction], prompt: Prompt, completions: Sequence[Completion]) -> Group:
    """A prompt's G completions with their rewards.

    A status "timeout" or "crash" is the completion's own fault and its score stands. "infrastructure" says nothing about
    the completion, so the group cannot be trained on.

    Raises:
        RewardError: a function raised, or reported the status "infrastructure".
        ValueError: a function returned no finite number.
    """
    results = [score_completion(functions, prompt, completion) for completion in completions]
    for row in results:
        for function, result in zip(functions, row, strict=True):
            if result.status == "infrastructure":
                raise RewardError(f"reward {function.name!r} could not judge prompt {prompt.id}: {result.detail}")
    rewards, components = combine(functions, results)
    return Group(prompt, tuple(completions), rewards, components)
