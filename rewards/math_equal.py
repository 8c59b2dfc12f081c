r"""Whether two final answers are mathematically equal: math-verify, with its text prepared and its generosity curbed.

math-verify 0.9 alone is too kind in ways that a policy finds: for an equation it compares the right-hand side only, so
`4=3` passes against 3; it drops units, so `5\text{ m}` passes against 5 cm and `2` against `2t`; it drops the base of
`1011_3` and a negation. The rules here say "wrong" before it is asked, or rewrite the answer to what has to be compared.

This module runs in the process of `rewards.math_worker`, which is killed when an expression takes too long.
"""

from __future__ import annotations

import math
import re
from functools import cache, lru_cache
from typing import Any

from rewards.math_text import has_thousands, join_thousands, normalise, split_list
from rewards.math_units import split_unit

RELATIVE = 1e-4  # two numbers are never equal when they differ by more than this share
CACHED = 4096  # references, and pairs of reference and answer: a group of completions repeats both

_EQUALS = re.compile(r"(?<![<>!\\=:])=(?!=)")
_APPROXIMATE = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|lt|gt|leq|geq|in|approx|neq|ne)(?![A-Za-z])")
_INEQUALITY = re.compile(r"<|>|\\(?:le|ge|lt|gt|leq|geq|in)(?![A-Za-z])")
_NEGATION = re.compile(r"\\neq?(?![A-Za-z])|!=|\bnot\b|\\lnot(?![A-Za-z])|\\neg(?![A-Za-z])", re.IGNORECASE)
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus|mathbb|bigcup)(?![A-Za-z])")
_OPERATION = re.compile(r"[\d+\-*/^<>=!]|\\(?:frac|sqrt|sin|cos|tan|log|ln|exp|cdot|times|pi|infty)(?![A-Za-z])")
_DERIVATIVE = re.compile(r"\\frac\{d[A-Za-z]?\}\{d[A-Za-z]\}|d[A-Za-z]/d[A-Za-z]")
_BASE = re.compile(r"^([0-9A-Fa-f]+)_\{?(\d+)\}?$")


@lru_cache(maxsize=CACHED)
def judge(reference: str, answer: str) -> str:
    """ "right" or "wrong"; "bad_reference" when math-verify cannot parse the reference. May run for ever."""
    gold, gold_unit = split_unit(normalise(reference))
    if not _parse(join_thousands(gold)):
        return "bad_reference"
    target, unit = split_unit(normalise(answer))
    if not target or not _balanced(target) or _different_unit(gold_unit, unit) or _refused(gold, target):
        return "wrong"
    return "right" if any(_equal(*reading) for reading in _readings(gold, target)) else "wrong"


def _balanced(text: str) -> bool:
    """Whether braces pair up: `3}{4` would end the box that it is put into."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _different_unit(gold: str | None, target: str | None) -> bool:
    return gold is not None and target is not None and gold != target


def _readings(gold: str, target: str) -> list[tuple[str, str]]:
    """What the texts may stand for: 100,200 as one number or as two, 50% as 1/2 or as 50."""
    readings = [(join_thousands(gold), join_thousands(target))]
    if has_thousands(gold) and "," in target:
        readings.append((gold.replace(",", ", "), target.replace(",", ", ")))
    if _percent(gold) != _percent(target):
        readings += [(_without_percent(first), _without_percent(second)) for first, second in readings]
    return readings


def _percent(text: str) -> bool:
    return "%" in text or "percent" in text


def _without_percent(text: str) -> str:
    return re.sub(r"\\?%|\\text\s*\{\s*percent(?:age)?\s*\}|percent(?:age)?", "", text)


# ---- rules that refuse


def _refused(gold: str, target: str) -> bool:
    if _NEGATION.search(target) and not _NEGATION.search(gold):
        return True
    if _is_plain_equation(gold) and not _RELATION.search(target):
        return True  # 3 against x + y = 3
    bases = _BASE.match(gold), _BASE.match(target)
    return bool(bases[0] and bases[1] and bases[0][2] != bases[1][2])


def _is_plain_equation(text: str) -> bool:
    """An equation that names no value: x + y = 3, but neither x = 3 nor a list of such."""
    parts = _sides(text)
    return len(parts) == 2 and "," not in text and not (_is_name(parts[0]) or _is_name(parts[1]))


def _more_values(gold: str, target: str) -> bool:
    """Whether the answer lists more values than the reference: 3 or 4 against 3, and 3,5,5 against 3,5."""
    if _INEQUALITY.search(gold) or _SET_OPERATION.search(gold):
        return False
    return len(split_list(_without_set_braces(target))) > max(1, len(split_list(_without_brackets(gold))))


def _without_set_braces(text: str) -> str:
    found = re.fullmatch(r"(?:\\left\s*)?\\\{(.*?)(?:\\right\s*)?\\\}", text, re.DOTALL)
    return found[1] if found and "\\}" not in found[1] else text


def _without_brackets(text: str) -> str:
    text = re.sub(r"\\left\s*|\\right\s*", "", text)
    inner = _without_set_braces(text)
    if inner == text and re.fullmatch(r"[\[(][^()\[\]]*[)\]]", text):
        inner = text[1:-1]
    return inner


# ---- equations in the answer


def _equal(gold: str, target: str) -> bool:
    if _more_values(gold, target):
        return False
    comparable = _values(target) if not _RELATION.search(gold) else _checked(target)
    return comparable is not None and _verify(_parse(gold), _parse(comparable))


def _values(target: str) -> str | None:
    """The answer without names of values, `x=1+2=3` -> `3`; None when its sides contradict each other, as in 4=3."""
    if "=" not in target and not _APPROXIMATE.search(target):
        return target
    values = []
    for item in split_list(target) if _more_values("0", target) else [target]:
        exact = [part for part in _APPROXIMATE.split(item) if not _is_name(part)][:1] or [item]
        sides = [side for side in _sides(exact[0]) if not _is_name(side)]
        if not sides or not _agree(sides):
            return None
        values.append(sides[-1])
    return ", ".join(values)


def _checked(target: str) -> str | None:
    """The answer as it is; None when numbers in one of its chains contradict each other, as in x=4=3."""
    for item in split_list(target):
        numbers = [side for side in _sides(item) if not re.search(r"(?<!\\)\b[A-Za-z]", side)]
        if len(numbers) > 1 and not _agree(numbers):
            return None
    return target


def _agree(sides: list[str]) -> bool:
    return all(_verify(_parse(sides[0]), _parse(side)) for side in sides[1:])


def _sides(text: str) -> list[str]:
    """The parts between equals signs that stand outside all braces, as the one in a sum's index does not."""
    cuts = [
        found.span()
        for found in _EQUALS.finditer(text)
        if text.count("{", 0, found.start()) == text.count("}", 0, found.start())
    ]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _is_name(text: str) -> bool:
    r"""Whether a side of an equation only names a value: x, a_1, f(2), P(A), AB, |AB|, \angle ABC, \text{Area}, (x,y)."""
    text = re.sub(r"_(?:\{[^{}]*\}|\w)", "", text.strip())
    text = re.sub(r"(?<=[A-Za-z}'])\s*(?:\\left)?\([^()]*\)", "", text)
    if _DERIVATIVE.fullmatch(text):
        return True
    return bool(text) and not _OPERATION.search(text) and re.fullmatch(r"[a-z]{2}", text) is None


# ---- math-verify


@lru_cache(maxsize=CACHED)
def _parse(text: str) -> tuple[Any, ...]:
    """What math-verify reads of a text in a box, so that it is read whole; empty when it cannot."""
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{text}}}", extraction_config=_extraction(), parsing_timeout=None))


@cache
def _extraction() -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    # As by default, but units are ours, and the box comes first.
    reading = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    return [LatexExtractionConfig(normalization_config=reading, boxed_match_priority=0), ExprExtractionConfig()]


def _verify(gold: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    """Equal as they are, or with the letter i for the imaginary unit, which math-verify takes for a variable."""
    from math_verify import verify

    pairs = [(gold, target)]
    if any(_imaginary(expression) for expression in (*gold, *target)):
        pairs.append((_complex(gold), _complex(target)))
    return any(
        verify(list(first), list(second), timeout_seconds=None, allow_set_relation_comp=True) and _near(first, second)
        for first, second in pairs
    )


def _near(gold: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    """False for numbers that only rounding to six places makes equal: 0.0000001 and 0.0000002."""
    try:
        first, second = (complex(expressions[0].doit().evalf()) for expressions in (gold, target))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return True  # no numbers: math-verify's word stands
    difference, size = abs(first - second), max(abs(first), abs(second))
    return not math.isfinite(size) or difference <= RELATIVE * size


def _imaginary(expression: Any) -> dict[Any, Any]:
    from sympy import I

    return {symbol: I for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"}


def _complex(expressions: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(e.subs(_imaginary(e)) if _imaginary(e) else e for e in expressions)
