"""Which language words are in: by script where that decides, by py3langid among languages of the Latin script.

"Share of English words" needs no judgement of single words: a Han character is Chinese or Japanese whatever stands around
it, and a whole sentence of Latin letters can be told apart well, which a single word often cannot.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

# Scripts that decide the language, for the purpose of this module. Languages that share a script (Russian and Ukrainian,
# Arabic and Persian) are not told apart.
_DECIDED = """
zh CJK | yue CJK | wuu CJK | ja CJK HIRAGANA KATAKANA | ko HANGUL
ru CYRILLIC | uk CYRILLIC | be CYRILLIC | bg CYRILLIC | mk CYRILLIC | sr CYRILLIC | kk CYRILLIC | ky CYRILLIC
mn CYRILLIC | tg CYRILLIC | tt CYRILLIC | ar ARABIC | fa ARABIC | ur ARABIC | ps ARABIC | he HEBREW | el GREEK
hi DEVANAGARI | mr DEVANAGARI | ne DEVANAGARI | sa DEVANAGARI | bn BENGALI | pa GURMUKHI | gu GUJARATI | ta TAMIL
te TELUGU | kn KANNADA | ml MALAYALAM | si SINHALA | th THAI | lo LAO | km KHMER | my MYANMAR | ka GEORGIAN
hy ARMENIAN | am ETHIOPIC
"""
SCRIPTS = {
    language: frozenset(scripts)
    for language, *scripts in (entry.split() for entry in _DECIDED.strip().replace("\n", "|").split("|"))
}
UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})  # a character counts as a word
KANA = frozenset({"HIRAGANA", "KATAKANA"})
# What a Latin sentence is taken for; the language asked for is added. Fewer rivals make short sentences surer.
WIDESPREAD = (
    *("en", "fr", "de", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl"),
    *("cs", "sk", "hu", "ro", "hr", "tr", "id", "vi", "et", "lt", "lv", "sl"),
)
SURE = 0.8  # probability from which a sentence's language is believed; below it the whole text's language counts
_SENTENCE_END = re.compile(r"(?<=[.!?。！？;:])\s|\n|(?<=[。！？])")
_TOKEN = re.compile(r"[^\s\x00-@\[-`{-\x7f]+")  # neither white space nor ASCII signs and digits


def known_languages() -> list[str]:
    """ISO 639 codes that `count_words` takes: those decided by script, and those of py3langid."""
    return sorted({*SCRIPTS, *_identifier(())[1]})


def count_words(text: str, language: str) -> tuple[int, int]:
    """(words of the language, all words) of a text. Single Latin letters are taken for variables and not counted.

    In scripts written without spaces a character counts as a word. Han characters are Japanese in a sentence that has kana,
    and Chinese in one that has none.

    Raises:
        ValueError: a language that is not known.
    """
    if language not in SCRIPTS and language not in _identifier(())[1]:
        raise ValueError(f"unknown language {language!r}; use one of {', '.join(known_languages())}")
    matching = total = 0
    overall: bool | None = None
    for sentence in _SENTENCE_END.split(text):
        words = [word for word in _words(sentence) if len(word[0]) > 1 or word[1] != "LATIN"]
        total += len(words)
        if language in SCRIPTS:
            matching += _count_by_script([script for _, script in words], language)
            continue
        latin = " ".join(word for word, script in words if script == "LATIN")
        if latin:
            verdict = _is_language(latin, language)
            if verdict is None:
                overall = _most_likely(text, language) if overall is None else overall
                verdict = overall
            matching += sum(script == "LATIN" for _, script in words) if verdict else 0
    return matching, total


def _count_by_script(scripts: list[str], language: str) -> int:
    has_kana = any(script in KANA for script in scripts)
    own = SCRIPTS[language]
    if "CJK" in own and has_kana != (language == "ja"):
        own = own - {"CJK"}
    return sum(script in own for script in scripts)


def _words(sentence: str) -> Iterator[tuple[str, str]]:
    """(word, script) of each word; a run of letters that changes its script is several words."""
    for token in _TOKEN.findall(sentence):
        if token.isascii():
            yield token, "LATIN"
            continue
        word, script = "", ""
        for character in token:
            found = _script(character)
            if found == "MARK" or (found == script and script not in UNSPACED):
                word += character
            else:
                if script:
                    yield word, script
                word, script = character, found
        if script:
            yield word, script


@lru_cache(maxsize=8192)
def _script(character: str) -> str:
    """ "LATIN", "CJK", ...; "" for what is no letter, "MARK" for a mark on the letter before."""
    category = unicodedata.category(character)
    if category.startswith("M"):
        return "MARK"
    if not category.startswith("L"):
        return ""
    names = unicodedata.name(character, "").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "").split()
    return names[0] if names else ""


def _is_language(text: str, language: str) -> bool | None:
    """Whether a sentence is in the language; None when neither yes nor no is sure."""
    best, probability = _rank(text, language)
    return best == language if probability >= SURE else None


def _most_likely(text: str, language: str) -> bool:
    latin = " ".join(word for word, script in _words(text) if script == "LATIN" and len(word) > 1)
    return _rank(latin, language)[0] == language


@lru_cache(maxsize=4096)
def _rank(text: str, language: str) -> tuple[str, float]:
    identifier, _ = _identifier(tuple(sorted({*WIDESPREAD, language})))
    best, probability = identifier.classify(text.lower())
    return str(best), float(probability)


@cache
def _identifier(languages: tuple[str, ...]) -> tuple[Any, list[str]]:
    """py3langid restricted to some languages, all for (); and the languages it knows."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = [str(language) for language in identifier.labels]
    if languages:
        identifier.set_languages(list(languages))
    return identifier, known
