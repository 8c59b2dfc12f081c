"""openai/gsm8k: `question`; `answer` is the worked solution with calculator marks and a last line "#### 42"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.adapters import column


def adapt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem with its answer (without thousands separators) and its worked solution (without calculator marks)."""
    worked, mark, answer = column(row, "answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError(f"column answer must end with '#### <number>', not {row['answer'][-40:]!r}")
    return {"prompt": column(row, "question"), "answer": answer, "worked": re.sub(r"<<[^<>]*>>", "", worked).strip()}
