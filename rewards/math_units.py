r"""Units after a number: `5\text{ cm}`, `25 cm^2`, `60 km/h`, `\$5`, `90^\circ`.

math-verify's own removal of units is switched off, because its list has single letters in it: it reads `2t` as 2 and
`3c` as 3. Here a unit is a `\text{...}` after a number, a symbol of a currency or degrees, or one of the words below; a
single letter counts only in `\text{...}` and, with a space, after a lone number. Two known units that differ are told
apart, which math-verify does not do.
"""

from __future__ import annotations

import re

# One line per unit: its names, in the singular and lower case.
_NAMES = """
mm millimeter millimetre
cm centimeter centimetre
m meter metre
km kilometer kilometre
in inch inches
ft foot feet
yd yard
mi mile
mg milligram
g gram gm
kg kilogram
lb pound lbs
oz ounce
ml milliliter millilitre
l liter litre
gal gallon
s sec second
min minute
h hr hour
day
week
month
yr year
mph
kmh km/h kph
m/s
degree deg
radian rad
dollar usd buck
cent
euro eur
rupee rs
newton
joule
watt
volt
ohm
unit
"""
_CANONICAL = {name: line.split()[0] for line in _NAMES.strip().splitlines() for name in line.split()}
# Plain words are taken off only where they cannot be a product of variables.
_PLAIN = sorted((name for name in _CANONICAL if len(name) > 1), key=len, reverse=True)
_POWER = r"(?:\s*\^\s*\{?([23])\}?)?"
_IN_TEXT = re.compile(
    r"(?<=[\d})\]%\s,])(?:\\[,;:! ]|~|\s)*\\(?:text|mathrm|mbox|textrm|rm)\s*\{([A-Za-z°µ./ ^23\-]*)\}"
    + _POWER
    + r"\s*$"
)
_IN_WORDS = re.compile(
    r"(?<=[\d}])(?:\\[,;:! ]|~|\s)*((?:square |sq\.? |cubic )?(?:"
    + "|".join(map(re.escape, _PLAIN))
    + r")(?:s|es)?)\.?"
    + _POWER
    + r"\s*$",
    re.IGNORECASE,
)
# "12 s": a single letter counts after a lone number and a space.
_LETTER = re.compile(r"(?<=\d)\s+([a-z])()$")
_LONE_NUMBER = re.compile(r"-?[\d.,]+\s+[a-z]$")
_CURRENCY = re.compile(r"\\\$|\\(?:euro|pounds|yen)\b|[$€£¥₹₽₩]")
_DEGREES = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b")
# "3 apples": any words after a lone number.
_LONE_WORDS = re.compile(r"(?<=\d)\s+([A-Za-z]{3,}(?: [A-Za-z]{2,})*)()$")
_LONE_NUMBER_AND_WORDS = re.compile(r"-?[\d.,/]+\s[A-Za-z ]+")
# Words in which more is said than a unit.
_SAYS_MORE = re.compile(
    r"\b(?:or|and|not|no|but|maybe|perhaps|wrong|is|to|vs|through|percent|percentage|pct|dozens?|hal(?:f|ves)|thirds?|"
    r"quarters?|squared|cubed|plus|minus|times|over|factorial|sqrt|root|sin|cos|tan|log|exp|alpha|beta|theta|pi|inf(?:inity)?)\b",
    re.IGNORECASE,
)


def split_unit(text: str) -> tuple[str, str | None]:
    """(text without its unit, the unit's canonical name or None where there is none or an unknown one).

    Areas and volumes have a power in the name: "25 cm^2" -> ("25", "cm^2").
    """
    unit = "degree" if _DEGREES.search(text) else None
    text = _DEGREES.sub("", _CURRENCY.sub("", text)).strip()
    found = _IN_TEXT.search(text) or _IN_WORDS.search(text)
    if found is None and _LONE_NUMBER.fullmatch(text) and text[-1] in _CANONICAL:
        found = _LETTER.search(text)
    if found is None and _LONE_NUMBER_AND_WORDS.fullmatch(text):
        found = _LONE_WORDS.search(text)
    if found is None or _SAYS_MORE.search(found[1]):
        return text, unit
    return text[: found.start()].strip(), _canonical(found[1], found[2]) or unit


def _canonical(words: str, power: str | None) -> str | None:
    name = words.strip().rstrip(".").lower().replace(" per ", "/")
    for prefix, exponent in (("square ", "2"), ("sq. ", "2"), ("sq ", "2"), ("cubic ", "3")):
        if name.startswith(prefix):
            name, power = name.removeprefix(prefix), exponent
    name, _, inner = name.partition("^")
    power = power or inner or None
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es")):
        if candidate in _CANONICAL:
            return _CANONICAL[candidate] + (f"^{power}" if power else "")
    return None
