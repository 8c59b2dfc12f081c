"""What a benchmark is: where its rows are, how a row becomes a problem, how answers are drawn and graded.

One file per benchmark holds one `Benchmark`; `eval.benchmarks` finds them by name. Everything else (loading, generation,
grading, statistics, tables) is the same code for all of them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

from posttrain.types import Message

Row = Mapping[str, Any]
Need = Literal["judge", "sandbox"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Rows on the Hugging Face hub.

    Attributes:
        path: the official or most used name.
        revision: the commit that is read. Benchmarks change; two numbers compare only on one revision.
        split: that is evaluated.
        configs: of the data set, read one after the other; () reads the default.
        files: of the repository, for data sets that are plain files to `datasets`; split then is not asked for.
        join: a column; rows of the files that agree in it are one row.
        fewshot_split: where worked examples come from.
        is_gated: access must be asked for on the hub, and `hf auth login` done.
        checked: how name and revision were checked, honestly.
    """

    path: str
    revision: str | None
    split: str
    configs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    join: str | None = None
    fewshot_split: str | None = None
    is_gated: bool = False
    checked: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEval:
    """The task of EleutherAI's lm-eval on the same data.

    Attributes:
        task: or group of tasks.
        subtask: of a group, the task that a row belongs to; needed where the data are a local copy.
        num_fewshot: worked examples before each question.
        fewshot_split: where lm-eval's task takes them from.
        metric, filter: of lm-eval's results, e.g. "exact_match" after "flexible-extract".
        published: row in published.yaml.
    """

    task: str
    subtask: Callable[[Row], str] | None = None
    fewshot_split: str | None = None
    num_fewshot: int
    metric: str
    filter: str = "none"
    published: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        prompt: the user's message.
        question: what the data set itself says, without our instructions: looked for in training data.
        answer: the reference; None where the grader needs none.
        metadata: what the grader gets besides.
        kind: the part of the benchmark it belongs to, such as its subject.
        cluster: what it shares with other problems, such as the passage; None: nothing.
        baseline: for pairwise judging, the answer to compare with.
        id: of the data set; None numbers them.
    """

    prompt: str
    question: str
    answer: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    kind: str | None = None
    cluster: str | None = None
    baseline: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: in recipes.
        title: in tables.
        hub: where the rows are; None for problems that `generate` makes.
        more_hubs: other data sets whose rows belong to it.
        generate: offline problems: (how many or None for all, seed) -> problems.
        columns: that a row must have.
        problem: a row -> its problem, or None for a row that does not count.
        demonstration: a row of `hub.fewshot_split` -> its (prompt, answer), for `num_fewshot` above 0.
        num_fewshot: worked examples before each problem, as turns of the chat.
        reward: the grader, a reward function like any other; 1.0 is right.
        reward_kwargs: of the grader.
        metric: the number that is quoted.
        num_samples, temperature, top_p, max_completion_length: how answers are drawn.
        final_answer: completion -> its final answer, where a majority of answers makes sense (cons@k).
        needs: without which it cannot run.
        languages: of its programs, where they are several: kinds of its problems; see `rewards.sandbox.languages`.
        is_pairwise: the grader compares with `Problem.baseline`; the number is the share of points won.
        shortens: the middle of prompts that are too long is left out, as the benchmark prescribes.
        macro: the number is the mean over these parts, and a part's the mean over its groups of kinds; empty: over problems.
        lm_eval: the task for `method: lm_eval`.
        published: its row in published.yaml.
        source: of prompt, samples, temperature and metric.
        departs: what differs from that source.
    """

    name: str
    title: str
    hub: Hub | None = None
    more_hubs: tuple[Hub, ...] = ()
    generate: Callable[[int | None, int], Sequence[Problem]] | None = None
    columns: tuple[str, ...] = ()
    problem: Callable[[Row], Problem | None] | None = None
    demonstration: Callable[[Row], tuple[str, str]] | None = None
    num_fewshot: int = 0
    reward: str
    reward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metric: str
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int = 8192
    final_answer: Callable[[str], str | None] | None = None
    needs: tuple[Need, ...] = ()
    languages: tuple[str, ...] = ()
    is_pairwise: bool = False
    shortens: bool = False
    macro: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    lm_eval: LmEval | None = None
    published: str | None = None
    source: str
    departs: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's problems as chats."""

    problems: tuple[Problem, ...]
    messages: tuple[tuple[Message, ...], ...]  # [P]
    left_out: int  # rows that do not count


# --- what several benchmarks share ------------------------------------------------------------------------------------

BOXED = "Reason step by step and put the final answer in \\boxed{}."


def mathematics(question: str) -> str:
    """A prompt whose answer stands in a box."""
    return f"{question.strip()}\n\n{BOXED}"


def competition(
    *, name: str, title: str, hub: Hub, question: str, source: str, published: str | None = None, departs: str = ""
) -> Benchmark:
    """A mathematics competition with short answers, measured as in DeepSeek-R1's README.

    Args:
        name, title, hub, source, published, departs: see `Benchmark`.
        question: the column with the problem; the answer's is `answer`, and a problem's name may stand in `id`.
    """

    def problem(row: Row) -> Problem:
        return Problem(
            prompt=mathematics(row[question]),
            question=row[question],
            answer=str(row["answer"]),
            id=str(row["id"]) if "id" in row else None,
        )

    return Benchmark(
        name=name,
        title=title,
        hub=hub,
        columns=(question, "answer"),
        problem=problem,
        reward="rewards.math_answer:score",
        metric="pass@1",
        num_samples=64,
        temperature=0.6,
        top_p=0.95,
        max_completion_length=32768,
        final_answer=boxed_number,
        published=published,
        source=source,
        departs=departs,
    )


def choice(question: str, choices: Sequence[str]) -> str:
    """A prompt that shows lettered choices and asks for the letter in a box."""
    lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    listed = "\n".join(lines)
    return (
        f"{question.strip()}\n\n{listed}\n\nReason step by step and put the letter of the right choice in \\boxed{{}}."
    )


def shuffled(choices: Sequence[str], key: str) -> list[str]:
    """The choices in an order that depends on the key alone: the same in every run."""
    order = list(choices)
    random.Random(key).shuffle(order)
    return order


def boxed_number(completion: str) -> str | None:
    """The final answer of a text for a vote: what `rewards.math_answer` grades."""
    from rewards.math_answer import extract_answer

    return extract_answer(completion)


def boxed_letter(completion: str) -> str | None:
    """The letter in the final answer, for a vote."""
    found = re.match(r"\W*([A-Za-z])(?![A-Za-z])", boxed_number(completion) or "")
    return found[1].upper() if found else None


PINNED = "name and revision as other public code pins them; not resolved against the hub here"
NAMED = "name as other public code uses it; its revision is not verified, so the newest is read"
"""How a `Hub.checked` is usually meant."""
