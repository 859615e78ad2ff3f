r"""Numbers in a text: the many ways to write one, and what looks like one and is none.

All patterns are bounded or possessive: time grows linearly with the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 60  # characters of a number; longer runs of digits are noise
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTERS = {"k": "thousand", "m": "million", "b": "billion"}
_MONEY = "$\u20ac\u00a3\u00a5\u20b9"
_SAME_MEANING = str.maketrans("\u2212\uff0d\u2010\u2011\u2013\u2044\u00a0\u202f\u2009", "-----/   ")
_LAST_CALCULATION = re.compile(r"<<[^<>]{0,200}=([^<>=]{1,40})>>\s{0,9}\Z")  # GSM8K's calculator notes
_CALCULATION = re.compile(r"<<[^<>]{0,200}>>")
_LATEX_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s?(?:\{\s?(-?[\d,.]{1,40})\s?\}\{\s?([\d,.]{1,40})\s?\}|(\d)\s?(\d))")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")

# Spellings that are rewritten to the plain English one before numbers are looked for.
_GROUPED = (
    re.compile(r"(?<![\d.,])\d{1,3}(?:[\u00a0\u202f\u2009]\d{3}){1,6}(?!\d)"),  # no-break and thin spaces
    re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d?(?: \d{3}){2,6}(?![\d ]\d)"),  # 1 234 567
    re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2} 000(?![\d ]\d|\d)"),  # 12 000
    re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:['\u2019]\d{3}){1,6}(?!\d)"),  # Swiss
    re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2}){1,6},\d{3}(?![\d,])"),  # Indian
)
_DECIMAL_COMMA = re.compile(
    rf"(?<![\d.,(\[{{])(?P<whole>\d{{1,3}}(?:\.\d{{3}}){{1,6}}|\d{{1,15}}),(?P<part>\d{{1,2}})(?![\d,])"
    rf"(?=(?P<unit>\s?(?:[{_MONEY}%]|(?!(?:and|or|are|is|was|were|then|to)\b)[^\W\d_]))?)"
)
_REWRITTEN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"\bnegative\s(?=\\?[{_MONEY}]?\d)", re.IGNORECASE), "-"),
    (re.compile(rf"(?:\A|(?<=[:=]\s)|(?<=\b(?:is|be)\s))minus\s(?=\\?[{_MONEY}]?\d)", re.IGNORECASE), "-"),
    (re.compile(r"(?<![\d./,])(\d{1,9})\s(?:dollars?|euros?)(?:,?\sand)?\s(\d\d)\scents?\b", re.IGNORECASE), r"\1.\2"),
    (re.compile(r"(?<![\d./,])(\d{1,9})\s(?:dollars?|euros?)(?:,?\sand)?\s(\d)\scents?\b", re.IGNORECASE), r"\1.0\2"),
    (re.compile(r"(?<![\d./,])\d{1,9}\sdozens?,?\s(?:or|which\sis)\s(?=\d)", re.IGNORECASE), ""),
    (re.compile(r"(?<![\d./,])(\d{1,9})\sand\s(?:a|one)[\s-]half\b", re.IGNORECASE), r"\1 1/2"),
    (re.compile(r"(?<![\d./,])(\d{1,9})\sand\s(?=\d{1,3}/\d{1,3}(?!\d))", re.IGNORECASE), r"\1 "),
    (
        re.compile(
            r"(?<![\d.])(\d{1,20}(?:\.\d{1,20})?)\s?(?:\u00d7|x|\*|\\times|\\cdot)\s?10\^(?:\{([-+]?\d{1,2})\}|([-+]?\d{1,2}))"
        ),
        r"\1e\2\3",
    ),
)
_THOUSANDS_LETTER = re.compile(rf"([{_MONEY}]\s?\d{{1,12}}(?:[.,]\d{{1,12}}){{0,6}})\s?([kKMB])\b")

_TOKEN = re.compile(
    r"""
    (?P<label>^[ \t]{0,8}\d{1,2}[.)](?=[ \t]+\S))
    | (?P<skip>\b(?:step|question|problem|example|exercise|equation)[ ]\#?\d++ | \^\{?-?\d++\}?
        | (?<=[A-Za-z\u00c0-\u1fff])(?:_\{?)?\d[\w.]*+ | (?<![\d.,])\d++(?:st|nd|rd|th)\b)
    | (?P<opaque>\d{1,4}(?P<between>[-/.])\d{1,2}(?P=between)\d{1,4}(?!\d) | \d++(?::\d++)+ | \d++[ ]:[ ]\d++
        | \d++(?:\.\d++){2,}
        | \d++\s(?:hours?|hrs?|minutes?|feet|foot|ft|pounds?|lbs?|weeks?|days?|years?)(?:,|,?\sand)?\s\d++
          \s(?:minutes?|mins?|seconds?|inch(?:es)?|ounces?|oz|hours?|days?|months?)\b)
    | (?P<sign>(?<![\w)\]}%])[-+](?:\\?[$\u20ac\u00a3\u00a5\u20b9][ ]?)?(?=\.?\d))?
      (?P<digits>(?:\d{1,3}(?:,\d{3})++(?!\d|,\d)|(?P<list>\d++(?:,\d++)+)|\d++)(?:\.\d++)?|(?<![\w.,])\.\d++)
      (?:(?P<exponent>[eE][-+]?\d{1,2})(?!\w))?
      (?:(?P<mixed>[ ]\d{1,4})?[ ]?/[ ]?(?P<denominator>\d++(?:\.\d++)?))?
      (?P<range>-\d[\d.,]*+)?
      (?:[ ](?P<scale>thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """A number and where it stands. Its value is None for a date, time, ratio, range or version: no one value."""

    start: int
    end: int
    value: Fraction | None


def normalised(text: str) -> str:
    """`text` with every number in the one spelling that `find_numbers` reads, as far as its own one is decidable."""
    text = _CALCULATION.sub("", _LAST_CALCULATION.sub(r" \1", text))
    for grouped in _GROUPED:
        text = grouped.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = text.translate(_SAME_MEANING)
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("\\,", ",").replace("\\%", "%")
    text = re.sub(rf"\\text\{{\\?([{_MONEY}])\}}", r"\1", text)
    text = _DECIMAL_COMMA.sub(_with_a_point, text)
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = _THOUSANDS_LETTER.sub(lambda found: f"{found[1]} {_LETTERS[found[2].lower()]}", text)
    return _LATEX_FRACTION.sub(
        lambda found: f"{found[1] + ' ' if found[1] else ''}{found[2] or found[4]}/{found[3] or found[5]}", text
    )


def _with_a_point(found: re.Match[str]) -> str:
    is_decimal = "." in found["whole"] or found["unit"]
    return f"{found['whole'].replace('.', '')}.{found['part']}" if is_decimal else found[0]


def find_numbers(text: str) -> tuple[list[Number], list[Number]]:
    """The numbers of `text` in order, and apart from them the counts of its lists (1., 2., 3. at line starts)."""
    numbers: list[Number] = []
    list_counts: list[Number] = []
    count = 0
    for token in _TOKEN.finditer(text):
        if token["label"]:
            label = int(token["label"].strip()[:-1])
            is_count = label in (1, count + 1)
            count = label if is_count else count
            (list_counts if is_count else numbers).append(Number(token.start(), token.end() - 1, Fraction(label)))
        elif not token["skip"]:
            numbers.append(Number(token.start(), token.end(), _value(text, token)))
    return numbers, list_counts


def _value(text: str, token: re.Match[str]) -> Fraction | None:
    if token["opaque"] or token["list"] or token["range"] or len(token[0]) > _LONGEST:
        return None
    number = Fraction(token["digits"].replace(",", "") + (token["exponent"] or ""))
    if token["denominator"]:
        denominator = Fraction(token["denominator"])
        if not denominator:
            return None
        number = number + Fraction(token["mixed"]) / denominator if token["mixed"] else number / denominator
    number *= _SCALES.get((token["scale"] or "").lower(), 1)
    before = text[max(0, token.start() - 4) : token.start()].rstrip(" ")
    is_difference = before[-1:].isdecimal() or before[-1:] == ")"  # "5 -3"
    return -number if (token["sign"] or "").startswith("-") and not is_difference else number


_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_ONE_WORD = rf"(?:{'|'.join(sorted([*_WORDS, 'hundred', 'dozen', *_SCALES], key=len, reverse=True))})"
_NUMBER_WORDS = re.compile(
    rf"\b{_ONE_WORD}(?:(?:[\s-]|\sand\s)(?:a\s)?{_ONE_WORD}){{0,12}}+(?P<half>\sand\sa\shalf)?\b", re.IGNORECASE
)
# "the two boys", "both", "no one": words that count nothing anew.
_NO_QUANTITY_BEFORE = re.compile(
    r"\b(?:the|these|those|both|all|no|any|every|some|each|this|that|which)\s\Z", re.IGNORECASE
)
_NO_QUANTITY_AFTER = re.compile(r"\s(?:of|another|by|day)\b", re.IGNORECASE)


def find_number_words(text: str) -> list[Number]:
    """The English cardinal numbers that `text` writes in words: twelve, twenty-five, one hundred and two, a dozen."""
    return [
        Number(
            found.start(),
            found.end(),
            _spoken(re.split(r"[\s-]+", found[0].lower())) + bool(found["half"]) * Fraction(1, 2),
        )
        for found in _NUMBER_WORDS.finditer(text)
        if not _NO_QUANTITY_BEFORE.search(text[max(0, found.start() - 7) : found.start()])
        and not (found[0].lower() == "one" and _NO_QUANTITY_AFTER.match(text, found.end()))
    ]


def _spoken(words: list[str]) -> Fraction:
    total = group = 0
    for word in words:
        if word in _SCALES:
            total, group = total + max(group, 1) * _SCALES[word], 0
        elif word in ("hundred", "dozen"):
            group = max(group, 1) * (100 if word == "hundred" else 12)
        else:
            group += _WORDS.get(word, 0)
    return Fraction(total + group)
