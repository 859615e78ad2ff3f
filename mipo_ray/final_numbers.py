r"""The number that a response ends on.

Marked numbers come first (`#### 42`, `\boxed{42}`, "the answer is 42"), and the last mark wins. All patterns are
bounded or possessive: time grows linearly with the length of the response.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction

from mipo_ray.final_statements import ANSWER, END_OF_SENTENCE, IS, OPERATOR, before_next_question


@dataclass(frozen=True)
class _Number:
    start: int
    end: int
    value: Fraction | None  # None: a date, time, ratio, range or version, which has no one value


_LONGEST = 60  # characters of a number; longer runs of digits are noise
_REACH = 300  # characters after a mark in which its number stands
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SAME_MEANING = str.maketrans("\u2212\uff0d\u2010\u2011\u2013\u2044\u00a0\u202f", "-----/  ")
_CALCULATION = re.compile(r"<<[^<>]{0,200}>>")  # GSM8K's calculator notes
_LATEX_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s?(?:\{\s?(-?[\d,.]{1,40})\s?\}\{\s?([\d,.]{1,40})\s?\}|(\d)\s?(\d))")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")

_TOKEN = re.compile(
    r"""
    (?P<label>^[ \t]{0,8}\d{1,2}[.)](?=[ \t]+\S))
    | (?P<skip>\b(?:step|question|problem|example|exercise|equation)[ ]\#?\d++ | \^\{?-?\d++\}?
        | (?<=[^\W\d_])(?:_\{?)?\d[\w.]*+ | (?<![\d.,])\d++(?:st|nd|rd|th)\b)
    | (?P<opaque>\d{1,4}([-/.])\d{1,2}\4\d{1,4}(?!\d) | \d++(?::\d++)+ | \d++(?:\.\d++){2,})
    | (?P<sign>(?<![\w)\]}%])[-+](?:\\?[$\u20ac\u00a3\u00a5\u20b9][ ]?)?(?=\.?\d))?
      (?P<digits>(?:\d{1,3}(?:,\d{3})++(?!\d|,\d)|(?P<list>\d++(?:,\d++)+)|\d++)(?:\.\d++)?|(?<![\w.,])\.\d++)
      (?:(?P<exponent>[eE][-+]?\d{1,2})(?!\w))?
      (?:(?P<mixed>[ ]\d{1,4})?[ ]?/[ ]?(?P<denominator>\d++(?:\.\d++)?))?
      (?P<range>-\d[\d.,]*+)?
      (?:[ ](?P<scale>thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)

_MARK = re.compile(
    rf"\#{{4}}|\\boxed\s?\{{|{ANSWER}(?:(?=[^\w.]{{0,10}}\d)|(?:(?!{ANSWER})[^.!?\n]){{0,80}}?{IS})", re.IGNORECASE
)
_EQUALS = re.compile(r"(?<![<>!=])[=\u2248](?!=)")
_BEFORE_NUMBER = re.compile(
    r"""(?:[\s$\u20ac\u00a3\u00a5\u20b9*_`"'\u201c(\[{\\~\u2248:=,]|\b(?:boxed|textbf|text|mathbf|mathrm|about|around
    |approximately|exactly|roughly|only|just|equal|to|an?|total|of|therefore|then|thus|usd|eur|is|be|the|number)\b)*+""",
    re.VERBOSE | re.IGNORECASE,
)
_IRRATIONAL = re.compile(r"\\sqrt|\\pi|\u221a|\u03c0")


def final_number(text: str) -> Fraction | None:
    """The number a response ends on, exactly, or None if there is none.

    In this order: the last number marked by `####`, `\\boxed{...}` or "answer is"; the last result of an equation
    ("= 42"); the last number. Where an expression is marked, its result counts ("the answer is 5 + 3 = 8").

    Read: thousands with commas, signs (also the Unicode minus), decimals, fractions (3/4, \\frac{3}{4}, 2 1/2), powers
    of ten (1.5e3, 5 million), currencies and units beside the number. A percentage is the number before the sign: 50%
    is 50. Not numbers: the counts of a list ("2. Then ..."), ordinals, exponents, digits inside a word ("H2O"), words
    ("forty"). A date, time, ratio, range or a list without spaces (2024-05-01, 3:30, 10-20, 1,5) has no one value:
    as a marked answer it gives None, elsewhere it is passed over. Decimal commas and spaced thousands are not read.
    """
    text = _normalised(before_next_question(text))
    numbers, list_counts = _numbers(text)
    starts = [number.start for number in numbers]
    for mark in reversed(list(_MARK.finditer(text))):
        found = _marked(text, mark, numbers, starts)
        if found:
            return found.value
    for mark in reversed(list(_EQUALS.finditer(text))):
        result = _direct(text, mark.end(), numbers, starts)
        if result and result.value is not None and not _goes_on(text, result):
            return result.value
    values = [number.value for number in numbers or list_counts if number.value is not None]
    return values[-1] if values else None


def _normalised(text: str) -> str:
    text = _CALCULATION.sub("", text.translate(_SAME_MEANING))
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("\\,", ",").replace("\\%", "%")
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    return _LATEX_FRACTION.sub(
        lambda found: f"{found[1] + ' ' if found[1] else ''}{found[2] or found[4]}/{found[3] or found[5]}", text
    )


def _numbers(text: str) -> tuple[list[_Number], list[_Number]]:
    """The numbers of `text` in order, and apart from them the counts of its lists (1., 2., 3. at line starts)."""
    numbers: list[_Number] = []
    list_counts: list[_Number] = []
    count = 0
    for token in _TOKEN.finditer(text):
        if token["label"]:
            label = int(token["label"].strip()[:-1])
            is_count = label in (1, count + 1)
            count = label if is_count else count
            (list_counts if is_count else numbers).append(_Number(token.start(), token.end() - 1, Fraction(label)))
        elif not token["skip"]:
            numbers.append(_Number(token.start(), token.end(), _value(text, token)))
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


def _marked(text: str, mark: re.Match[str], numbers: list[_Number], starts: list[int]) -> _Number | None:
    """The number that `mark` announces: right after it, else the result or the last one of its sentence."""
    start, limit = mark.end(), mark.end() + _REACH
    begin = start + len(text[start:limit]) - len(text[start:limit].lstrip())
    if mark[0].startswith("\\"):
        end = begin + len(text[begin:limit].partition("}")[0])
        if _IRRATIONAL.search(text, begin, end):
            return _Number(begin, end, None)
    else:
        end = begin + len(END_OF_SENTENCE.split(text[begin:limit], 1)[0])
    direct = _direct(text, start, numbers, starts)
    if direct and not _goes_on(text, direct):
        return direct
    for equals in reversed(list(_EQUALS.finditer(text, begin, end))):
        result = _direct(text, equals.end(), numbers, starts)
        if result and not _goes_on(text, result):
            return result
    if direct:  # an expression without its result
        return _Number(direct.start, direct.end, None)
    inside = numbers[bisect_left(starts, begin) : bisect_left(starts, end)]
    if not inside or re.match(r"not\b(?!.{0,80}\bbut\b)", text[begin:end], re.IGNORECASE):
        return None
    return inside[-1]


def _goes_on(text: str, number: _Number) -> bool:
    """Whether `number` is only the beginning of an expression; "5-3" has been read as one without a value."""
    return bool(OPERATOR.match(text, number.end)) or (number.value is None and text.startswith("=", number.end))


def _direct(text: str, start: int, numbers: list[_Number], starts: list[int]) -> _Number | None:
    """The first number after `start` if nothing but decoration stands between."""
    index = bisect_left(starts, start)
    if index == len(numbers) or numbers[index].start - start > 60:
        return None
    between = _BEFORE_NUMBER.match(text, start, numbers[index].start)
    return numbers[index] if between and between.end() == numbers[index].start else None
