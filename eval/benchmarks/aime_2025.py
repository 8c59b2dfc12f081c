"""AIME 2025: the 30 problems of both papers of the year after DeepSeek-R1's tables."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Hub, competition

BENCHMARK = competition(
    name="aime_2025",
    title="AIME 2025 (Pass@1)",
    hub=Hub(path="math-ai/aime25", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b", split="test", checked=PINNED),
    question="problem",
    source="as AIME 2024 in DeepSeek-R1's README",
)
