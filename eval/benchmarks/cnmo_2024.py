"""CNMO 2024 in English, as OpenCompass collected it; DeepSeek does not say which copy its tables are of."""

from __future__ import annotations

from eval.benchmarks.base import NAMED, Hub, competition

BENCHMARK = competition(
    name="cnmo_2024",
    title="CNMO 2024 (Pass@1)",
    hub=Hub(path="opencompass/LiveMathBench", revision=None, split="test", configs=("v202412_CNMO_en",), checked=NAMED),
    question="question",
    published="CNMO 2024",
    source="as AIME 2024 in DeepSeek-R1's README",
    departs="DeepSeek names no data set: this one's 18 problems may be others than those of its tables",
)
