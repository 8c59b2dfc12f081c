"""HuggingFaceH4/ultrafeedback_binarized: whole chats in `chosen` and `rejected`, with a score for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.adapters import column, metadata


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A pair; rows whose two chats are the same, or whose scores do not say which is better, are left out."""
    chosen, rejected = column(row, "chosen", list), column(row, "rejected", list)
    better, worse = (column(row, f"score_{side}", (int, float)) for side in ("chosen", "rejected"))
    if chosen == rejected or better <= worse:
        return None
    named = {"id": row["prompt_id"]} if isinstance(row.get("prompt_id"), str) else {}
    return {"chosen": chosen, "rejected": rejected, **named, **metadata(row, "score_chosen", "score_rejected")}
