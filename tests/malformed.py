"""Input that is wrong in every way, for tests: values of any type, trees with one part replaced, files with torn bytes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Of each property. POSTTRAIN_CASES=750 makes it more than 11,000 in all; see docs/trouble.md.
CASES = int(os.environ.get("POSTTRAIN_CASES", "40"))
many = settings(
    max_examples=CASES,
    deadline=10_000,  # milliseconds: a case that takes longer hangs for all a user can tell
    derandomize="POSTTRAIN_CASES" not in os.environ,  # the same cases in every run of the tests, new ones on request
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Also halves of surrogate pairs, zeros, and characters that end a line for Python or for a browser.
texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=None), max_size=8),  # type: ignore[arg-type]
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "\ud800",
            "a\udfffb",
            "\u2028",
            "\ufeff",
            "<|user|>",
            "</think>",
            "x" * 5000,
            "{}",
            "[",
            "1e999",
        ]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, -(10**30)]),
    st.floats(),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, trees: Sequence[Any]) -> Any:
    """One of the trees with some part replaced, left out or doubled."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 2))):
        if not isinstance(tree, dict | list):
            return tree
        parent, key = draw(st.sampled_from(_places(tree) or [(None, None)]))
        if parent is None:
            return draw(values)
        what = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "double", "other key"]))
        if what == "replace":
            parent[key] = draw(values)
        elif what == "leave out":
            del parent[key]
        elif what == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif isinstance(parent, dict):
            parent[draw(texts)] = draw(values)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            found += _places(tree[key])
    return found


@st.composite
def torn(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of the files, cut short, with bytes changed, put in, doubled or left out."""
    data = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 12)))
        what = draw(st.sampled_from(["cut", "change", "put in", "double", "leave out"]))
        if what == "cut":
            data = data[:start]
        elif what == "change":
            data = data[:start] + draw(st.binary(min_size=stop - start, max_size=stop - start)) + data[stop:]
        elif what == "put in":
            data = data[:start] + draw(st.binary(max_size=8)) + data[start:]
        elif what == "double":
            data = data[:stop] + data[start:]
        else:
            data = data[:start] + data[stop:]
    return data


def line(row: Any) -> bytes:
    """A row as a line of JSON, with what JSON cannot hold as Python writes it (NaN)."""
    return json.dumps(row).encode() + b"\n"
