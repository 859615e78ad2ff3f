r"""The number that a response ends on.

Marked numbers come first (`#### 42`, `\boxed{42}`, "the answer is 42"), and the last mark wins. All patterns are
bounded or possessive: time grows linearly with the length of the response.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction

from mipo_ray.text.final_answers.number_tokens import Number, find_number_words, find_numbers, normalised
from mipo_ray.text.final_answers.statements import ANSWER, END_OF_SENTENCE, IS, OPERATOR, own_answer

_REACH = 300  # characters after a mark in which its number stands

_MARK = re.compile(
    rf"\#{{4}}|\\boxed\s?\{{|^A:|{ANSWER}(?:(?=[^\w.]{{0,10}}\d)|(?:(?!{ANSWER})[^.!?\n]){{0,80}}?{IS})",
    re.IGNORECASE | re.MULTILINE,
)
_EQUALS = re.compile(
    r"(?<![<>!=])[=\u2248](?!=)|\b(?:equals|(?:is|are) equal to|rounds (?:up |down )?to|rounded (?:up |down )?to)\b",
    re.IGNORECASE,
)
# "50 apples / 2": the operator stands behind the unit.
_UNIT_AND_OPERATOR = re.compile(r"%?(?:\s[^\W\d_]+){1,3}\s?[+*/\u00d7\u00f7]\s?\\?[$(]?\d")
_SHARE = re.compile(
    r"[$)]{0,2}\s(?:\\text\s?\{\s?)?of\s(?:\}\s?)?(?P<whole>(?:(?:the|those|these|all|his|her|their|its)\s)?\\?[$]?\d)?"
)
_NAME_ALONE = re.compile(r"\s?[(]?[^\W\d_]{1,12}[)]?\s{0,4}(?:[.,;]|\n|\Z)")
_RESULT = re.compile(
    rf"{_EQUALS.pattern}|,\s(?:or|so|thus|hence|that\sis|i\.?e\.?),?(?=\s)|\b(?:which|that)\s(?:is|equals|makes|gives)\b",
    re.IGNORECASE,
)
_SHARE_RESULT = re.compile(r"\bis\b|:|,?\s(?:giving|making|leaving)\b", re.IGNORECASE)
_BEFORE_NUMBER = re.compile(
    r"""(?:[\s\#$\u20ac\u00a3\u00a5\u20b9*_`"'\u201c(\[{\\~\u2248:=,\u2014]|-(?=\s)|\b(?:boxed|textbf|text|mathbf|mathrm|about|around
    |approximately|exactly|roughly|only|just|equal|to|an?|total|of|therefore|then|thus|usd|eur|is|be|the|number)\b)*+""",
    re.VERBOSE | re.IGNORECASE,
)
_IRRATIONAL = re.compile(r"\\sqrt|\\pi|\u221a|\u03c0")
# Two candidates, or the ends of a range.
_OR_ANOTHER = re.compile(
    r"%?,?\s(?:or|to)\s\\?[$]?\d"
    r"|\sand\s\\?[$]?\d[\d,]{0,20}(?:\.\d{1,9})?[$)*]{0,4}(?:[.!]?\s{0,4}\Z|[.!]\s|\n)"
)
_UNDECIDED = re.compile(r"(?:between|either|from)\b", re.IGNORECASE)
_DENIED = re.compile(r"not\b(?!.{0,80}\bbut\b)", re.IGNORECASE)
_HEADING = re.compile(r"(?:step|part|solution|explanation)\b", re.IGNORECASE)

# What takes back an answer that was given before, and how the new one is stated. People wait and err in problems, too:
# "Wait, ..." opens a clause, and it is the writer who made the mistake.
_CORRECTION = re.compile(
    r"(?:\A|[.!?,;:\n(\u2014*_-])[\s*_(]{0,4}(?:(?:oh|no|but|hmm|actually|so|and|i['\u2019]m)\b[,.]?\s){0,3}"
    r"(?:wait|sorry|correction|oops|hold on)\b"
    r"(?=[\s*_]{0,3}[,.!:;\u2014-]|\s(?:no|that|this|i|let|a (?:minute|second|moment)|actually|there)\b)"
    r"|\bscratch that\b|\b(?:i|we)(?:['\u2019]ve| have)? (?:just )?made an? (?:mistake|error)\b"
    r"|\b(?:that|this)(?:['\u2019]s| is| was) (?:not right|not correct|wrong|incorrect)\b",
    re.IGNORECASE,
)
_CORRECTED = re.compile(r"\b(?:(?:should|must|has to|would) be|it(?:['\u2019]s| is))\b", re.IGNORECASE)

# Weaker signs of a conclusion, looked for behind the last equation.
_WEAK_MARK = re.compile(
    rf"\b(?:total|result|solution|sum)\b[^.!?\n\d]{{0,40}}?{IS}|(?:\*\*|\btotal\sof\s)(?=\\?[$\u20ac\u00a3]?\d)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"(?:\A|(?<=[.!?]\s)|(?<=\n))[*_\s]{0,4}(?:and\s)?(?:therefore|thus|so|hence|consequently|in total|altogether"
    r"|finally|in conclusion)\b",
    re.IGNORECASE,
)
_STATE = re.compile(
    r"(?<!\bto )\b(?:has|have|had|is|are|was|were|be|makes?|gets?(?: paid)?|costs?|pays?|earns?|needs?(?: to \w{1,12})?"
    r"|spends?|takes?(?: (?:him|her|them|us|me|it))?|left with|leav(?:es|ing)(?: \w{1,12})?(?: with)?|remains?)\s"
    r"(?:a\stotal\sof\s|only\s|exactly\s|now\s)?\\?[$\u20ac\u00a3]?\Z",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(r"\b(?:if|who|since|because|when|as|each|every|you|your|let)\b", re.IGNORECASE)
_END_OF_CLAUSE = re.compile(rf"{END_OF_SENTENCE.pattern}|[,;]\s")
_IN_A_TERM = re.compile(r"[-+*/^\u00d7\u00f7]\s{0,2}\\?[$(]?\Z")
_COMPARED = re.compile(
    r"\b(?:(?:than|out of|from)\s(?:(?:the|all|his|her|their|its)\s)?|of\s(?:the|all|his|her|their|its)\s)\\?[$]?\Z",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"\b(?:cannot|can['\u2019]t|could not|unable to|impossible to|not possible to)\s(?:be\s)?"
    r"(?:solved?|determined?|answer(?:ed)?|help|calculated?|tell|find|found)\b|\bnot enough information\b",
    re.IGNORECASE,
)
_CUT_OFF = re.compile(r"=\s{0,9}[$]?\Z")


def final_number(text: str) -> Fraction | None:
    """The number a response ends on, exactly, or None if there is none.

    In this order: the last number marked by `####`, `\\boxed{...}` or "answer is", unless it is taken back ("Wait, ...
    it should be 10"); a number alone in the last line; behind the last equation a total, a bold number or a conclusion
    ("So she has 12 of the 16"); the last result of an equation ("= 42"); the last number outside brackets; a number in
    words, where there are no digits at all. Where an expression is marked, its result counts ("the answer is
    5 + 3 = 8"). What follows a next question that the model asks itself is not read, nor is a sum that is cut off.

    Read: thousands with commas, no-break spaces or apostrophes, spaced ones where nothing else can be meant (1 234 567,
    12 000), signs (also the Unicode minus and "negative 5"), decimals, fractions (3/4, \\frac{3}{4}, 2 1/2, 2 and a
    half), powers of ten (1.5e3, 3 x 10^5, 5 million, $20k), currencies and units beside the number, 5 dollars and 25
    cents, decimal commas before a unit or behind a thousands point (3,50 EUR; 1.234,56), cardinals in words after a
    mark. A percentage is the number before the sign: 50% is 50. Not numbers: the counts of a list ("2. Then ..."),
    ordinals, exponents, digits inside a word ("H2O"). A date, time, ratio, range, two candidates (6 or 8), two units
    (2 hours and 30 minutes) or a list without spaces (2024-05-01, 3:30, 10-20, 1,5) has no one value: as a marked
    answer it gives None, elsewhere it is passed over.
    """
    reading = _Reading(normalised(own_answer(text)))
    corrected = reading.corrected()
    if corrected:
        return corrected.value
    for mark in reversed(list(_MARK.finditer(reading.text))):
        found = reading.marked(mark)
        if found:
            return found.value
    found = None if _CUT_OFF.search(reading.text[-20:]) else reading.unmarked()
    return found.value if found else None


class _Reading:
    """One normalised response and its numbers."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.numbers, self.list_counts = find_numbers(text)
        self.starts = [number.start for number in self.numbers]

    def inside(self, begin: int, end: int) -> list[Number]:
        return self.numbers[bisect_left(self.starts, begin) : bisect_left(self.starts, end)]

    def direct(self, start: int) -> Number | None:
        """The first number after `start` if nothing but decoration stands between."""
        index = bisect_left(self.starts, start)
        if index == len(self.numbers) or self.numbers[index].start - start > 60:
            return None
        between = _BEFORE_NUMBER.match(self.text, start, self.numbers[index].start)
        return self.numbers[index] if between and between.end() == self.numbers[index].start else None

    def goes_on(self, number: Number) -> bool:
        """Whether `number` is only the beginning of an expression; "5-3" has been read as one without a value."""
        return (
            self.is_share(number)
            or OPERATOR.match(self.text, number.end) is not None
            or _UNIT_AND_OPERATOR.match(self.text, number.end) is not None
            or (number.value is None and self.text.startswith("=", number.end))
        )

    def is_share(self, number: Number) -> bool:
        """Whether `number` is a fraction of another number, or of something whose result is told: "1/3 of 36"."""
        if number.value is None or number.value.denominator == 1:
            return False
        share = _SHARE.match(self.text, number.end)
        if share is None:
            return False
        return share["whole"] is not None or any(
            self.direct(result.end()) is not None
            for result in _RESULT.finditer(self.text, share.end(), _end_of_sentence(self.text, share.end()))
        )

    def complete(self, start: int) -> Number | None:
        """The number directly after `start`, if no expression begins with it."""
        number = self.direct(start)
        return None if number is None or self.goes_on(number) else number

    def marked(self, mark: re.Match[str]) -> Number | None:
        """The number that `mark` announces: right after it, else the result or the last one of its sentence."""
        start, limit = mark.end(), mark.end() + _REACH
        begin = start + len(self.text[start:limit]) - len(self.text[start:limit].lstrip())
        if mark[0].startswith("\\"):
            end = begin + _closing(self.text[begin:limit])
            if _IRRATIONAL.search(self.text, begin, end) or re.search(r"\d,\s{1,2}-?\d", self.text[begin:end]):
                return Number(begin, end, None)
        else:
            end = begin + len(END_OF_SENTENCE.split(self.text[begin:limit], maxsplit=1)[0])
        direct = self.direct(start)
        if direct and not self.goes_on(direct):
            several = _OR_ANOTHER.match(self.text, direct.end)
            return Number(direct.start, direct.end, None) if several else direct
        for equals in reversed(list(_RESULT.finditer(self.text, begin, end))):
            if result := self.complete(equals.end()):
                return result
        if direct and self.is_share(direct):
            for told in _SHARE_RESULT.finditer(self.text, direct.end, end):
                if result := self.complete(told.end()):
                    return result
        if direct:  # an expression without its result
            return Number(direct.start, direct.end, None)
        return self._last_in_sentence(mark, begin, end)

    def _last_in_sentence(self, mark: re.Match[str], begin: int, end: int) -> Number | None:
        inside, sentence = self.inside(begin, end), self.text[begin:end]
        if _DENIED.match(sentence) or (mark[0] == "####" and _HEADING.match(sentence)):
            return None
        if not inside:
            words = find_number_words(sentence)
            is_first = words and _BEFORE_NUMBER.fullmatch(sentence, 0, words[0].start)
            return Number(begin, end, words[0].value) if is_first else None
        return Number(begin, end, None) if _UNDECIDED.match(sentence) and len(inside) > 1 else inside[-1]

    def corrected(self) -> Number | None:
        """The answer stated after the response took its former one back, without any of the strong marks."""
        for correction in list(_CORRECTION.finditer(self.text))[:-4:-1]:
            if _MARK.search(self.text, correction.end()):
                return None
            stated = [*_CORRECTED.finditer(self.text, correction.end()), *_EQUALS.finditer(self.text, correction.end())]
            for statement in sorted(stated, key=re.Match.start, reverse=True):
                if result := self.complete(statement.end()):
                    return result
        return None

    def unmarked(self) -> Number | None:
        """The number that a response without a mark ends on."""
        last_line = self.text.rstrip().rpartition("\n")[2]
        begin = len(self.text.rstrip()) - len(last_line)
        alone = self.complete(begin)
        if alone and alone.value is not None and not re.search(r"\w", self.text[alone.end :]):
            return alone
        result = next((r for r in self._results() if r.value is not None), None)
        concluded = self._conclusion(result)
        if concluded or result:
            return concluded or result
        numbers = [number for number in self.numbers if number.value is not None] or find_number_words(self.text)
        if not numbers or _REFUSED.search(self.text):
            return next(reversed(self.list_counts), None)
        sentence = numbers[-1].start - len(END_OF_SENTENCE.split(self.text[: numbers[-1].start][-_REACH:])[-1])
        told = [number for number in numbers if number.start >= sentence]
        states = [number for number in told if self._is_state(number)]
        return (states or [number for number in told if not self._is_aside(number)] or told)[-1]

    def _results(self) -> Iterator[Number]:
        """The results of the equations, the last first: right of the sign, or left of it (8 = 5 + 3)."""
        for equals in reversed(list(_EQUALS.finditer(self.text))):
            right = self.direct(equals.end())
            if right and not self.goes_on(right):
                yield right
            elif right or _NAME_ALONE.match(self.text, equals.end()):
                index = bisect_left(self.starts, equals.start()) - 1
                left = self.numbers[index] if index >= 0 else None
                if left and not self.text[left.end : equals.start()].strip() and not self._has_before(_IN_A_TERM, left):
                    yield left

    def _conclusion(self, result: Number | None) -> Number | None:
        """What is concluded behind the last equation: a total, a bold number, "So ...", "she has 12"."""
        start = result.end if result else 0
        for mark in reversed(list(_WEAK_MARK.finditer(self.text, start))):
            found = self.complete(mark.end())
            if found and found.value is not None:
                return found
        results = {number.value for number in self._results()}
        for cue in reversed(list(_CONCLUSION.finditer(self.text, start))):
            end = END_OF_SENTENCE.search(self.text, cue.end())
            told = self.inside(cue.end(), end.start() if end else len(self.text))
            told = [number for number in told if number.value is not None and not self.goes_on(number)]
            if told:
                confirmed = [number for number in told if number.value in results]
                states = [number for number in told if self._is_state(number)]
                return (confirmed or states or [n for n in told if not self._is_aside(n)] or told)[-1]
        if result is None:
            return None
        behind = [number for number in self.inside(start, len(self.text)) if number.value is not None]
        return next((number for number in reversed(behind) if self._is_state(number)), None)

    def _is_state(self, number: Number) -> bool:
        """Whether a sentence such as "Now she has 12" states `number`, with no condition and no address before it."""
        clause = _END_OF_CLAUSE.split(self.text[max(0, number.start - 120) : number.start])[-1]
        return self._has_before(_STATE, number) and not self.goes_on(number) and not _SUBORDINATE.search(clause)

    def _is_aside(self, number: Number) -> bool:
        """Whether `number` stands in brackets or is only what another one is compared with ("of the 16")."""
        before = self.text[max(0, number.start - 80) : number.start]
        in_brackets = before.rfind("(") > max(before.rfind(")"), before.rfind("\n"))
        return (in_brackets and ")" in self.text[number.end : number.end + 80]) or self._has_before(_COMPARED, number)

    def _has_before(self, pattern: re.Pattern[str], number: Number) -> bool:
        return pattern.search(self.text[max(0, number.start - 40) : number.start]) is not None


def _end_of_sentence(text: str, start: int) -> int:
    end = END_OF_SENTENCE.search(text, start, start + _REACH)
    return end.start() if end else min(len(text), start + _REACH)


def _closing(text: str) -> int:
    """Where the brace closes that opened just before `text`."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    return len(text)
