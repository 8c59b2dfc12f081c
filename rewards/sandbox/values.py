"""Plain values as text and back: how arguments enter a sandbox and results leave it.

A value becomes JSON that names its exact type, so that 1, 1.0, True and "1" stay apart, and NaN, big integers, bytes,
tuples and sets survive. Nothing but data can be expressed: decoding runs no code of the program's, unlike pickle. What
comes out of a sandbox is the program's own claim; `matches` compares it outside, to a value that never went in.

This file is also sent into the sandbox, so it imports the standard library only.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100  # of nested containers


def encode(value: Any) -> str:
    """JSON text of a value made of None, bool, int, float, str, bytes, list, tuple, dict, set and frozenset.

    Raises:
        ValueError: any other type, a subclass of these included, or deeper than `MAX_DEPTH`.
    """
    return json.dumps(_encode(value, 0), separators=(",", ":"))


def _encode(value: Any, depth: int) -> list[Any]:
    kind = type(value)  # exactly: a subclass may lie about its contents and compare as it likes
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH} cannot be passed")
    if value is None:
        return ["none"]
    if kind is bool or kind is str:
        return [kind.__name__, value]
    if kind is int or kind is float:
        return [kind.__name__, hex(value) if kind is int else value.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [_encode(item, depth + 1) for item in value]]
    if kind is dict:
        return ["dict", [[_encode(key, depth + 1), _encode(item, depth + 1)] for key, item in value.items()]]
    raise ValueError(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be passed; use plain data")


def decode(text: str) -> Any:
    """The value that `encode` wrote.

    Raises:
        ValueError: not such a text.
    """
    try:
        return _decode(json.loads(text))
    except (TypeError, IndexError, KeyError, RecursionError, AttributeError) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}: {error}") from error


def _decode(node: Any) -> Any:
    tag = node[0]
    if tag == "none":
        return None
    content = node[1]
    if tag in ("bool", "str") and type(content).__name__ == tag:
        return content
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float.fromhex(content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag in ("list", "tuple", "set", "frozenset") and type(content) is list:
        items = [_decode(item) for item in content]
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)
    if tag == "dict" and type(content) is list:
        return {_decode(key): _decode(item) for key, item in content}
    raise ValueError(f"not an encoded value: {tag!r}")


def matches(expected: Any, text: str, *, tolerance: float = 0.0, tuples_as_lists: bool = False) -> bool:
    """Whether an encoded result has the type and the value of `expected`, item by item. False for a malformed text.

    Args:
        expected: plain data. NaN equals nothing, itself included.
        text: from outside our trust: any bytes that a program wrote.
        tolerance: absolute and relative error allowed between two floats; an int is never a float.
        tuples_as_lists: take a returned tuple for a list; for expected values that came as JSON, which has no tuples.
    """
    try:
        return _matches(expected, json.loads(text), tolerance, tuples_as_lists)
    except (ValueError, TypeError, IndexError, KeyError, RecursionError, AttributeError, OverflowError):
        return False  # the text is no encoded value


def _matches(expected: Any, node: Any, tolerance: float, loose: bool) -> bool:
    kind = type(expected)
    tag = "list" if loose and node[0] == "tuple" and kind is list else node[0]
    if tag != ("none" if expected is None else kind.__name__):
        return False
    if kind is list or kind is tuple:
        return len(node[1]) == len(expected) and all(
            _matches(item, other, tolerance, loose) for item, other in zip(expected, node[1], strict=True)
        )
    # Sizes first: hashing as many forged keys as fit into the output, all colliding, would take minutes.
    if kind in (set, frozenset):
        return len(node[1]) == len(expected) and _same_keys(expected, [_decode(item) for item in node[1]])
    if kind is dict:
        if len(node[1]) != len(expected):
            return False
        keys = [_decode(key) for key, _ in node[1]]
        return _same_keys(expected.keys(), keys) and all(
            _matches(expected[key], item, tolerance, loose) for key, (_, item) in zip(keys, node[1], strict=True)
        )
    value = _decode(node)
    if kind is float and tolerance:
        return math.isclose(expected, value, rel_tol=tolerance, abs_tol=tolerance)
    return type(value) is kind and bool(value == expected)


def _same_keys(expected: Any, found: list[Any]) -> bool:
    """Whether two collections of hashable values are equal in value and exact type: True is not 1."""
    typed = {_typed(key) for key in found}
    return len(typed) == len(found) and typed == {_typed(key) for key in expected}


def _typed(key: Any) -> Any:
    if isinstance(key, tuple | frozenset):
        return type(key).__name__, type(key)(_typed(item) for item in key)
    return type(key).__name__, key
