"""What becomes of answers: reasons to reject one, which of a prompt's are picked, and the funnel that counts it. Pure.

The reasons in their order are `REASONS`; an answer may have several, and is counted under the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.clean import Decontaminator, Deduplicator
from data.records import Record
from posttrain.distill_data import Problem
from posttrain.recipe import RejectionSection, SelectionSection
from posttrain.teachers import Generation
from posttrain.types import RewardStatus
from rewards import format as think_answer
from rewards import language_consistency, repetition
from rewards.extract import after_thinking
from rewards.languages import known_languages

# reason -> what the answers that are left are called in the funnel
REASONS = {
    "unjudged": "judged",
    "empty": "not empty",
    "truncated": "not truncated",
    "correctness": "correct",
    "format": "in format",
    "language": "in one language",
    "length": "of the right length",
    "repetition": "without repetition",
    "contaminated": "not contaminated",
    "duplicate": "not a duplicate",
    "not_picked": "kept",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rewards said of one answer."""

    reward: float | None = None  # combined; None without rewards
    scores: Mapping[str, float] = field(default_factory=dict)  # reward -> its own score
    statuses: Mapping[str, RewardStatus] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_unjudged(self) -> bool:
        """Whether some reward's infrastructure failed: nothing is known of the answer then, least of all that it is wrong."""
        return "infrastructure" in self.statuses.values()


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation with what is known and decided about it."""

    generation: Generation
    judgement: Judgement
    reasons: tuple[tuple[str, str], ...] = ()  # (reason, detail), in the order of `REASONS`

    @property
    def is_kept(self) -> bool:
        return not self.reasons

    @property
    def length(self) -> int:
        """In tokens; in characters where tokens were not counted."""
        tokens = self.generation.completion_tokens
        return tokens if tokens is not None else len(self.generation.completion)

    def without(self, reason: str, detail: str = "") -> Answer:
        """The answer with one more reason to reject it."""
        return replace(self, reasons=(*self.reasons, (reason, detail)))


# --- rules ------------------------------------------------------------------------------------------------------------


def reject(answer: Answer, rules: RejectionSection, metadata: Mapping[str, Any]) -> Answer:
    """The answer with every reason that its text and scores give.

    Args:
        answer: without reasons.
        rules: of the recipe.
        metadata: of the record; a language code in its column `language` goes before that of the rule.
    """
    text, judgement = answer.generation.completion, answer.judgement
    if judgement.is_unjudged:
        failed = [name for name, status in judgement.statuses.items() if status == "infrastructure"]
        answer = answer.without("unjudged", f"{failed[0]}: {judgement.details.get(failed[0], '')}")
    if not text.strip():
        answer = answer.without("empty")
    if rules.truncated and answer.generation.finish_reason not in ("stop", None):
        answer = answer.without("truncated", f"finish_reason {answer.generation.finish_reason}")
    for name, least in rules.correctness.items():
        is_known = judgement.statuses.get(name) != "infrastructure"
        if is_known and judgement.scores[name] < least:
            answer = answer.without("correctness", f"{name} {judgement.scores[name]:g} < {least:g}")
            break
    if rules.format is not None and not _in_format(text, rules.format):
        answer = answer.without("format", f"not {rules.format}")
    if rules.language is not None:
        own = str(metadata.get("language"))
        language = own if own in known_languages() else rules.language.language
        found = language_consistency.score(text, None, language, rules.language.part, without_words=1.0)
        if found.score < rules.language.min_share:
            answer = answer.without("language", f"{language}: {found.detail}")
    if rules.length is not None:
        detail = _out_of_bounds(answer.generation, rules)
        answer = answer.without("length", detail) if detail else answer
    if rules.repetition is not None:
        share = -repetition.score(text, None, rules.repetition.ngram_size)
        if share > rules.repetition.max_share:
            answer = answer.without("repetition", f"{share:.2f} of the n-grams were there before")
    return answer


def _in_format(text: str, wanted: str) -> bool:
    if wanted == "think_answer":
        return think_answer.score(text, None) == 1.0
    start, after = text.lstrip(), after_thinking(text)
    once = text.count("<think>") == 1 and text.count("</think>") == 1
    return once and start.startswith("<think>") and bool(after and after.strip())


def _out_of_bounds(generation: Generation, rules: RejectionSection) -> str:
    """How an answer breaks the bounds of its length; empty when it keeps them."""
    assert rules.length is not None
    bounds = rules.length
    measured = {"characters": len(generation.completion)}
    if bounds.in_tokens:
        if generation.completion_tokens is None:
            raise ValueError(
                f"rejection.length in tokens: {generation.sample_id} does not say how many it has; add a column "
                f"completion_tokens to the recordings, or give bounds in characters"
            )
        measured["tokens"] = generation.completion_tokens
    for unit, length in measured.items():
        low, high = getattr(bounds, f"min_{unit}"), getattr(bounds, f"max_{unit}")
        if low is not None and length < low:
            return f"{length} < {low} {unit}"
        if high is not None and length > high:
            return f"{length} > {high} {unit}"
    return ""


# --- picking ----------------------------------------------------------------------------------------------------------


def pick(answers: Sequence[Answer], section: SelectionSection) -> list[int]:
    """The places of the answers to keep of one prompt, in their order; ties go to the first.

    Args:
        answers: none with a reason.
        section: `shortest` and `best` take the first of an order, `diverse` see `farthest`, `all` all.
    """
    limit = len(answers) if section.limit is None else section.limit
    if section.pick == "all":
        return list(range(len(answers)))
    order: Callable[[int], Any]
    if section.pick == "shortest":
        order = lambda place: (answers[place].length, place)  # noqa: E731
    else:
        order = lambda place: (-(answers[place].judgement.reward or 0.0), answers[place].length, place)  # noqa: E731
    ranked = sorted(range(len(answers)), key=order)
    if section.pick == "diverse":
        ranked = farthest([answers[place].generation.completion for place in ranked], limit, ranked)
    return sorted(ranked[:limit])


def farthest(texts: Sequence[str], count: int, names: Sequence[int]) -> list[int]:
    """Texts that differ: the first, then always the one whose nearest of those chosen is farthest away.

    The distance is Jaccard's between the sets of word trigrams, 0 for equal sets, 1 for sets that share nothing.

    Args:
        texts: in the order of preference, which decides ties.
        count: how many at most.
        names: what each is called.

    Returns:
        The names of the chosen, in the order of choice.
    """
    grams = [_trigrams(text) for text in texts]
    chosen: list[int] = []
    while len(chosen) < min(count, len(texts)):
        left = [place for place in range(len(texts)) if place not in chosen]
        nearest = {place: min((_distance(grams[place], grams[one]) for one in chosen), default=1.0) for place in left}
        chosen.append(max(left, key=lambda place: (nearest[place], -place)))
    return [names[place] for place in chosen]


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = repetition.words(text)
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _distance(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return 1 - len(one & other) / len(one | other)


# --- one prompt after the other ---------------------------------------------------------------------------------------


class Selector:
    """Decides about the answers of one prompt after the other; remembers the chats it has let through."""

    def __init__(
        self, rejection: RejectionSection, selection: SelectionSection, decontaminator: Decontaminator | None
    ) -> None:
        self._rejection = rejection
        self._selection = selection
        self._decontaminator = decontaminator
        self._seen = Deduplicator() if selection.deduplicate else None

    def decide(self, problem: Problem, answers: Sequence[Answer]) -> list[Answer]:
        """The answers of one prompt with their reasons; those without any are kept.

        Raises:
            ValueError: a rule needs what an answer does not say.
        """
        decided = [self._clean(problem, reject(answer, self._rejection, problem.record.metadata)) for answer in answers]
        left = [place for place, answer in enumerate(decided) if answer.is_kept]
        kept = {left[place] for place in pick([decided[place] for place in left], self._selection)}
        for place in left:
            if place not in kept:
                decided[place] = decided[place].without("not_picked", self._selection.pick)
        return decided

    def _clean(self, problem: Problem, answer: Answer) -> Answer:
        """Look for evaluation problems and duplicates in what has no other fault."""
        if not answer.is_kept:
            return answer
        chat = Record(
            answer.generation.sample_id,
            (*problem.record.messages, {"role": "assistant", "content": answer.generation.completion}),
        )
        found = self._decontaminator.find(chat) if self._decontaminator else None
        if found is not None:
            return answer.without("contaminated", f"{found.problem}: {found.text}")
        if self._seen is not None and not self._seen.keeps(chat):
            return answer.without("duplicate")
        return answer


# --- the funnel -------------------------------------------------------------------------------------------------------


class Funnel:
    """Counts answers: how many are left after each reason, of all and of each kind of prompt."""

    def __init__(self) -> None:
        self.generated = 0
        self.first: Counter[str] = Counter()  # reason -> answers that it rejected first
        self.any: Counter[str] = Counter()  # reason -> answers that it applies to
        self.prompts: Counter[str] = Counter()  # "all", "with_a_correct_answer", "with_a_kept_answer"

    def add(self, answers: Sequence[Answer]) -> None:
        """The answers of one prompt, decided."""
        self.generated += len(answers)
        for answer in answers:
            names = [reason for reason, _ in answer.reasons]
            self.first.update(names[:1])
            self.any.update(set(names))
        self.prompts["all"] += 1
        self.prompts["with_a_correct_answer"] += any(_passed(answer, "correctness") for answer in answers)
        self.prompts["with_a_kept_answer"] += any(answer.is_kept for answer in answers)

    @property
    def kept(self) -> int:
        return self.generated - self.first.total()

    def steps(self) -> list[dict[str, Any]]:
        """[{"step": "generated", "left": 100, "removed": 0}, {"step": "judged", ...}, ..., {"step": "kept", ...}]"""
        left = self.generated
        rows: list[dict[str, Any]] = [{"step": "generated", "left": left, "removed": 0}]
        for reason, step in REASONS.items():
            left -= self.first[reason]
            rows.append({"step": step, "left": left, "removed": self.first[reason], "reason": reason})
        return rows

    def left_after(self, reason: str) -> int:
        """Answers that neither this reason nor one before it has rejected first."""
        names = list(REASONS)
        return self.generated - sum(self.first[name] for name in names[: names.index(reason) + 1])


def _passed(answer: Answer, reason: str) -> bool:
    """Whether neither this reason nor one before it speaks against an answer."""
    names = list(REASONS)
    before = set(names[: names.index(reason) + 1])
    return not any(name in before for name, _ in answer.reasons)
