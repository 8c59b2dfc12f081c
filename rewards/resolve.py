"""From a name in a recipe to a function: a module, a file, or what an installed package publishes."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.forms import form_of

ENTRY_POINTS = "posttrain.rewards"  # the group under which packages publish rewards
# What a function of each form takes by position, and the sentence that says so.
GIVEN = {
    "single": ("completion", "answer"),
    "async": ("completion", "answer"),
    "group": ("completions", "answer"),
    "batch": ("completions", "answers", "metadata"),
}


def signature_of(form: str) -> str:
    """The signature that a reward of a form must have, as a user would write it."""
    return f"({', '.join(GIVEN[form])}{'' if form == 'batch' else ', **metadata'})"


def resolve(spec: str) -> Callable[..., Any]:
    """The function that a recipe names.

    Args:
        spec: `module:function`, `path/to/file.py:function`, or a name without a colon that an installed package publishes in
            the entry-point group `posttrain.rewards`.

    Raises:
        ValueError: malformed name, nothing there, or a function that cannot take the call.
    """
    function = _published(spec) if ":" not in spec and not spec.endswith(".py") else find(spec, "reward", "function")
    _check_signature(function, spec)
    return function


def find(spec: str, kind: str, noun: str) -> Any:
    """What a recipe names as `module:noun` or `path/to/file.py:noun`.

    Args:
        spec: the name.
        kind: what it is for, for messages, e.g. "reward".
        noun: what it is, for messages, e.g. "function".

    Raises:
        ValueError: malformed name, or nothing there.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{kind} {spec!r} must be module:{noun} or path/to/file.py:{noun}")
    label = f"{kind} {spec!r}"
    module = _load_file(place, label) if place.endswith(".py") else _load_module(place, label)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{label}: {place} has no {attribute!r}{_nearest(attribute, names)}")
    return getattr(module, attribute)


@cache
def resolve_once(spec: str) -> Callable[..., Any]:
    """`resolve`, remembered: a file is not read again when it changes."""
    return resolve(spec)


def anchored(spec: str) -> str:
    """The same function, found from any working directory: a file's path becomes absolute."""
    place, _, attribute = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{attribute}" if place.endswith(".py") else spec


def _published(name: str) -> Callable[..., Any]:
    found = metadata.entry_points(group=ENTRY_POINTS)
    if name not in found.names:
        raise ValueError(
            f"reward {name!r} must be module:function or path/to/file.py:function, or a name that an installed package "
            f"publishes in the entry-point group {ENTRY_POINTS!r}{_nearest(name, sorted(found.names))}"
        )
    function: Callable[..., Any] = found[name].load()
    return function


def _load_file(place: str, label: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"{label}: file {place!r} does not exist in {Path.cwd()}{_nearest(path.name, files)}")
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


def _load_module(place: str, label: str) -> ModuleType:
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
            f"{label}: no module {error.name!r}{_nearest(place, siblings)}; for a file write path/to/file.py"
        ) from error


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(known)[:8])}" if known else ""


def _check_signature(function: Any, spec: str) -> None:
    if not callable(function):
        found = type(function).__name__
        raise ValueError(f"reward {spec!r} is a {found}, not a function {signature_of('single')}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"reward {spec!r} is a generator: it yields; return a number instead")
    form = form_of(function)
    parameters = list(inspect.signature(function).parameters.values())
    given = len(GIVEN[form])
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_given = len(positional) >= given or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_rest = form == "batch" or any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_given or not takes_rest:
        raise ValueError(
            f"reward {spec!r} has the signature {inspect.signature(function)}, but must take {signature_of(form)}; "
            f"add what is missing"
        )
