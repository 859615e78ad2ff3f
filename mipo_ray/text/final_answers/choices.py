r"""The option that a response to a multiple-choice question settles on.

Stated answers come first ("the answer is ...", `\boxed{...}`), and the last statement wins; without one the reader
falls back on where a short response puts its answer, and on None rather than a guess. All patterns are bounded or
possessive: time grows linearly with the length of the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mipo_ray.text.final_answers.choice_patterns import (
    BETTER,
    BOXED,
    CHOOSE,
    CLOSE,
    IS_BETTER,
    IS_CORRECT,
    NOUNS,
    OPEN,
    SO,
    STATEMENTS,
    WORD,
)
from mipo_ray.text.final_answers.hypotheses import is_supposed
from mipo_ray.text.final_answers.option_texts import Mention, OptionTexts
from mipo_ray.text.final_answers.statements import (
    ANSWER,
    END_OF_SENTENCE,
    IN_OTHER_SCRIPT,
    IS,
    OPERATOR,
    own_answer,
    with_letters_apart,
)

_CALLED_BETTER = re.compile(rf"{CLOSE}{IS_BETTER}", re.IGNORECASE)
# The same for options that are stated by their text.
_ANSWER_WORD = re.compile(WORD, re.IGNORECASE)
_IS = re.compile(IS, re.IGNORECASE)
_OTHER_ANNOUNCEMENTS = re.compile(
    rf"(?P<strong>{CHOOSE}|{BOXED}|{ANSWER}[*_:\s]{{0,6}}\n|\bnot\b[^.!?\n]{{0,60}}?\bbut\b(?:\srather)?)|{SO}",
    re.IGNORECASE,
)
_CALLED_CORRECT = re.compile(rf"{CLOSE}{IS_CORRECT}", re.IGNORECASE)
_DECORATED_NOUNS = re.compile(rf"{OPEN}{NOUNS}", re.IGNORECASE)
_OR_ANOTHER = re.compile(r",?\s(?:and|or)\s(?:also\s)?", re.IGNORECASE)
_SENTENCE_ENDS = re.compile(rf"{CLOSE}(?:\s{{0,4}}\Z|\n|(?<=[.])\s|[,;!(]|\s(?:because|since|as)\b)")
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|unlikely)\b|n['\u2019]t\b|\u4e0d|\u6ca1|\u5e76\u975e", re.IGNORECASE
)
_NEGATED_BEFORE = re.compile(
    r"(?:(?:\b(?:if|whether|unless|not|never|cannot|why)|n['\u2019]t)\s(?:that\s)?(?:(?:the|an?|your|my|only)\s)?"
    r"(?:(?:correct|right|best|final|ever|simply|option|choice)\s)?|\b(?:wrong|incorrect|false|tempting|trap"
    r"|tricky|careless)\s)[(\[*]{0,3}\Z",
    re.IGNORECASE,
)
# What follows no option: "B-12", "A+", "e.g.", "2.5", a question that is still open.
_NO_LABEL = re.compile(
    r"""['\u2019](?!d[i\u0131u\u00fc]r)\w|[+#%\u00b0^/]|\s?=|-\w|\.\w\.|[.,:]\d|[)\]}*_"'\u201d`]{0,4}\?"""
    r"""|\s?[\uac00\uc774]\s?\uc544\ub2c8|\s?(?:\u3067\u306f?|\u3058\u3083)(?:\u306a"""
    r"""|\u3042\u308a\u307e\u305b)|\s?(?:\u9879\s?)?\u4e0d"""
)
# "A and C", "B, D": no single choice. "B, A is wrong" is one.
_SEVERAL = re.compile(
    r"""[)\]}*_"'\u201d`]{0,4}(?:\s?[,&]|\s(?:and|or)\b)\s?(?:(?:and|or|both)\s)?[*_(\["']{0,3}(?:option\s|choice\s)?"""
    r"""(?:[B-HJ]|[AI](?!\s\w))(?![\w'\u2019])(?![)\]*]{0,3}\s(?:is|was|would|cannot|does|has)\b)"""
)
# After an "A", "I", "b" or "2" without a bracket only these words leave it a label: "A because", but not "A dog".
_AFTER_LABEL = re.compile(
    r"\s+(?:because|since|as|and|but|or|not|for|due|which|rather|over|based|so|if|instead|here|with|by|from|given|would"
    r"|is|was|richtig|korrekt|correct[eao]?)\b"
)
_ALONE = re.compile(rf"(?:(?:option|choice)\s)?{OPEN}(?P<letter>[A-Ja-j1-5]){CLOSE}[.!]?", re.IGNORECASE)
_BEFORE_REASON = re.compile(rf"\s{{0,9}}{OPEN}(?P<letter>[A-J])(?!\w){CLOSE}(?:,\s|\s(?:because|since|as)\b)")
_LINE_LABEL = re.compile(
    r"""^[ \t>#*_-]{0,8}+(?:(?:option|choice)\s)?[*_(\["']{0,4}(?P<letter>(?-i:[A-J])|[a-j](?=[*_]{0,2}\)))[*_]{0,2}"""
    r"""(?:[)\]:]|\.(?!\w)|["']?[ \t]*+$|[ \t][-\u2013\u2014][ \t])""",
    re.IGNORECASE | re.MULTILINE,
)
_MENTION = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice)\s[*_(\"']{0,4}(?P<option>[A-J1-5])(?!\w)|(?<![\w.])\(?(?P<bracket>[A-J])\)"
    r"|\*\*\(?(?P<bold>[A-J])(?=[).:*])"
)


def final_choice(text: str, *, labels: Sequence[str] | None = None, texts: Sequence[str] | None = None) -> str | None:
    """The option a response settles on, or None if it states none or several.

    In this order: the last statement ("the answer is B", "I would choose (B)", "B is correct", `\\boxed{B}`; questions,
    conditions and negations are none); a response or last line that is one letter; a line that begins with a label
    ("B) because ...") but is no part of a list of options; the only option mentioned at all. The article "A" and the
    pronoun "I" are no options, nor are names like "vitamin B12" or "A+". A digit counts after "answer is", "option"
    or the like, in a box, or alone. What follows a next question that the model asks itself is not read.

    `labels` are the question's own, in the prompt's order and spelling: a response that settles on another one has no
    answer, and digits are no labels where letters are. Without them "A" to "J" and "1" to "5" are labels. `texts` are
    the options' texts, one a label: an option that is stated by its text alone ("the answer is rain") is found too,
    and letters inside a text ("hepatitis B") are none. Where a letter and a text disagree, the later statement wins.

    Raises:
        ValueError: `texts` and `labels` differ in number.
    """
    if texts is not None and labels is None:
        labels = "ABCDEFGHIJ"[: len(texts)]
    known = None if labels is None else {label.upper(): label for label in labels}
    text = with_letters_apart(own_answer(text))
    texts = None if texts is None else [with_letters_apart(option) for option in texts]
    options = OptionTexts(text, labels, texts) if labels is not None and texts is not None else None
    found = _settled_on(text, options, "12345" if known is None else "".join(filter(str.isdigit, known)))
    return found if known is None or found is None else known.get(found.upper())


def _settled_on(text: str, options: OptionTexts | None, digits: str) -> str | None:
    mentions = options.all() if options else []
    names = [range(mention.start, mention.end) for mention in mentions if mention.words > 1]
    stated = [
        (match.start("letter"), match["letter"].upper())
        for pattern in STATEMENTS
        for match in pattern.finditer(text)
        if _is_statement(text, match)
        and (not match["letter"].isdigit() or match["letter"] in digits)
        and not any(match.start("letter") in name for name in names)
    ]
    if options:
        stated += [(mention.start, mention.label) for mention in _stated_texts(text, options, mentions)]
    stated = stated or list(_preferred(text, mentions, names))
    if stated:
        return max(stated, key=lambda statement: statement[0])[1]  # of a letter and a text at one place, the letter
    stripped = text.strip()
    last_line = stripped.rpartition("\n")[2].strip()
    for part in (stripped, last_line, re.split(r"[.!?]\s", last_line[-60:])[-1].strip()):
        alone = _ALONE.fullmatch(part) if len(part) < 60 else None
        if (
            alone
            and (part == stripped or alone["letter"].isupper())
            and (not alone["letter"].isdigit() or alone["letter"] in digits)
        ):
            return alone["letter"].upper()
        if options and (label := options.whole(text.rindex(part), len(part))):
            return label
    reasoned = _BEFORE_REASON.match(text)
    if reasoned and _is_label(text, reasoned.start("letter")):
        return reasoned["letter"]
    return _unlisted(text) or _only_mention(text, digits) or _only_text(text, mentions)


def _preferred(text: str, mentions: list[Mention], names: list[range]) -> Iterator[tuple[int, str]]:
    """Where an option is called better than others, and its label."""
    for pattern in BETTER:
        for match in pattern.finditer(text):
            at = match.start("letter")
            if not _is_denied(text, match.start(), "") and not any(at in name for name in names):
                yield at, match["letter"].upper()
    for mention in mentions:
        if _CALLED_BETTER.match(text, mention.end):
            yield mention.start, mention.label


def _is_statement(text: str, match: re.Match[str]) -> bool:
    if is_supposed(text, match.start(), match.start("letter"), match.end("letter")):
        return False
    if _is_denied(text, match.start(), match.groupdict().get("between") or ""):
        return False
    return _is_label(text, match.start("letter"))


def _is_denied(text: str, start: int, between: str) -> bool:
    between = re.split(r"[,;]|\bbut\b", between)[-1]
    before = text[max(0, start - 40) : start]
    if _NEGATION.search(between) or re.search(r"\b(?:choices|options)\s*\Z", between):
        return True
    return _NEGATED_BEFORE.search(before) is not None


def _is_label(text: str, at: int) -> bool:
    """Whether the letter or digit at `at` names one option, judged by what follows it."""
    letter, after = text[at], text[at + 1 : at + 60]
    if _NO_LABEL.match(after) or _SEVERAL.match(after) or (letter.isdigit() and OPERATOR.match(after)):
        return False
    if letter in "BCDEFGHJ" or not re.match(r"[^\S\n]+\w", after):
        return True
    return _AFTER_LABEL.match(after) is not None or IN_OTHER_SCRIPT.match(after) is not None


def _stated_texts(text: str, options: OptionTexts, mentions: list[Mention]) -> Iterator[Mention]:
    for mention in mentions:
        if _CALLED_CORRECT.match(text, mention.end) and not _NEGATED_BEFORE.search(
            text[max(0, mention.start - 40) : mention.start]
        ):
            yield mention
    for place, start, needs_end in _announcements(text):
        skipped = _DECORATED_NOUNS.match(text, place)
        stated = options.stated_at(place) or (options.stated_at(skipped.end()) if skipped else None)
        if not stated or _NEGATED_BEFORE.search(text[max(0, start - 40) : start]):
            continue
        if is_supposed(text, start, place, stated.end):
            continue
        another = _OR_ANOTHER.match(text, stated.end)
        asked = re.compile(rf"{CLOSE}\?").match(text, stated.end)
        if asked or (another and options.stated_at(another.end())):
            continue
        if not needs_end or _SENTENCE_ENDS.match(text, stated.end):
            yield stated


def _announcements(text: str) -> Iterator[tuple[int, int, bool]]:
    """Where a stated option's text may begin, where its announcement begins, and whether it must end the sentence."""
    for answer in _ANSWER_WORD.finditer(text):
        sentence = re.split(r"[.!?\n]", text[answer.end() : answer.end() + 80], maxsplit=1)[0]
        for link in _IS.finditer(sentence):
            if not _is_denied(text, answer.start(), sentence[: link.start()]):
                yield answer.end() + link.end(), answer.start(), False
    for other in _OTHER_ANNOUNCEMENTS.finditer(text):
        yield other.end(), other.start(), other["strong"] is None


def _unlisted(text: str) -> str | None:
    """The first, else the last line label that neither follows nor precedes its neighbour in the alphabet."""
    labels = [match for match in _LINE_LABEL.finditer(text) if not _SEVERAL.match(text, match.end("letter"))]
    codes = [ord(match["letter"].upper()) for match in labels]
    if codes and codes[1:2] != [codes[0] + 1]:
        return chr(codes[0])
    return chr(codes[-1]) if codes and codes[-1] != codes[-2] + 1 else None


def _only_mention(text: str, digits: str) -> str | None:
    mentioned = {
        match[match.lastgroup or 0]
        for match in _MENTION.finditer(text)
        if match.lastgroup != "option" or _is_label(text, match.start("option"))
    }
    mentioned = {label for label in mentioned if not label.isdigit() or label in digits}
    return mentioned.pop() if len(mentioned) == 1 else None


def _only_text(text: str, mentions: list[Mention]) -> str | None:
    """The only option whose text occurs, unless the sentence denies or asks it."""
    if len({mention.label for mention in mentions}) != 1:
        return None
    mention = mentions[-1]
    before = END_OF_SENTENCE.split(text[max(0, mention.start - 120) : mention.start])[-1]
    after = END_OF_SENTENCE.search(text, mention.end)
    if _NEGATION.search(before) or (after and after[0].startswith("?")):
        return None
    return mention.label
