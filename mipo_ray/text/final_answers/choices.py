r"""The option that a response to a multiple-choice question settles on.

Stated answers come first ("the answer is ...", `\boxed{...}`), and the last statement wins; without one the reader
falls back on where a short response puts its answer, and on None rather than a guess. All patterns are bounded or
possessive: time grows linearly with the length of the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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

# What may stand between "the answer is" and the answer: quotes, brackets, Markdown and LaTeX around it.
_OPEN = r"""(?:[\s*_`"'\u201c\u2018(\[{<$:,\u2013\u2014-]|\\(?:boxed|textbf|text|mathbf|mathrm)?){0,16}+"""
_NOUNS = (
    r"(?:(?:the|option|choice|answer|letter|number|statement|therefore|thus|indeed|actually|clearly|probably|likely"
    rf"|most|definitely|still|correct|right|best|final|la|el|le|die|der|a|\u03b7|letra|lettre|opci\u00f3n|donc|daher|also"
    rf"|quindi|entonces)\b{_OPEN})" + "{0,5}"
)
# The labels of options that the reader knows; the letter classes of the patterns below are these.
LABELS = frozenset("ABCDEFGHIJabcdefghij12345")
_LETTER = r"(?P<letter>[A-Ja-j1-5])(?!\w)"
_CLOSE = r"""[)\]}>.:*_"'\u201d\u2019`$]{0,6}+"""

# What announces a choice, in any case. A negation in "between" undoes it.
_WORD = rf"(?:{ANSWER}|\b(?:option|choice|solution|l\u00f6sung|soluci\u00f3n|soluzione)\b)"
_ANSWER_IS = rf"{_WORD}(?P<between>(?:(?!{_WORD})[^.!?\n]){{0,80}}?){IS}"
_CHOOSE = (
    r"(?:\b(?:choose|chose|choosing|pick|picked|picking|select|selected|selecting|opt for|opted for|go with|going with"
    r"|went with|go for|going for)\b"
    # Chinese "choose", but for "option", "not", and what somebody "will" or "may".
    r"|(?:(?<![\u4e0d\u522b\u52ff\u8bef\u9519\u4f1a\u80fd])|(?<=\u6211\u4f1a))[\u9009\u9078][\u62e9\u64c7]?(?![\u9879\u9805\u629e]))"
)
_SO = (
    r"\b(?:it's|it\u2019s|it is|(?:must|should|would|has to) be|i think|i believe"
    r"|i(?:['\u2019]d|['\u2019]ll| will| would)? say|i guess|therefore|thus|hence|so)\b"
)
_BOXED = r"\\boxed\s?\{"
# What follows an option that is called the answer: "... is the best answer".
_IS_CORRECT = (
    r"\s(?:is|was|must be|would be|should be|has to be|seems|seems to be|looks)"
    r"(?:\s(?:the|a|our|my|clearly|definitely|probably|most|likely|therefore|thus|indeed|actually|only|one|also"
    r"|single|final|accurate|appropriate|suitable)){0,5}\s(?:correct|right|best|answer)"
    r"(?:\s(?:answer|option|choice|one|statement|response|explanation|conclusion|description|example))?"
    r"(?=[)*_]{0,4}(?:\Z|[.,;!:\n]|\s(?:because|since|as|and|here|so|for|among|of|to|given|based|but)\b))"
)

_OBJECT = r"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w)\s?(?:\ubc88|\u756a|[\u9879\u9805])?\s?"
_OTHER_LANGUAGES = (
    # but B: Chinese, Korean, Japanese
    rf"(?:\u800c\u662f|\uc544\ub2c8\ub77c|(?:\u3067\u306f|\u3058\u3083)\u306a\u304f\u3066?)[,\u3001]?{_OPEN}{_LETTER}",
    # I choose B, where the verb comes last: Japanese, Korean; not "those who choose B"
    rf"{_OBJECT}\u3092\u9078(?:\u3073\u307e\u3059|\u3073\u307e\u3057\u305f|\u629e\u3057\u307e\u3059|\u3076(?=[\u3002.]|\Z))",
    rf"{_OBJECT}[\uc744\ub97c]\s?(?:\uc120\ud0dd(?:\ud569\ub2c8\ub2e4|\ud588\uc2b5\ub2c8\ub2e4|\ud558\uaca0\uc2b5\ub2c8\ub2e4|\ud55c\ub2e4)"
    r"|\uace0\ub974\uaca0\uc2b5\ub2c8\ub2e4|\uace0\ub985\ub2c8\ub2e4|\uace8\ub790\uc2b5\ub2c8\ub2e4)",
    # B is right: Chinese, Japanese, Korean
    rf"{_OBJECT}[\u662f\u4e3a\u70ba]?\u6700?(?:\u6b63[\u786e\u78ba]|\u5408\u9002|\u5bf9\u7684)(?![\u5417\u55ce\u4e0e])",
    rf"{_OBJECT}\u304c(?:\u6b63\u89e3|\u6b63\u3057\u3044|\u6700\u3082\u9069\u5207)(?!\u304b)",
    rf"{_OBJECT}[\uc774\uac00]\s?(?:\uc815\ub2f5|\ub9de)",
)
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # the answer (to the question) is B; the correct option: B
        rf"{_ANSWER_IS}{_OPEN}{_NOUNS}{_LETTER}",
        # Answer B; **Final answer** (B)
        rf"{ANSWER}{_OPEN}(?:(?:option|choice)\b{_OPEN})?(?-i:(?P<letter>[A-J1-5]))(?!\w)",
        # I would choose option C
        rf"{_CHOOSE}{_OPEN}{_NOUNS}{_LETTER}",
        # B is the best answer; (B) rain is correct
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w){_CLOSE}"
        r"(?:\s\([^()\n]{0,60}\)|(?<=[)\].:*])\s(?:(?!\b(?-i:[A-J])\b|\bnot\b|n't)[^.!?\n]){1,60}?)?"
        rf"{_IS_CORRECT}",
        # C remains; statement C is true; Correct: C
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-HJ]))(?!\w){_CLOSE}\s(?:remains|is left)(?=[.,;!\n]|\Z)",
        r"\b(?:statement|option|choice)\s(?-i:(?P<letter>[A-J]))\sis\s(?:true|right)(?=[.,;!\n]|\Z)",
        rf"\b(?:(?:correct|right)\s?[:=]|key\sis\b){_OPEN}(?-i:(?P<letter>[A-J]))(?!\w)",
        # not A but B
        rf"\bnot\b{_OPEN}[A-J]{_CLOSE},?\s(?:but|rather)(?:\s(?:rather|is|it's|it is))?{_OPEN}{_LETTER}",
        # I think B. So B. (the sentence ends there)
        rf"{_SO}{_OPEN}(?:(?:option|choice|actually|clearly|definitely|probably|likely)\b{_OPEN}){{0,2}}"
        r"(?-i:(?P<letter>[A-HJ]))(?!\w)"
        rf"(?={_CLOSE}(?:\s{{0,4}}\Z|\n|(?<=[.])\s|[,;!]|\s(?:because|since|as)\b))",
        rf"{_BOXED}{_OPEN}{_LETTER}(?=[^{{}}\n]{{0,200}}\}})",
        *_OTHER_LANGUAGES,
    )
)
# One option over others: weaker than a statement, as it may only order what is left.
_IS_BETTER = (
    r"\s(?:(?:is|was|seems|looks|sounds|appears|would be|seems to be|appears to be)"
    r"(?:\s(?:the|a|an|much|slightly|clearly|still|far|even|also|overall)){0,4}"
    r"\s(?:better|best|stronger|strongest|closer|closest|superior|preferable"
    r"|(?:more|most)\s(?:likely|accurate|plausible|appropriate|suitable|precise|correct|complete|fitting|reasonable"
    r"|convincing|sensible))|(?:fits|matches|works|answers it)\s(?:better|best)|makes\s(?:more|the\smost)\ssense)"
    r"(?:\s(?:one|option|choice|answer|fit|match|candidate|statement|description))?"
    r"(?=[.,;!\n]|\Z|\s(?:than|to|because|since|as|here|still|for|of|overall)\b)"
)
_BETTER = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?<![\w'\u2019.-])(?-i:(?P<letter>[A-J]))(?!\w){_CLOSE}{_IS_BETTER}",
        rf"\b(?:i|we)(?:['\u2019][dm]| would| am| do)?\s(?:lean|leaning|incline|inclined|tend)\s(?:more\s)?(?:towards?|to)"
        rf"\b{_OPEN}{_NOUNS}(?-i:(?P<letter>[A-J]))(?!\w)",
    )
)
_CALLED_BETTER = re.compile(rf"{_CLOSE}{_IS_BETTER}", re.IGNORECASE)
# The same for options that are stated by their text.
_ANSWER_WORD = re.compile(_WORD, re.IGNORECASE)
_IS = re.compile(IS, re.IGNORECASE)
_OTHER_ANNOUNCEMENTS = re.compile(
    rf"(?P<strong>{_CHOOSE}|{_BOXED}|{ANSWER}[*_:\s]{{0,6}}\n|\bnot\b[^.!?\n]{{0,60}}?\bbut\b(?:\srather)?)|{_SO}",
    re.IGNORECASE,
)
_CALLED_CORRECT = re.compile(rf"{_CLOSE}{_IS_CORRECT}", re.IGNORECASE)
_DECORATED_NOUNS = re.compile(rf"{_OPEN}{_NOUNS}", re.IGNORECASE)
_OR_ANOTHER = re.compile(r",?\s(?:and|or)\s(?:also\s)?", re.IGNORECASE)
_SENTENCE_ENDS = re.compile(rf"{_CLOSE}(?:\s{{0,4}}\Z|\n|(?<=[.])\s|[,;!(]|\s(?:because|since|as)\b)")
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|unlikely)\b|n['\u2019]t\b|\u4e0d|\u6ca1|\u5e76\u975e", re.IGNORECASE
)
_NEGATED_BEFORE = re.compile(
    r"(?:(?:\b(?:if|whether|unless|not|never|cannot|why)|n['\u2019]t)\s(?:that\s)?(?:(?:the|an?|your|my|only)\s)?"
    r"(?:(?:correct|right|best|final|ever|simply|option|choice)\s)?|\b(?:wrong|incorrect|false|tempting|trap|tricky|careless)\s)[(\[*]{0,3}\Z",
    re.IGNORECASE,
)
# What follows no option: "B-12", "A+", "e.g.", "2.5", a question that is still open.
_NO_LABEL = re.compile(
    r"""['\u2019]\w|[+#%\u00b0^/]|\s?=|-\w|\.\w\.|[.,:]\d|[)\]}*_"'\u201d`]{0,4}\?|\s?[\uac00\uc774]\s?\uc544\ub2c8|\s?(?:\u3067\u306f?|\u3058\u3083)(?:\u306a|\u3042\u308a\u307e\u305b)|\s?(?:\u9879\s?)?\u4e0d"""
)
# "A and C", "B, D": no single choice. "B, A is wrong" is one.
_SEVERAL = re.compile(
    r"""[)\]}*_"'\u201d`]{0,4}(?:\s?[,&]|\s(?:and|or)\b)\s?(?:(?:and|or|both)\s)?[*_(\["']{0,3}(?:option\s|choice\s)?"""
    r"""(?:[B-HJ]|[AI](?!\s\w))(?![\w'\u2019])(?![)\]*]{0,3}\s(?:is|was|would|cannot|does|has)\b)"""
)
# After an "A", "I", "b" or "2" without a bracket only these words leave it a label: "A because", but not "A dog".
_AFTER_LABEL = re.compile(
    r"\s+(?:because|since|as|and|but|or|not|for|due|which|rather|over|based|so|if|instead|here|with|by|from|given|would"
    r"|is|was)\b"
)
_ALONE = re.compile(rf"(?:(?:option|choice)\s)?{_OPEN}(?P<letter>[A-Ja-j1-5]){_CLOSE}[.!]?", re.IGNORECASE)
_BEFORE_REASON = re.compile(rf"\s{{0,9}}{_OPEN}(?P<letter>[A-J])(?!\w){_CLOSE}(?:,\s|\s(?:because|since|as)\b)")
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
        for pattern in _STATEMENTS
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
    for pattern in _BETTER:
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
        asked = re.compile(rf"{_CLOSE}\?").match(text, stated.end)
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
