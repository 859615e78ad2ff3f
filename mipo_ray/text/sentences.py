r"""Splitting a text into sentences: leaving one of a prompt out (strategy `partial_prompt`), and finding those of a
response that are whole where it was cut (`filters.truncated=trim`).

The rules are fixed and need no language data; the same text always gives the same sentences.

- A blank line ends a sentence. A list item (`- x`, `* x`, `1. x`, `a) x`, and `A. x` or `A: x` beside the next letter)
  and a Markdown heading is one sentence, with the indented lines that continue it. Any other line break is white space.
- Elsewhere a sentence ends at a stop that white space follows, with the quotes and brackets that close after it; the
  stops of scripts without spaces need no white space. Decimals, addresses and file names hold no such stop.
- A full stop after an abbreviation, an initial or the number of a list ends no sentence. Some abbreviations also stand
  at a sentence's end ("at 5 p.m. Then"): there the next word decides.
- Characters without a letter or digit never make a sentence of their own beside another one in their paragraph.

Where the rules cannot know, they split less: "I got a C. Mary got a B." stays one sentence, because "C. Mary" looks
like a name; so does a stop without white space after it ("end.Next").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from mipo_ray.text.statistics import words

# Stops of scripts that need no white space after them: CJK, Devanagari, Arabic, Urdu, Ethiopic, Burmese.
_UNSPACED_STOPS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u1362\u104b"
_STOPS = ".!?\u2026" + _UNSPACED_STOPS
_OPENERS = "\"'([{*_`\u201c\u2018\u00ab\u300c\u300e\uff08\u3010\u300a"
_CLOSERS = "\"')]}*_`\u201d\u2019\u00bb\u300d\u300f\uff09\u3011\u300b"
# Possessive, and only from a run's first stop: a long run that ends no sentence is read once.
_STOP = re.compile(f"(?<![{_STOPS}])(?P<marks>[{_STOPS}]++)(?P<closers>[{re.escape(_CLOSERS)}]*+)")
_SPACE = re.compile(r"\s*+")
_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_NEXT_WORD = re.compile(rf"[{re.escape(_OPENERS)}]{{0,4}}(\w{{1,20}})")

_ITEM = re.compile(
    r"(?:[-*+\u2022\u2023\u25e6\u00b7\u2013\u2014]|\#{1,6}"
    r"|[*_]{0,2}(?:\(?(?:\d{1,3}|[A-Za-z]|[ivx]{2,4})\)|\d{1,3}\.|\[(?:\d{1,3}|[A-Za-z])\])[*_]{0,2})(?=\s)"
    r"|\d{1,3}[.)](?=[^\W\d_])"
)
# Also an initial or a speaker: an item only where a line beside it has the letter before or after.
_LETTERED = re.compile(r"[*_]{0,2}([A-Za-z])[.:][*_]{0,2}\s")
_MARKER = re.compile(r"[*_]{0,2}[(\[]?(?:\d{1,3}|[A-Za-z])[.):\]][*_]{0,2}(?:\s|(?=[^\W\d_]))")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_LAST = _set(
    "dr mr mrs ms mx prof rev hon gen sen gov capt lt col sgt mt messrs mme mlle e.g i.e eg ie vs cf viz"
)
_BEFORE_NUMBERS = _set("no nos nr fig figs eq eqs vol vols p pp sect ch chap art tab pt q")
# At a sentence's end when a capital follows.
_LAST_BEFORE_CAPITAL = _set(
    "a.m p.m etc al approx ca est max min mins sec secs hr hrs ft lb lbs oz sq tsp tbsp kg km cm mm dept incl resp "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
# At a sentence's end only when a word follows that often begins one: "U.S. The" but not "U.S. Army".
_LAST_BEFORE_STARTER = _set("inc ltd co corp bros st ave blvd rd jr sr ph.d m.d u.s u.k e.u u.n")
_DOTTED = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")
# "Machine A. Machine B": the letter after these is no initial.
_LABELLED = _set(
    "answer bag box brand building choice city class column container exhibit figure grade group house item jar letter "
    "line machine model option part person plan player point product room row section set side step store student team "
    "town train type variable vitamin"
)
_STARTERS = _set(
    "a after all also although an and another are as at because before both but by can compute consider could did do "
    "does during each every explain find finally first for from give given has have he her here his how however i if "
    "in is it its later let list many more most my next no not now of on one only or other our please she should show "
    "since so some such tell that the their then there therefore these they this those thus to today two under use "
    "was we were what when where which while who whose why will with would write yes yet you your"
)

_STOP_WORDS = _set(
    "a about after all also am an and any are as at be been but by can could did do does each else for from had has "
    "have he her here him his how i if in into is it its just let many me might more most much must my no not now of "
    "off on one or other our out over shall she should so some such than that the their them then there these they "
    "this those to too up us very was we were what when where which while who whom whose why will with would yes you "
    "your yours d don doesn didn isn aren wasn weren couldn wouldn shouldn haven hasn ll m re s t ve "
    # Courtesies: a sentence of nothing else says nothing of the task.
    "afternoon appreciate appreciated bye cheers dear evening give good goodbye great greetings hello help hey hi "
    "kindly lot lots morning ok okay please regards sincerely sorry sure thank thanks thx welcome"
)
_CHARACTERS_PER_WORD = 3  # of scripts without spaces, where every character is a word


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every sentence of `text`, in order; all that lies outside them is white space."""
    spans: list[tuple[int, int]] = []
    for start, end, is_item in _paragraphs(text):
        spans.extend([(start, end)] if is_item else _split(text, start, end))
    return spans


def without_sentence(text: str, index: int) -> str:
    """`text` without its sentence number `index` (from 0), and without white space at both ends.

    Of the white space on both sides of the sentence one survives: the one with more line breaks, so that lists and
    paragraphs stay apart, with the indentation of the line that follows. Raises IndexError for an index below 0 or
    beyond the last sentence.
    """
    spans = sentence_spans(text)
    if not 0 <= index < len(spans):
        raise IndexError(f"index: expected a sentence from 0 to {len(spans) - 1}, found {index}")
    start, end = spans[index]
    before = text[spans[index - 1][1] : start] if index else ""
    after = text[end : spans[index + 1][0]] if index + 1 < len(spans) else ""
    return (text[: start - len(before)] + _joint(before, after) + text[end + len(after) :]).strip()


def informative_sentences(text: str) -> list[int]:
    """Indexes of the sentences of `text` that carry information, in order.

    A sentence does when it has a number (a list item's own number apart) or at least two words that are neither
    English function words nor courtesies: "He has 3 cows." and "I cannot eat dairy." do, "Please help me.", "Thanks a
    lot!" and "What is it?" do not. In scripts without spaces three characters count as one such word. Only English
    function words are known: in other languages every word counts.
    """
    return [index for index, (start, end) in enumerate(sentence_spans(text)) if _is_informative(text[start:end])]


def whole_sentence_ends(text: str) -> list[int]:
    """Where the whole sentences of a text that was cut at its end end (exclusive), in order.

    A whole sentence has its stop; a list item may hold several of them, and is whole without one where another line
    follows. What leads to something that may be missing is no end: a heading, and a line that ends with a colon. Behind
    the last letter nobody knows what would have come: there no stop after a digit or an abbreviation ends a sentence,
    and no ellipsis.
    """
    ends: list[int] = []
    last = len(text.rstrip())
    for start, end, is_item in _paragraphs(text):
        *inner, (unfinished, _) = _split(text, start, end)
        ends.extend(stopped for _, stopped in inner)
        if is_item and end < last and text[start] != "#" and text[end - 1] != ":":
            ends.append(end)
        elif stopped := _stopped_at(text, unfinished, end, is_cut=end == last):
            ends.append(stopped)
    return ends


def _stopped_at(text: str, start: int, end: int, *, is_cut: bool) -> int:
    """Where the last sentence of a paragraph, text[start:end], has its stop (exclusive); 0 where it has none.

    Characters behind the stop that are no letters or digits, and apart from it, belong to no sentence. is_cut: whether
    the text goes no further than this paragraph.
    """
    unread = max((found.end() for found in _LETTER_OR_DIGIT.finditer(text, start, end)), default=end)
    stop = _STOP.search(text, unread, end)
    if stop is None or not (stop.end() == end or text[stop.end()].isspace()):
        return 0
    if is_cut and not set(stop["marks"]) - {".", "\u2026"}:
        is_plain = stop["marks"] == "." and not text[stop.start() - 1].isdigit()
        return stop.end() if is_plain and not _is_abbreviation(text, start, stop.start(), stop.end()) else 0
    return stop.end()


def _is_informative(sentence: str) -> bool:
    marker = _MARKER.match(sentence)
    content = [word for word in words(sentence[marker.end() if marker else 0 :]) if word not in _STOP_WORDS]
    if any(any(character.isdecimal() for character in word) for word in content):
        return True
    characters = sum(unicodedata.category(word[0]) in ("Lo", "Lm") and _is_one_character(word) for word in content)
    return len(content) - characters + characters // _CHARACTERS_PER_WORD >= 2


def _is_one_character(word: str) -> bool:
    return all(unicodedata.category(character).startswith("M") for character in word[1:])


def _paragraphs(text: str) -> Iterator[tuple[int, int, bool]]:
    """Start, end and "is one list item" of the stretches that no sentence crosses, without white space around them."""
    lines: list[tuple[int, int, bool, bool]] = []  # start and end without white space, after a blank line, indented
    at, after_blank = 0, True
    for line in text.splitlines(keepends=True):
        start = at + len(line) - len(line.lstrip())
        if start < at + len(line):
            lines.append((start, at + len(line.rstrip()), after_blank, start > at))
        after_blank = start == at + len(line)
        at += len(line)

    letters = [_letter(text, start) for start, _, _, _ in lines]
    open_start, open_end, open_item = 0, 0, False
    for number, (start, end, after_blank, indented) in enumerate(lines):
        neighbours = letters[max(0, number - 1) : number + 2]
        is_item = _ITEM.match(text, start, end) is not None or (
            letters[number] > 0 and any(abs(letters[number] - letter) == 1 for letter in neighbours)
        )
        if not (after_blank or is_item or (open_item and not indented)):
            open_end = end
            continue
        if open_end:
            yield open_start, open_end, open_item
        open_start, open_end, open_item = start, end, is_item
    if open_end:
        yield open_start, open_end, open_item


def _letter(text: str, start: int) -> int:
    """The code point of the letter that may label the line at `start`, or 0, which is no letter's neighbour."""
    found = _LETTERED.match(text, start)
    return ord(found[1]) if found else 0


def _split(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The sentences of one paragraph, which begins and ends with characters other than white space."""
    spans: list[tuple[int, int]] = []
    unread, has_content = start, False
    for stop in _STOP.finditer(text, start, end):
        has_content = has_content or _LETTER_OR_DIGIT.search(text, unread, stop.start()) is not None
        unread = stop.end()
        gap = _SPACE.match(text, unread, end)
        following = gap.end() if gap else unread
        if has_content and following < end and _ends_sentence(text, start, stop, following):
            spans.append((start, stop.end()))
            start, has_content = following, False
    if spans and _LETTER_OR_DIGIT.search(text, start, end) is None:
        start = spans.pop()[0]
    return [*spans, (start, end)]


def _ends_sentence(text: str, start: int, stop: re.Match[str], following: int) -> bool:
    """Whether `stop` ends the sentence that began at `start`; the next text begins at `following`."""
    marks, closers, gap = stop["marks"], stop["closers"], text[stop.end() : following]
    if any(mark in _UNSPACED_STOPS for mark in marks):
        return bool(gap) or not closers or text[following] in _OPENERS
    if not gap or text[following] in _STOPS:  # an address; an ellipsis written with spaces
        return False
    if closers and text[following].islower():  # "Stop!" he said
        return False
    if marks == "." and text[stop.start() - 2 : stop.start()] != ". ":
        return not _is_abbreviation(text, start, stop.start(), following)
    if set(marks) <= {".", "\u2026"}:
        return "\n" in gap or not text[following].islower()
    return True


def _is_abbreviation(text: str, start: int, dot: int, following: int) -> bool:
    """Whether the full stop at `dot` belongs to the token before it alone and ends no sentence."""
    before = text[max(start, dot - 24) : dot]
    if before[-1:].isspace():
        return False
    token = before.split()[-1].lstrip(_OPENERS)
    name = token.lower()
    next_word = _NEXT_WORD.match(text, following)
    word = next_word[1] if next_word else ""
    if token.isdecimal() and len(token) <= 3:  # a number inside a line: "Steps: 1. Mix. 2. Bake."
        lead = text[max(start, dot - 24) : dot - len(token)].rstrip()
        return dot - len(token) <= start or (token == "1" and lead.endswith(":"))
    if name in _NEVER_LAST:
        return True
    if name in _BEFORE_NUMBERS:
        return word[:1].isdecimal()
    if name in _LAST_BEFORE_CAPITAL:
        return not word[:1].isupper()
    if len(token) == 1 and token.isalpha():
        if token == "I" or token.islower():
            return word[:1].islower() and token != "I"
        is_label = any(noun.lower() in _LABELLED for noun in before.split()[-2:-1])
        return word[:1].islower() or not (is_label or word.lower() in _STARTERS)
    if name in _LAST_BEFORE_STARTER or _DOTTED.fullmatch(token):
        return word.lower() not in _STARTERS or not word[:1].isupper()
    return False


def _joint(before: str, after: str) -> str:
    """The white space to keep where the sentence between `before` and `after` is gone."""
    breaks_before, breaks_after = list(_BREAK.finditer(before)), list(_BREAK.finditer(after))
    if len(breaks_after) >= len(breaks_before):
        return after
    if not breaks_after:
        return before
    return before[: breaks_before[-1].end()] + after[breaks_after[-1].end() :]
