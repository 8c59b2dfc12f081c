"""Secrets: where they come from, what may not hold them, and taking them out of text that is kept or shown.

A secret is read from an environment variable where it is used, and is part of nothing that is written: a recipe that holds one
is refused, because the recipe is copied into the run directory, the report and the lineage. Messages are searched once more
before they are shown, since they may quote what another program said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter value of a variable is a word, and taking it out of all text would tear that
# A variable of the environment whose name ends so holds a secret. TOKENIZERS_PARALLELISM does not.
_VARIABLE = re.compile(r"(?:^|_)(?:\w*KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?$", re.IGNORECASE)
# And a key of a recipe. Narrower: pad_token, answer_key and the secret of a guessing game are none.
_KEY = re.compile(
    r"(?:^|_|-)(?:(?:api|access|secret|private|auth)[_-]?keys?|(?:api|auth|access|hf|bearer)[_-]?tokens?"
    r"|(?:client|api)[_-]?secret|password|passwd|passphrase|credentials?|authorization)$",
    re.IGNORECASE,
)
# What the tokens of well-known services look like.
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|glpat-[A-Za-z0-9_-]{16,})"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)")  # user:password
_BEARER = re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}")


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """The secrets that the environment holds, the longest first."""
    found = os.environ if environment is None else environment
    values = {value for name, value in found.items() if _VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(values, key=lambda value: (-len(value), value))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets: values of the environment's secret variables, well-known forms, passwords in addresses."""
    for value in secret_values(environment):
        text = text.replace(value, HIDDEN)
    for pattern in (_KNOWN, _IN_ADDRESS, _BEARER):
        text = pattern.sub(HIDDEN, text)
    return text


def find_secret(tree: Any, environment: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """The first secret that a recipe's tree holds: (its key path, why it is taken for one); None where there is none."""
    values = secret_values(environment)
    for key, value in _texts(tree):
        name = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
        if _KEY.search(name) and value.strip():
            return key, "its name says so"
        if any(secret in value for secret in values):
            return key, "an environment variable with a secret holds the same"
        if _KNOWN.search(value):
            return key, "it looks like the token of a well-known service"
        if _IN_ADDRESS.search(value):
            return key, "the address has a password in it"
    return None


def _texts(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every text with its key path; what lies deeper than any recipe is left to those who refuse it."""
    if depth > 50:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{index}", depth + 1)
    elif isinstance(value, str):
        yield key, value
