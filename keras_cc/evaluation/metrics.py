"""Scores of a generated answer against the accepted ones, in any script.

Notable choices:

- Every metric is `metric(prediction, answers, language=None)`, a float in [0, 1], the best over the
  accepted answers. What `language` changes: English loses its articles, Turkish and Azerbaijani
  keep their dotless i apart, and "1.000" is a thousand where that is how it is written.
- The script and not the language says what a token is. Han, kana, Thai, Lao, Khmer and Burmese
  are written without spaces and compared letter by letter, each with its combining marks; elsewhere
  a word is a run of letters, marks and digits.
- Blank texts: both blank is 1, one of them blank is 0. A text of nothing but punctuation ("%"), or
  of nothing but articles ("The The"), is not blank: it is compared as it is.
"""

import collections
import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

from keras_cc.data.languages import base_language, lower_i

DECIMAL_COMMA = frozenset([
    "az", "bg", "ca", "cs", "da", "de", "el", "es", "et", "eu", "fi", "fr", "hr", "hu", "id",
    "it", "lt", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "tr", "uk", "vi",
])  # fmt: skip
"""Languages that write 3,5 and 1.000; source: Unicode CLDR. (Mexico's Spanish does not.)"""

_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)  # Thai, Lao, Burmese, Khmer, kana, Han
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(
    # India's groups (1,50,000), those of three, and plain digits.
    r"\d{1,2}(?P<lakh>,)(?:\d{2},)+\d{3}(?!\d)(?:\.\d+)?|"
    r"\d{1,3}(?:(?P<group>[ ,.'’\u066c])\d{3}(?!\d))(?:(?P=group)\d{3}(?!\d))*"
    r"(?:(?!(?P=group))[.,\u066b]\d+)?|\d+(?:[.,\u066b]\d+)?"
)


# --- text ---


def normalize(text: str, language: str | None = None) -> str:
    """Reduces a text to what answers are compared by: no case, no punctuation, single spaces.

    NFKC, case folding, then punctuation, symbols and invisible characters of every script are
    removed (by Unicode category, and not replaced by a space, as in SQuAD), and English articles.
    What would leave nothing of a text is not done.

    Args:
        text: string.
        language: ISO 639-1 code, or None.

    Returns:
        A string, empty for a blank text alone.

    Example:

    ```python
    keras_cc.evaluation.metrics.normalize("The U.S., ２０", "en")  # "us 20"
    ```

    Source: SQuAD (Rajpurkar et al. 2016) and MLQA (Lewis et al. 2020), whose scripts do the same
    to ASCII.
    """
    folded = " ".join(_folded(text, language).split())
    bare = "".join(char for char in folded if unicodedata.category(char)[0] not in "PSC")
    bare = " ".join(bare.split()) or folded
    if base_language(language) == "en":
        bare = " ".join(_ARTICLES.sub(" ", bare).split()) or bare
    return bare


def tokens(text: str, language: str | None = None) -> list[str]:
    """Splits a text into case-folded words, and into letters where words have no spaces.

    Combining marks stay with their letter (Hindi and Thai vowels, Arabic vowel signs); what is
    neither letter, mark nor digit separates words.

    Args:
        text: string.
        language: ISO 639-1 code, or None.

    Returns:
        List of strings.

    Example:

    ```python
    keras_cc.evaluation.metrics.tokens("हिन्दी, 漢字 ABC")  # ["हिन्दी", "漢", "字", "abc"]
    ```
    """
    found: list[str] = []
    in_word = False
    for char in _folded(text, language):
        kind = unicodedata.category(char)[0]
        if kind == "C":  # zero-width joiners and marks of direction are inside words
            continue
        if kind not in "LMN":
            in_word = False
            continue
        is_mark = kind == "M"
        is_alone = not is_mark and _SPACELESS.match(char) is not None
        after_letter = in_word or (is_mark and found and _SPACELESS.match(found[-1]))
        if after_letter and not is_alone:
            found[-1] += char
        elif not is_mark:
            found.append(char)
            in_word = not is_alone
    return found


def _folded(text: str, language: str | None) -> str:
    text = unicodedata.normalize("NFKC", text)
    text = lower_i(text, language)
    # Line ends and tabs are of a category that is removed.
    return re.sub(r"\s", " ", unicodedata.normalize("NFKC", text.casefold()))


def first_line(text: str) -> str:
    """The first line with something in it, `""` where none has.

    It is what a generated answer is: an untuned model goes on to the next question.

    Example:

    ```python
    keras_cc.evaluation.metrics.first_line("\\n Nairobi \\nWhat is")  # "Nairobi"
    ```
    """
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# --- metrics ---


def exact_match(prediction: str, answers: Sequence[str], language: str | None = None) -> float:
    """1.0 where the prediction is one of the answers, after `normalize`; else 0.0.

    Args:
        prediction: string.
        answers: list of strings, every accepted answer, at least one.
        language: ISO 639-1 code of prediction and answers, or None.

    Returns:
        float.

    Raises:
        TypeError: where `answers` is one string.
        ValueError: where `answers` is empty.

    Example:

    ```python
    keras_cc.evaluation.metrics.exact_match("kenya şilini.", ["Kenya şilini"], "tr")  # 1.0
    ```

    Source: SQuAD, MLQA; see `normalize`.
    """
    prediction = normalize(prediction, language)
    return float(any(normalize(answer, language) == prediction for answer in _checked(answers)))


def f1(prediction: str, answers: Sequence[str], language: str | None = None) -> float:
    """Overlap of prediction and answer as bags of tokens, the best over the answers.

        precision = common / tokens of the prediction,   recall = common / tokens of the answer
        F1 = 2 precision recall / (precision + recall)

    Args, Raises: as in `exact_match`.

    Returns:
        float in [0, 1].

    Example:

    ```python
    keras_cc.evaluation.metrics.f1("the red fox", ["a fox"], "en")  # 0.6667
    ```

    Source: SQuAD, MLQA; see `normalize`.
    """
    found = _words(prediction, language)
    return max(_overlap(found, _words(answer, language)) for answer in _checked(answers))


def _words(text: str, language: str | None) -> list[str]:
    text = normalize(text, language)
    return tokens(text, language) or text.split()  # "%" has no word in it, and is not blank


def _overlap(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((collections.Counter(found) & collections.Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))


def contains(prediction: str, answers: Sequence[str], language: str | None = None) -> float:
    """1.0 where the lower-cased prediction has a lower-cased answer in it: the XQuAD rule.

    Nothing else is normalised, `language` changes nothing. A blank answer is only in a blank
    prediction.

    Args, Raises: as in `exact_match`.

    Returns:
        float, 0.0 or 1.0.

    Example:

    ```python
    keras_cc.evaluation.metrics.contains("It is Nairobi, I think", ["nairobi"])  # 1.0
    ```

    Source: the rule of CC-Tuning's XQuAD accuracy.
    """
    prediction = prediction.lower().strip()
    golds = [answer.lower().strip() for answer in _checked(answers)]
    return float(any(gold in prediction if gold else not prediction for gold in golds))


def rouge_l(prediction: str, answers: Sequence[str], language: str | None = None) -> float:
    """ROUGE-L: F1 of the longest common subsequence of tokens, the best over the answers.

        precision = LCS / tokens of the prediction,   recall = LCS / tokens of the answer

    Computed by the `rouge-score` package over `tokens`: its own tokenizer drops everything but
    a-z and 0-9. On ASCII text the two agree (without its stemmer).

    Args, Raises: as in `exact_match`. ModuleNotFoundError where `rouge-score` is not installed.

    Returns:
        float in [0, 1].

    Example:

    ```python
    keras_cc.evaluation.metrics.rouge_l("the cat sat", ["the cat sat down"])  # 0.8571
    ```

    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    answers = _checked(answers)
    if not tokens(prediction):
        # rouge-score gives 0 to whatever has no token, to two equal texts as well.
        return exact_match(prediction, answers, language)
    return float(_rouge(language).score_multi(answers, prediction)["rougeL"].fmeasure)


class _Tokenizer:
    def __init__(self, language: str | None) -> None:
        self.language = language

    def tokenize(self, text: str) -> list[str]:
        return tokens(text, self.language)


@functools.cache
def _rouge(language: str | None):
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ModuleNotFoundError(
            "`rouge_l` needs rouge-score, which is not installed. Install it with: "
            'pip install "keras-cc[evaluation]"'
        ) from error
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Tokenizer(language))


def number(prediction: str, answers: Sequence[str], language: str | None = None) -> float:
    """1.0 where the prediction's last number is the last number of an answer; else 0.0.

    Args, Raises: as in `exact_match`; an answer without a number is a ValueError.

    Returns:
        float.

    Example:

    ```python
    keras_cc.evaluation.metrics.number("16 - 7 = 9, so $18.00", ["18"])  # 1.0
    ```

    Source: MGSM (Shi et al. 2022).
    """
    golds = [last_number(answer, language) for answer in _checked(answers)]
    if None in golds:
        raise ValueError(f"`answers` must have a number in each. Received: answers={answers!r}")
    return float(last_number(prediction, language) in golds)


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric for metric in (exact_match, f1, contains, rouge_l, number)
}


def _checked(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):
        raise TypeError(f"`answers` must be a list of strings. Received: answers={answers!r}")
    if not len(answers):
        raise ValueError("`answers` must have at least one accepted answer. Received: answers=[]")
    return list(answers)


# --- what a text says ---


def last_number(text: str, language: str | None = None) -> float | None:
    """Reads the last number of a text, in the digits of any script.

    Digits in groups of three are one number: 1,000, 1 000, 1'000, ١٬٠٠٠, and so are India's,
    1,50,000. Superscripts are no digits. A single comma before
    three digits groups them, and a single point is a decimal point, except in the languages of
    `DECIMAL_COMMA`, where it is the other way round. Numerals in words or in Chinese characters
    are not read.

    Args:
        text: string.
        language: ISO 639-1 code, or None.

    Returns:
        float, or None where there is no number.

    Example:

    ```python
    keras_cc.evaluation.metrics.last_number("1.500", "de")  # 1500.0
    keras_cc.evaluation.metrics.last_number("1.500")  # 1.5
    ```
    """
    text, found = _western_digits(text), None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    decimal = "," if base_language(language) in DECIMAL_COMMA else "."
    digits, group = found[0], found["group"]
    if found["lakh"]:
        digits = digits.replace(",", "")
    # One group behind the decimal sign is a fraction: 1.500 in English, 1,500 in German. With
    # another sign after it (1.234,5) it is none, whatever the language.
    rest = digits.replace(group, "") if group else digits
    if group != decimal or digits.count(group) > 1 or not rest.isdigit():
        digits = rest
    digits = digits.replace(",", ".").replace("\u066b", ".")
    before = text[: found.start()]
    negative = re.search(r"(?<!\w)[-\u2212]$", before) is not None
    return -float(digits) if negative else float(digits)


def _western_digits(text: str) -> str:
    return "".join(_western(char) for char in text)


def _western(char: str) -> str:
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if unicodedata.category(char) == "Zs":
        return " "
    # Full-width signs; but not what is a digit in another place, as in m\u00b2.
    return unicodedata.normalize("NFKC", char) if "\uff00" <= char <= "\uff0f" else char
