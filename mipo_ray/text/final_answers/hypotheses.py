"""What a response says of others, or of another question: "a student might choose B" settles on nothing.

English alone; the other languages' patterns in `choices` leave such sentences out by themselves.
"""

from __future__ import annotations

import re

_REACH = 120  # characters before a statement in which its sentence may begin

_CLAUSE = re.compile(
    r"[.!?;:\n()]|,\s|\b(?:but|so|therefore|thus|hence|however|although|though|because|while|whereas|yet)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?\n]")
# Who chooses: the writer, or others. The last one before the verb counts.
_SUBJECT = re.compile(
    r"(?P<writer>\b(?:i|we|let['\u2019]?s|let us)\b)"
    r"|\b(?:students?|pupils?|people|persons?|someone|somebody|anyone|anybody|others?|many|some|several|most|few|those"
    r"|who|beginners?|novices?|learners?|readers?|guessers?|test-?takers?|children|kids|friends?|classmates?|they|he"
    r"|she|one|candidates?|you (?:might|may|could))\b",
    re.IGNORECASE,
)
_ADVICE = re.compile(r"\b(?:should|must|needs? to|ha(?:s|ve) to|ought to)\b", re.IGNORECASE)
_MODAL = re.compile(
    r"\b(?:might|may|could|would|often|sometimes|tends? to|tempted to|inclined to|wrongly|mistakenly|incorrectly"
    r"|erroneously)\s(?:\w{1,20}\s){0,2}\Z",
    re.IGNORECASE,
)
_YOU = re.compile(r"\byou(?:['\u2019]d| would)\s(?:\w{1,20}\s){0,2}\Z", re.IGNORECASE)
_MISTAKE = re.compile(
    r"\b(?:wrong|mistaken?|error|incorrect|tempt\w{0,6}|trap|premature|careless)\b[^.!?]{0,40}\Z", re.IGNORECASE
)
_BELIEF = re.compile(
    r"\b(?:thinks?|thought|says?|said|believes?|believed|assumes?|assumed|argues?|argued|guess(?:es|ed)?|claims?"
    r"|claimed|feels?|expects?|suppose[sd]?|answer(?:s|ed)?)\b(?:\sthat)?(?:\sthe)?(?:\s(?:correct|right|best))?\s\Z",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"(?:(?<!\bi )(?<!['\u2019]d )\b(?:suppose|supposing|assume|assuming|imagine|imagining)"
    r"|\b(?:might|may|could|can|would)\s(?:seem|appear|look)|\b(?:wants?|wanted|leads?|led|asks?|asked|tricks?)\s(?:us|me|you|one)\sto)"
    r"(?:\s(?:that|as if|like))?(?:\sthe)?(?:\s(?:correct|right|best))?\s\Z",
    re.IGNORECASE,
)
_CONTRARY = re.compile(
    r"\W{0,4}(?:(?:had|were)\b|if\b.{0,200}?\b(?:were|was|had|did|asked|instead|different)\b)",
    re.IGNORECASE | re.DOTALL,
)
_WOULD = re.compile(r"\b(?:would|could|might)\b", re.IGNORECASE)
_CONSEQUENCE = re.compile(
    r"[^\w\s]{0,4}\s(?:would|will|means?|leads?|implies|imply|ignores?|overlooks?"
    r"|is (?:wrong|incorrect|a mistake|an error))\b",
    re.IGNORECASE,
)
_CHOOSE = re.compile(r"\W{0,4}(?:cho|pick|select|opt|go|went)", re.IGNORECASE)
_CHOOSING = re.compile(r"\W{0,4}(?:choosing|picking|selecting|going)\b", re.IGNORECASE)


def is_supposed(text: str, start: int, end: int, after: int) -> bool:
    """Whether text[start:end], which announces an option, only supposes one; `after`: where the option ends."""
    announced = text[start:end]
    before = text[max(0, start - _REACH) : start]
    if _WOULD.search(announced) and _CONTRARY.match(_SENTENCE.split(before)[-1]):
        return True
    clause = _CLAUSE.split(before)[-1]
    if _SUPPOSED.search(clause):
        return True
    chooses = _CHOOSE.match(announced) is not None
    if not chooses and not _BELIEF.search(clause):
        return False
    if _CHOOSING.match(announced) and _CONSEQUENCE.match(text, after):
        return True
    subject = next(reversed(list(_SUBJECT.finditer(clause))), None)
    if subject is not None and subject["writer"]:
        return False
    if subject is not None:
        return not _ADVICE.search(clause, subject.end())
    if _MISTAKE.search(clause):
        return True
    return chooses and _MODAL.search(clause) is not None and not _YOU.search(clause)
