r"""The 25 verifiable instructions of IFEval (arXiv 2311.07911), one small function each.

A check is `check(text, **options) -> bool`; `CHECKS` maps the ids of the data set google/IFEval to them, and their options
have the names of its column `kwargs`. Where this departs from the original:

- Sentences and words are found by rules of this file, not by NLTK's models, which have to be downloaded.
- The language is that of most words (`rewards.languages`), not the guess of langdetect, which is unsure of short texts.
- Keywords are looked for as they are written; the original takes them for regular expressions.
- An instruction whose options are missing is an error; the original draws them at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from rewards.languages import count_words

Check = Callable[..., bool]
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|no|fig|inc|ltd|u\.s|a\.m|p\.m|[a-z])\.$", re.IGNORECASE
)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def count_sentences(text: str) -> int:
    """Stretches that end with a mark (.!?…。！？) before white space or the end; a rest without a mark is one too.

    A full stop after a title, a common abbreviation or a single letter ends nothing.
    """
    count, open_words = 0, False
    for piece in re.split(r"(?<=[.!?…])[\"'”’)\]*]*\s+|(?<=[。！？])", text):
        if not re.search(r"\w", piece):
            continue
        open_words = _ABBREVIATION.search(piece[-12:]) is not None
        count += not open_words
    return count + open_words


def compare(number: int, relation: str, threshold: float) -> bool:
    """The two relations of IFEval.

    Raises:
        ValueError: another relation.
    """
    if relation == "at least":
        return number >= threshold
    if relation == "less than":
        return number < threshold
    raise ValueError(f"relation must be 'at least' or 'less than', got {relation!r}")


def occurrences(text: str, keyword: str) -> int:
    """How often a keyword stands in the text, in either case, parts of words included."""
    return text.lower().count(keyword.strip().lower())


def in_language(text: str, language: str) -> bool:
    """Whether most words are in the language."""
    matching, total = count_words(text, language)
    return matching > total / 2


# ---- keywords


def existence(text: str, *, keywords: Sequence[str]) -> bool:
    return all(occurrences(text, keyword) for keyword in keywords)


def frequency(text: str, *, keyword: str, frequency: float, relation: str) -> bool:
    return compare(occurrences(text, keyword), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: float, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


# ---- language and lengths


def response_language(text: str, *, language: str) -> bool:
    return in_language(text, language)


def number_sentences(text: str, *, num_sentences: float, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


def number_words(text: str, *, num_words: float, relation: str) -> bool:
    return compare(len(words(text)), relation, num_words)


def number_paragraphs(text: str, *, num_paragraphs: float) -> bool:
    """Paragraphs stand between dividers ***; an empty one is allowed at the start and at the end only."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\s?\*\*\*\s?", text)]
    return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """Paragraphs stand between empty lines."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= len(paragraphs):
        return False
    first = re.match(r"[\"'“‘(*]*([^\s.,?!\"'”’)*]+)", paragraphs[int(nth_paragraph) - 1])
    return first is not None and first[1].lower() == first_word.lower()


# ---- content and format


def number_placeholders(text: str, *, num_placeholders: float) -> bool:
    return len(re.findall(r"\[[^\]]*\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """The marker, its letters with or without spaces between them, anywhere in the text."""
    letters = [re.escape(letter) for letter in postscript_marker.strip().rstrip(".").split(".")]
    return re.search(r"\.\s?".join(letters) + (r"\." if postscript_marker == "P.S." else ""), text, re.I) is not None


def number_bullet_lists(text: str, *, num_bullets: float) -> bool:
    return len(re.findall(r"^[^\S\n]*(?:\*(?!\*)|-)[^\n]", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in CONSTRAINED_RESPONSES)


def number_highlighted_sections(text: str, *, num_highlights: float) -> bool:
    """*sections* and **sections** that are not empty."""
    found = re.findall(r"\*\*([^\n*]+)\*\*|(?<!\*)\*([^\n*]+)\*(?!\*)", text)
    return sum(bool("".join(pair).strip()) for pair in found) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: float) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """Nothing but JSON, with or without a fence of ``` around it."""
    inner = re.fullmatch(r"```(?:json)?\s*(.*?)\s*(?:```)?", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(inner[1] if inner else text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A line with <<something>> in it."""
    return any(line.partition("<<")[2].rpartition(">>")[0].strip("<> ") for line in text.split("\n"))


# ---- combinations, start, end, case, punctuation


def two_responses(text: str) -> bool:
    """Two different texts with ****** between them."""
    parts = [part.strip() for part in text.split("******")]
    kept = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(kept) == 2 and all(kept) and kept[0] != kept[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def english_capital(text: str) -> bool:
    return text.isupper() and in_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and in_language(text, "en")


def capital_word_frequency(text: str, *, capital_frequency: float, capital_relation: str) -> bool:
    capitals = [word for word in re.findall(r"[^\W_][\w'’-]*", text) if word.isupper()]
    return compare(len(capitals), capital_relation, capital_frequency)


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
