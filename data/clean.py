"""Cleaning chats: exact duplicates, and evaluation problems that got into the training data.

    chats, report = deduplicate(chats)
    chats, report = decontaminate(chats, evaluation, ngram=13)

`Deduplicator` and `Decontaminator` judge one record after the other, for streams: `filter(Deduplicator().keeps, chats)`.

Two texts are the same if they are after Unicode NFKC, without case, every run of white space as one space. Words are what
white space and punctuation separate (a Chinese or Japanese character is a word); signs as in "4-1=3" are no punctuation.

A training chat is contaminated by an evaluation problem if

    1. a message holds `ngram` words in a row that the problem's user messages, its answer or its worked solution hold
       (GPT-3, appendix C: 13 words), or
    2. a user message of the problem has fewer than `ngram` words but at least 4, and a message holds all of them in a
       row, or
    3. one of the chat's user messages is the whole problem, however short, punctuation at the ends aside; for a problem
       of several user messages, the chat begins with the same ones.

So "e in sleepless?" is found where a user asks just that, and not inside a longer text. Answers of fewer than `ngram` words
do not count: they are in innocent text too. System prompts of evaluation problems do not count either.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from data.records import Record

EXAMPLES = 5  # in a report
SHORTEST = 4  # words of a problem that is looked for inside other text
_ENDS = " .,;:!?…'\"。！？"
_PUNCTUATION = re.escape(".,;:!?…'\"`()[]{}‘’‚‛“”„«»‹›—–、。・「」『』【】《》〈〉")
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Chinese characters, written without spaces
_WORDS = re.compile(f"[{_WIDE}]|[^\\s{_PUNCTUATION}{_WIDE}]+")


@dataclass(frozen=True, slots=True)
class Example:
    """A record that was left out, and why."""

    id: str
    text: str  # its beginning; for contamination, the words or the problem that were found
    problem: str | None = None  # id of the evaluation problem


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """What a cleaning did."""

    kept: int
    dropped: int
    examples: tuple[Example, ...]  # the first of those dropped

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "examples": [asdict(example) for example in self.examples]}


class _Tally:
    """Counts for a report."""

    def __init__(self) -> None:
        self._kept = self._dropped = 0
        self._examples: list[Example] = []

    def keep(self) -> bool:
        self._kept += 1
        return True

    def drop(self, example: Example) -> bool:
        self._dropped += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(example)
        return False

    def report(self) -> CleaningReport:
        return CleaningReport(self._kept, self._dropped, tuple(self._examples))


# --- text -------------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """NFKC, without case, every run of white space as one space, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def words_of(text: str) -> list[str]:
    """["e", "in", "sleepless"] of "E in sleepless?"; "4-1=3" is one word."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORDS.findall(text.casefold())


def chat_key(record: Record) -> int:
    """64 bits that are the same for chats whose normalised text is: roles, contents, tool calls, tools, template options.

    Two different chats share a key with probability 2**-64: among 100 million chats, 1 in 3,700 that any two do.
    """
    digest = blake2b(digest_size=8)
    for message in record.messages:
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        _update(digest, message["role"], normalised(message["content"]), _json(others))
    _update(digest, "", _json(record.tools or []), _json(record.template_kwargs))
    return int.from_bytes(digest.digest(), "big")


def _update(digest: blake2b, *texts: str) -> None:
    for text in texts:
        value = text.encode("utf-8", "surrogatepass")
        digest.update(len(value).to_bytes(8, "big"))  # so that no text can end in another's place
        digest.update(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str) if value else ""


# --- duplicates -------------------------------------------------------------------------------------------------------


class Deduplicator:
    """Keeps the first of equal chats; remembers 8 bytes of each (some 70 bytes in a Python set)."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._tally = _Tally()

    def keeps(self, record: Record) -> bool:
        """Whether no equal chat was asked for before."""
        key = chat_key(record)
        if key in self._seen:
            return self._tally.drop(Example(record.id, _beginning(record)))
        self._seen.add(key)
        return self._tally.keep()

    def report(self) -> CleaningReport:
        return self._tally.report()


def deduplicate(records: Iterable[Record]) -> tuple[list[Record], CleaningReport]:
    """The records without exact duplicates of the whole chat (after `normalised`); the first one stays, in its place."""
    judge = Deduplicator()
    return [record for record in records if judge.keeps(record)], judge.report()


def _beginning(record: Record) -> str:
    return next((m["content"] for m in record.messages if m["role"] == "user"), record.messages[0]["content"])[:200]


# --- contamination ----------------------------------------------------------------------------------------------------


class Decontaminator:
    """Knows the evaluation problems and finds them in chats. The rules are at the top of this file."""

    def __init__(self, evaluation: Iterable[Record], ngram: int) -> None:
        """
        Args:
            evaluation: problems, or chats with their reference answer.
            ngram: words in a row.

        Raises:
            ValueError: no problem, or an `ngram` below 1.
        """
        if ngram < 1:
            raise ValueError(f"ngram must be 1 or more words, got {ngram}")
        self._ngram = ngram
        self._lead = min(SHORTEST, ngram)  # so many words of a run lead to it
        self._runs: dict[tuple[str, ...], str] = {}  # words in a row -> id of the problem
        self._leads: set[tuple[str, ...]] = set()  # the first words of the runs
        self._lengths: set[int] = set()  # of the runs
        self._whole: dict[tuple[str, ...], str] = {}  # user messages -> id of the problem
        self._tally = _Tally()
        for record in evaluation:
            self._learn(record)
        if not self._whole:
            raise ValueError("decontamination needs at least one evaluation problem with a text; got none")

    def _learn(self, record: Record) -> None:
        asked = [m["content"] for m in record.messages if m["role"] == "user"]
        told = [m["content"] for m in record.messages if m["role"] == "assistant"]
        whole = tuple(map(_whole, asked))
        if any(whole):
            self._whole.setdefault(whole, record.id)
        for text in asked:
            words = words_of(text)
            if SHORTEST <= len(words) < self._ngram:
                self._add(tuple(words), record.id)
        for text in [*asked, *told, record.answer or "", record.worked or ""]:
            for run in _windows(words_of(text), self._ngram):
                self._add(run, record.id)

    def _add(self, run: tuple[str, ...], problem: str) -> None:
        self._runs.setdefault(run, problem)
        self._leads.add(run[: self._lead])
        self._lengths.add(len(run))

    def find(self, record: Record) -> Example | None:
        """What of an evaluation problem is in a chat; None if nothing."""
        return next(self.find_all(record), None)

    def find_all(self, record: Record) -> Iterator[Example]:
        """Everything of evaluation problems that is in a chat; a problem may come several times.

        Of problems that share the words that were found, the first is named.
        """
        asked = [_whole(m["content"]) for m in record.messages if m["role"] == "user"]
        beginnings = [tuple(asked[:count]) for count in range(2, len(asked) + 1)]
        for whole in [*((text,) for text in asked), *beginnings]:
            if whole in self._whole:
                yield Example(record.id, "\n".join(whole), self._whole[whole])
        for message in record.messages:
            words = words_of(message["content"])
            if self._leads.isdisjoint(_windows(words, self._lead)):
                continue  # often; the loop is much slower
            for place, lead in enumerate(_windows(words, self._lead)):
                if lead not in self._leads:
                    continue
                for length in self._lengths:
                    run = tuple(words[place : place + length])
                    if run in self._runs:
                        yield Example(record.id, " ".join(run), self._runs[run])

    def keeps(self, record: Record) -> bool:
        """Whether nothing of an evaluation problem is in a chat."""
        found = self.find(record)
        return self._tally.keep() if found is None else self._tally.drop(found)

    def report(self) -> CleaningReport:
        return self._tally.report()


def decontaminate(
    records: Iterable[Record], evaluation: Sequence[Record], ngram: int
) -> tuple[list[Record], CleaningReport]:
    """The chats that hold nothing of an evaluation problem, in their order. The rules are at the top of this file.

    Raises:
        ValueError: no evaluation problem, or an `ngram` below 1.
    """
    judge = Decontaminator(evaluation, ngram)
    return [record for record in records if judge.keeps(record)], judge.report()


def _whole(text: str) -> str:
    return normalised(text).strip(_ENDS)


def _windows(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every run of so many words."""
    return zip(*(words[start:] for start in range(length)), strict=False)
