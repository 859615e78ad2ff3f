"""What a response looks like as text: repetition inside it, and words taken over from its prompt.

A higher mutual information can be bought by repeating the prompt; these figures show when it was.

Words are runs of letters, digits and combining marks of any script, compared without case, punctuation, width or
ligatures (Unicode NFKC, then case folding). Scripts that write no spaces between words (Han, Hiragana, Katakana, Thai,
Lao, Burmese, Khmer) have no such runs: there every character, with the marks on it, counts as a word. An n-gram of them
is shorter than one of spaced words, so compare figures within a language only.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise

# First and last code point of the scripts without spaces between words.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark and zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana phonetic extensions
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, later extensions
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_JOINERS = "\u200c\u200d"  # shape letters inside a word; no boundary
_ONLY_COPIES_SHARE = 0.9


def words(text: str) -> list[str]:
    """The words of `text` in order, case-folded and without punctuation; single characters in unspaced scripts."""
    plain = _plain(text)
    return [plain[start:end] for start, end in _word_ranges(plain)]


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """The words of `text`, as `words` gives them, each with where it starts and ends there."""
    plain, origins = "", []
    for start, end in _clusters(text):
        part = _plain(text[start:end])
        plain += part
        origins += [(start, end)] * len(part)
    return [(plain[start:end], origins[start][0], origins[end - 1][1]) for start, end in _word_ranges(plain)]


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` neighbouring tokens in order, [max(0, tokens - n + 1)]; raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, found {n}")
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(tokens: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of one response, in (0, 1] (Li et al. 2016, "distinct-n").

    1.0 for a response with fewer than two n-grams (fewer than n + 1 words, or none): nothing can repeat.
    """
    return _distinct_share(ngrams(tokens, n))


def corpus_distinct_n(responses: Sequence[Sequence[str]], n: int) -> float:
    """Share of different n-grams among those of all responses together, in (0, 1]; none crosses two responses.

    It falls when answers become alike. It also falls as a corpus grows: compare only equal numbers of responses.
    """
    return _distinct_share(list(chain.from_iterable(ngrams(tokens, n) for tokens in responses)))


def self_bleu(responses: Sequence[Sequence[str]], orders: int = 4) -> list[float]:
    """BLEU of each response with all the others as its references, in [0, 1] (Zhu et al. 2018, "Texygen").

    High where answers are made of the same phrases; its mean is the corpus' self-BLEU. Sentence BLEU up to 4-grams with
    clipped counts and the closest reference length (the shorter of two as close); orders for which the response is too
    short are left out, and a count of zero becomes 1/2, 1/4, ... of a match, halved again for each further such order.
    A response that shares no word with another, or has none, scores 0. It grows with the number of responses: compare
    equal numbers only. Raises ValueError for fewer than two responses.
    """
    if len(responses) < 2:
        raise ValueError(f"responses: expected at least two, found {len(responses)}")
    counts = [[Counter(ngrams(tokens, n)) for n in range(1, orders + 1)] for tokens in responses]
    highest: dict[tuple[str, ...], tuple[int, int]] = {}  # n-gram -> its two largest counts in one response
    for gram, count in chain.from_iterable(of_order.items() for response in counts for of_order in response):
        first, second = highest.get(gram, (0, 0))
        highest[gram] = (count, first) if count > first else (first, max(second, count))
    lengths = Counter(len(tokens) for tokens in responses)
    return [_bleu(response, highest, lengths) for response in counts]


def _bleu(
    counts: list[Counter[tuple[str, ...]]], highest: dict[tuple[str, ...], tuple[int, int]], lengths: Counter[int]
) -> float:
    """Sentence BLEU of one response; its own counts and its length are among `highest` and `lengths`."""
    size = counts[0].total()
    logarithms, smoothing, matched = [], 1.0, 0
    for of_order in counts:
        if not (total := of_order.total()):
            break
        clipped = 0
        for gram, count in of_order.items():
            first, second = highest[gram]
            clipped += min(count, second if count == first else first)
        matched += clipped
        if not clipped:
            smoothing /= 2
        logarithms.append(math.log((clipped or smoothing) / total))
    if not matched:
        return 0.0
    others = (length for length, times in lengths.items() if times > (length == size))
    closest = min(others, key=lambda length: (abs(length - size), length))
    return min(1.0, math.exp(1 - closest / size)) * math.exp(sum(logarithms) / len(logarithms))


def copy_rate(response: str, source: str, n: int = 3) -> float:
    """Share of the response's word n-grams, repeats counted, that also stand in the source, in [0, 1].

    `source` is the context and the question in one text. A response of fewer than `n` words has no n-gram: it scores
    1.0 if all its words stand in the source side by side in this order, else 0.0. A response without words scores 0.0.
    """
    copied = _copied(words(response), words(source), n)
    return sum(copied) / len(copied) if copied else 0.0


def only_copies(response: str, source: str, n: int = 3) -> bool:
    """Whether at least 90 % of the response's words lie inside word n-grams of the source.

    A response of fewer than `n` words only copies if all its words stand in the source side by side in this order; a
    response without words copies nothing.
    """
    tokens = words(response)
    covered = [False] * len(tokens)
    for start, copied in enumerate(_copied(tokens, words(source), n)):
        if copied:
            end = min(start + n, len(tokens))
            covered[start:end] = [True] * (end - start)
    return bool(covered) and sum(covered) >= _ONLY_COPIES_SHARE * len(covered)


def copied_spans(response: str, source: str, n: int = 3) -> list[tuple[int, int]]:
    """Where the response says a word n-gram of the source: [start, end) of its characters, in order, none touching
    another.

    These are the n-grams that `copy_rate` counts, with what stands between their words; those that overlap are one.
    """
    spans = word_spans(response)
    found: list[tuple[int, int]] = []
    for first, copied in enumerate(_copied([word for word, _, _ in spans], words(source), n)):
        if not copied:
            continue
        start, end = spans[first][1], spans[min(first + n, len(spans)) - 1][2]
        if found and start <= found[-1][1]:
            start = found.pop()[0]
        found.append((start, end))
    return found


def _copied(response: list[str], source: list[str], n: int) -> list[bool]:
    """For each n-gram of the response, whether the source has it; one shorter than n counts as one whole n-gram."""
    size = min(n, len(response)) if response else n
    known = set(ngrams(source, size))
    return [gram in known for gram in ngrams(response, size)]


def _plain(text: str) -> str:
    """Without case, width and ligatures."""
    # Case folding can leave marks out of their canonical order (the dotted capital I): normalise again.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _word_ranges(plain: str) -> list[tuple[int, int]]:
    """Where words start and end in a text that `_plain` made."""
    if plain.isascii():
        return [match.span() for match in _ASCII_WORD.finditer(plain)]
    found: list[tuple[int, int]] = []
    open_word = False  # the last word may still grow
    for place, character in enumerate(plain):
        if _continues(character):
            if open_word:
                found[-1] = (found[-1][0], place + 1)
        elif not character.isalnum():
            open_word = False
        elif open_word and not _is_unspaced(character) and not _is_unspaced(plain[found[-1][0]]):
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
            open_word = True
    return found


def _clusters(text: str) -> list[tuple[int, int]]:
    """Where the parts of a text start and end that `_plain` makes something of by themselves: a character with what
    joins it."""
    starts = [place for place, character in enumerate(text) if not place or text.isascii() or not _joins(character)]
    return list(pairwise([*starts, len(text)])) if text else []


def _joins(character: str) -> bool:
    """Whether a character may become one with that before it: a mark, or a vowel or final consonant of Hangul."""
    first = unicodedata.normalize("NFKC", character)[:1]
    return _continues(first) or "\u1160" <= first <= "\u11ff"


def _distinct_share(grams: list[tuple[str, ...]]) -> float:
    return len(set(grams)) / len(grams) if grams else 1.0


def _continues(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character).startswith("M")


def _is_unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _UNSPACED)
