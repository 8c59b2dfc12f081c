"""The language of the reasoning: shares counted by hand, languages told apart, hiding places."""

from __future__ import annotations

import pytest
from reward_contract import tried

from rewards.language_consistency import prose, reasoning, score
from rewards.languages import count_words, known_languages

ENGLISH = "First we add the two numbers, then we divide the sum by three. That gives the average of the list."
SENTENCES = {
    "en": ENGLISH,
    "de": "Zuerst addieren wir die beiden Zahlen und teilen dann die Summe durch drei. Das ergibt den Durchschnitt.",
    "fr": "On additionne d'abord les deux nombres, puis on divise la somme par trois. Cela donne la moyenne.",
    "es": "Primero sumamos los dos números y luego dividimos la suma entre tres. Eso nos da el promedio.",
    "it": "Prima sommiamo i due numeri e poi dividiamo la somma per tre. Questo ci dà la media della lista.",
    "pt": "Primeiro somamos os dois números e depois dividimos a soma por três. Isso nos dá a média da lista.",
    "nl": "Eerst tellen we de twee getallen op en dan delen we de som door drie. Dat geeft het gemiddelde.",
    "pl": "Najpierw dodajemy obie liczby, a potem dzielimy sumę przez trzy. To daje nam średnią z listy.",
    "tr": "Önce iki sayıyı toplarız, sonra toplamı üçe böleriz. Bu bize listenin ortalamasını verir.",
    "vi": "Đầu tiên chúng ta cộng hai số, sau đó chia tổng cho ba. Điều đó cho ta giá trị trung bình.",
    "zh": "首先我们把两个数相加，然后把和除以三。这样就得到平均数。",
    "ja": "まず二つの数を足して、それから合計を三で割ります。これで平均が求められます。",
    "ko": "먼저 두 수를 더한 다음 합을 셋으로 나눕니다. 그러면 평균이 나옵니다.",
    "ru": "Сначала складываем два числа, затем делим сумму на три. Получаем среднее.",
    "ar": "أولا نجمع العددين ثم نقسم المجموع على ثلاثة. هذا يعطينا المتوسط.",
    "he": "קודם נחבר את שני המספרים ואז נחלק את הסכום בשלוש.",
    "el": "Πρώτα προσθέτουμε τους δύο αριθμούς και μετά διαιρούμε το άθροισμα με το τρία.",
    "hi": "पहले हम दोनों संख्याओं को जोड़ते हैं और फिर योग को तीन से भाग देते हैं।",
    "th": "ก่อนอื่นเราบวกตัวเลขสองตัวแล้วหารผลรวมด้วยสาม",
}


def think(text: str) -> str:
    return f"<think>{text}</think><answer>42</answer>"


@pytest.mark.parametrize("language", SENTENCES)
def test_each_language_is_wholly_itself_and_no_other(language: str) -> None:
    shares = {target: score(think(SENTENCES[language]), None, language=target).score for target in SENTENCES}
    assert shares.pop(language) == 1.0
    assert shares == dict.fromkeys(shares, 0.0)


@pytest.mark.parametrize(
    ("text", "language", "matching", "total"),
    [
        ("We add 加", "en", 2, 3),
        ("We add 加 them up 起来 now", "zh", 3, 8),
        ("x + y = 3", "en", 0, 0),  # variables are no words
        ("数と数", "ja", 3, 3),  # Han characters beside kana are Japanese
        ("数と数", "zh", 0, 3),
        ("数数", "ja", 0, 2),  # without kana they are Chinese
        ("हम जोड़ते हैं", "hi", 3, 3),  # vowel signs belong to their letters
        ("это sum числа", "ru", 2, 3),
        ("", "en", 0, 0),
        ("42 + 17 = 59!", "en", 0, 0),
    ],
)
def test_words_by_hand(text: str, language: str, matching: int, total: int) -> None:
    assert count_words(text, language) == (matching, total)


def test_a_sentence_in_another_language_counts_by_its_words() -> None:
    german = "Danach teilen wir die Summe durch drei."
    result = score(think(f"{ENGLISH}\n{german}"), None)
    words = len(ENGLISH.split())
    assert result.score == pytest.approx(words / (words + 7))
    assert result.detail == f"{words} of {words + 7} words"


@pytest.mark.parametrize("short", ["Okay.", "Hmm.", "So.", "Then we have.", "The answer is.", "Total apples."])
def test_a_sentence_too_short_to_tell_counts_as_the_text_around_it(short: str) -> None:
    assert score(think(f"{ENGLISH} {short}"), None).score == 1.0
    assert score(think(f"{SENTENCES['zh']}{short}"), None, language="zh").score < 1.0  # another script is always sure


def test_only_the_reasoning_counts_unless_all_is_asked_for() -> None:
    completion = f"<think>{ENGLISH}</think><answer>{SENTENCES['zh']}</answer>"
    assert score(completion, None).score == 1.0
    assert 0.0 < score(completion, None, part="all").score < 0.6
    assert reasoning("<think>a</think>b") == "a"
    assert reasoning("a</think>b") == "a"
    assert reasoning("<think>a") == "a"
    assert reasoning("a<answer>b</answer>") == "a"
    assert reasoning("a") == "a"


def test_code_and_formulas_are_not_counted() -> None:
    text = (
        "We use ```python\nfür = Zahl\n``` and $\\text{Länge} = x$ and `größe` and \\(\\alpha + \\beta\\) and "
        "\\begin{align}wir addieren\\end{align} see https://beispiel.de/seite here"
    )
    assert prose(text).split() == ["We", "use", "and", "and", "and", "and", "see", "here"]


def test_hiding_places() -> None:
    chinese = SENTENCES["zh"]
    assert score(think(""), None).score == 0.0
    assert score(think("3 + 4 = 7"), None).score == 0.0  # nothing said is not English
    assert score(think("3 + 4 = 7"), None, without_words=0.5).score == 0.5
    assert score("", None).score == 0.0
    assert score(think(f"It costs $5. {chinese}\n{chinese}"), None).score < 0.1  # a lone dollar hides nothing
    assert score(think(f"First \\( {chinese}"), None).score < 0.1  # nor a bracket that never closes
    assert score(f"{chinese}</think>{ENGLISH}", None).score == 0.0


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown language 'english'; use one of .*\ben\b"):
        score(think("a"), None, language="english")
    with pytest.raises(ValueError, match="part must be one of reasoning, all, got 'answer'"):
        score(think("a"), None, part="answer")  # type: ignore[arg-type]
    assert {"en", "zh", "sw", "ka"} <= set(known_languages())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["$", "`", r"\(", r"\begin{", "<", "```", "a. ", "中", "http://", "\\"])
def test_long_odd_texts_do_not_hold_the_reward_up(unit: str) -> None:
    assert 0.0 <= score(think(unit * 20_000), None).score <= 1.0


def test_contract() -> None:
    assert all(0.0 <= score <= 1.0 for _, score in tried("rewards.language_consistency:score"))
