"""1.0 when the response follows all verifiable instructions of its record, as in IFEval (arXiv 2311.07911).

The checks are in `rewards.instructions`. Libraries with IFEval's own code (lm-eval, if-verifiable) cannot be used: they load
models of NLTK that have to be downloaded when they are imported or first called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.types import RewardResult
from rewards.extract import after_thinking, split_answer
from rewards.instructions import CHECKS


def score(
    completion: str,
    answer: str | None,
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
    loose: bool = False,
    share: bool = False,
    **metadata: Any,
) -> RewardResult:
    """1.0 when every instruction is followed, else 0.0; with `share`, the share of instructions followed.

    Judged is the text of the single answer block, or, in a text without answer tags, what comes after the reasoning. An
    empty text follows nothing.

    Args:
        completion: the model's text.
        answer: not used.
        instruction_id_list: the instructions' ids, e.g. "punctuation:no_comma"; this and `kwargs` are columns of the data
            set google/IFEval.
        kwargs: the options of each instruction, in the same order; entries that are None do not count.
        loose: an instruction also counts as followed when it is by the text without its first line, without its last line,
            without both, or any of these without asterisks.
        share: give partial credit.
        metadata: not used.

    Raises:
        ValueError: an unknown instruction, options that it lacks or does not have, lists that are empty or differ in length.
    """
    checks = _prepared(instruction_id_list, kwargs)
    text = _response(completion)
    if text is None or not text.strip():
        return RewardResult(0.0, detail="no response")
    variants = _variants(text) if loose else [text]
    missed = [name for name, options in checks if not any(CHECKS[name](variant, **options) for variant in variants)]
    followed = 1 - len(missed) / len(checks)
    return RewardResult(
        followed if share else float(not missed), detail=f"missed {', '.join(missed)}" if missed else ""
    )


def _prepared(names: Sequence[str], options: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    if len(names) == 0 or len(names) != len(options):
        raise ValueError(
            f"instruction_id_list has {len(names)} entries and kwargs {len(options)}; need one of each or more"
        )
    prepared = []
    for name, given in zip(names, options, strict=True):
        if name not in CHECKS:
            raise ValueError(f"unknown instruction {name!r}; known are {', '.join(CHECKS)}")
        kept = {key: value for key, value in given.items() if value is not None}
        wanted = set(list(inspect.signature(CHECKS[name]).parameters)[1:])
        if kept.keys() != wanted:
            raise ValueError(
                f"instruction {name!r} takes the options {sorted(wanted)}, got {sorted(kept)}; correct the data"
            )
        prepared.append((name, kept))
    return prepared


def _response(completion: str) -> str | None:
    if "<answer>" in completion or "</answer>" in completion:
        parts = split_answer(completion)
        return parts[1] if parts is not None else None
    return after_thinking(completion)


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    texts = [text, *("\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1]))]
    return [variant for kept in texts for variant in (kept, kept.replace("*", "")) if variant.strip()]
