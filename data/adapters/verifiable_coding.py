"""open-r1/verifiable-coding-problems-python: `problem_statement`, tests in `verification_info`, an object or its JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A problem with the `tests` of `rewards.code_tests`. The reference program is not handed on: rewards have no use for it.

    Rows with tests that call a function are left out: how such a test writes its arguments is not documented.
    """
    problem, info = column(row, "problem_statement"), column(row, "verification_info", (Mapping, str))
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except ValueError as error:
            raise ValueError(f"column verification_info is no JSON ({error})") from None
    cases = column({"verification_info": info}, "verification_info.test_cases", list)
    if any(not isinstance(case, Mapping) for case in cases) or not cases:
        raise ValueError(f"column verification_info.test_cases must hold one test or more, not {cases!r:.80}")
    if any(case.get("type") != "stdin_stdout" for case in cases):
        return None
    tests = [{"stdin": column(case, "input"), "stdout": column(case, "output")} for case in cases]
    named = {"id": row["problem_id"]} if isinstance(row.get("problem_id"), str) else {}
    return {"prompt": problem, "tests": tests, **named, **metadata(row, "source")}
