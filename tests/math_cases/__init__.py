r"""Hand-written verdicts on final answers of mathematics: what `rewards.math_answer` has to say, and why.

A case is (reference, text, right, reason). `completions` holds whole completions, the other tables final answers, which the
test puts into an answer block. The labels were written from what a teacher would accept, before the reward was run on them
(`attacks` says where not); three rules settle what teachers dispute:

- A unit may be left out, or added where the reference has none; another unit than the reference's is wrong.
- Decimals must agree with an exact reference to six places after the point: 0.333333 for 1/3, not 0.33.
- A percentage is right both as a fraction of one and, because questions ask "what per cent?", as the bare number.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    reference: str
    text: str  # a final answer, or a whole completion
    right: bool
    reason: str
