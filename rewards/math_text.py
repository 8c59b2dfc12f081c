r"""Text of a mathematical answer, rewritten to what math-verify reads: `１½` -> `1\frac{1}{2}`, `1 000` -> `1000`.

Only spelling changes here, never a value. Each rule is there because math-verify 0.9 misreads the left-hand side.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ",
    "∞": r"\infty ", "π": r"\pi ", "°": r"^\circ ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∨": r"\lor ", "√": r"\sqrt ", "ℝ": r"\mathbb{R}",
}  # fmt: skip
_LABEL = re.compile(
    r"^(?:so |thus |hence |therefore,? )?(?:the |my )?(?:final )?answer(?: is)?\s*[:=]?\s*", re.IGNORECASE
)
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_TRIG_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?"
)
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MULTIPLE = re.compile(
    rf"(?<=\d)(?:\\[,;: ]|~|\s)*(?:\\text\s*\{{\s*)?({'|'.join(_POWERS_OF_TEN)})\b\s*\}}?", re.IGNORECASE
)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:(?:,\\!|\{,\}|,)\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?:(?:\\,|\\ |~| )\d{3})+(?! ?\d)")

_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"^\*\*(.*)\*\*$", re.DOTALL), r"\1"),  # markdown bold
    (re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\-])"), "^"),  # x**2
    (re.compile(r"\\text\s*\{\s*-\s*\}"), "-"),
    (re.compile(r"\\[bB]igg?[lrm]?(?![A-Za-z])"), ""),
    (re.compile(r"\\underline\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<!\\)~"), " "),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\d./^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),  # 1 1/2
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d)(?:st|nd|rd|th)$"), ""),  # 7th
    (re.compile(r"\\text\s*\{\s*percent\s*\}|(?<=\d)\s*per ?cent\b"), r"\\%"),
    (_MULTIPLE, lambda found: rf"\times 10^{{{_POWERS_OF_TEN[found[1].lower()]}}} "),
    (_TRIG_DEGREES, r"\1(\\frac{\2\\pi}{180})"),
    (re.compile(r"^([A-Z])(?=\([^()]*,[^()]*\)$)"), ""),  # a named point, P(1,2)
]


def normalise(text: str) -> str:
    """The answer in one spelling; idempotent but for spaces."""
    text = _LABEL.sub("", _characters(text).strip())
    text = _outer_dollars(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_repeating, text)
    text = _SPACED_THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _expand_plus_minus(text)
    text = _ascending(text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    return text.strip()


def join_thousands(text: str) -> str:
    """1,234,567 -> 1234567, where the commas stand as thousands separators do."""
    return _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)


def has_thousands(text: str) -> bool:
    """Whether a list of three-digit numbers could be meant where `join_thousands` sees one number."""
    return _THOUSANDS.search(text) is not None


def split_list(text: str) -> list[str]:
    r"""Items of a list: parts between commas, semicolons, lines, `and`, `or`, `\lor`, outside all brackets."""
    text = re.sub(
        r"\\(?:text|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\\lor\b|\\vee\b|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])",
        ",",
        text,
    )
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?![A-Za-z])|\n|\\q?quad\b", ",", text)
    items, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0 and text[place - 1 : place] != "\\":
            items.append(text[start:place])
            start = place + 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]


def _characters(text: str) -> str:
    """Look-alikes to ASCII and LaTeX: digits of other scripts, dashes, superscripts, vulgar fractions, signs."""
    parts: list[str] = []
    for character in text:
        if character.isascii():
            parts.append(character)
        elif character in _CHARACTERS:
            parts.append(_CHARACTERS[character])
        elif ord(character) in _SUPERSCRIPTS:
            power = character.translate(_SUPERSCRIPTS)
            if parts and parts[-1].startswith("^{"):
                parts[-1] = parts[-1][:-1] + power + "}"
            else:
                parts.append(f"^{{{power}}}")
        elif unicodedata.decimal(character, None) is not None:
            parts.append(str(unicodedata.decimal(character)))
        elif "⁄" in (plain := unicodedata.normalize("NFKC", character)):
            above, _, below = plain.partition("⁄")
            parts.append(rf"\frac{{{above}}}{{{below}}}")
        elif unicodedata.category(character) != "Cf":  # zero-width characters say nothing
            parts.append(plain)
    return "".join(parts)


def _outer_dollars(text: str) -> str:
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : len(text) - len(right)]
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and left not in inner:
            return inner.strip()
    return text


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}: (digits with the period - digits without) / (nines and zeros)."""
    whole, fixed, period = found[1] or "0", found[2], found[3]
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _expand_plus_minus(text: str) -> str:
    r"""a \pm b -> a + b, a - b; only where there is one such sign and no list."""
    if text.count("\\pm") != 1 or "\\mp" in text or "," in text:
        return text
    return f"{text.replace(chr(92) + 'pm', '+')}, {text.replace(chr(92) + 'pm', '-')}"


def _ascending(text: str) -> str:
    """2 > x > 1 -> 1 < x < 2: math-verify compares chains part by part."""
    text = re.sub(r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge ", text)
    parts = re.split(r"(>|\\ge(?![A-Za-z])|\\gt(?![A-Za-z]))", text)
    if len(parts) != 5 or "<" in text or "\\le" in text:
        return text
    flipped = {">": "<", r"\gt": "<", r"\ge": r"\le "}
    return " ".join(flipped.get(part, part.strip()) for part in reversed(parts))
