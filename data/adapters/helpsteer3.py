"""nvidia/HelpSteer3, configuration preference: `context`, two responses, `overall_preference` of -3 (first) to 3 (second)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A pair; rows without a preference (0) and with equal responses are left out."""
    context = column(row, "context", (list, str))
    first, second = column(row, "response1"), column(row, "response2")
    preference = column(row, "overall_preference", int)
    if not -3 <= preference <= 3:
        raise ValueError(f"column overall_preference must be -3 to 3, not {preference}")
    if preference == 0 or first == second:
        return None
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    more = metadata(row, "domain", "language", "overall_preference")
    return {"prompt": context, "chosen": chosen, "rejected": rejected, **more}
