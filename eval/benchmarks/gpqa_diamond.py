"""GPQA-Diamond (Rein et al. 2023, arXiv 2311.12022): 198 questions of graduate level, the right choice first in a row."""

from __future__ import annotations

from eval.benchmarks.base import PINNED, Benchmark, Hub, Problem, Row, boxed_letter, choice, shuffled


def problem(row: Row) -> Problem:
    texts = [row[column].strip() for column in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))]
    choices = shuffled(texts, row["Question"])
    return Problem(
        prompt=choice(row["Question"], choices),
        question=row["Question"],
        answer="ABCD"[choices.index(texts[0])],
        metadata={"num_choices": 4},
        kind=row.get("High-level domain"),
        id=row.get("Record ID"),
    )


BENCHMARK = Benchmark(
    name="gpqa_diamond",
    title="GPQA-Diamond (Pass@1)",
    hub=Hub(
        path="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        split="train",
        configs=("gpqa_diamond",),
        is_gated=True,
        checked=PINNED,
    ),
    columns=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    problem=problem,
    reward="rewards.multiple_choice:score",
    metric="pass@1",
    num_samples=8,
    temperature=0.6,
    top_p=0.95,
    max_completion_length=32768,
    final_answer=boxed_letter,
    published="GPQA-Diamond",
    source="DeepSeek-R1's README: temperature 0.6, top-p 0.95, 32,768 tokens",
    departs="8 samples a problem instead of 64; the order of the choices depends on the question's text alone",
)
