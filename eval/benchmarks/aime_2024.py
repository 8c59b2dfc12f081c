"""AIME 2024: the 30 problems of both papers, as DeepSeek-R1 measured them."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Hub, competition

BENCHMARK = competition(
    name="aime_2024",
    title="AIME 2024 (Pass@1)",
    hub=Hub(
        path="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        split="train",
        checked=PINNED,
    ),
    question="problem",
    published="AIME 2024",
    source="DeepSeek-R1's README: 64 samples a problem, temperature 0.6, top-p 0.95, 32,768 tokens; cons@64 beside it",
)
