"""Options found by their texts: in "The answer is rain", rain is the option (B)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from mipo_ray.text.final_answers.statements import END_OF_SENTENCE

# Numbers, words (characters, where a script has no spaces between words), and the signs that tell two formulas apart.
# Case, articles, brackets and punctuation do not matter.
_UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(
    rf"\d+(?:[.,]\d+)*|(?<![\d.])\.\d+|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|[+=/<>^\u2264\u2265\u00d7]"
    r"|(?<![^\W\d_])[-\u2212\u2013]|[-\u2212\u2013](?![^\W\d_])"
)
_SKIPPED = frozenset(
    {"a", "an", "the", "that", "because", "by", "to", "in", "it", "is", "they", "are", "text", "mathrm"}
)
_LONGEST_BEGINNING = 600  # characters
_ARTICLES = ("a", "an", "the")
_DECORATION = re.compile(r"""[\s*_`"'\u201c\u2018(\[{$:,\\]{0,40}""")
_GOES_ON = re.compile(r"\s?(?:[-+=/*^\u00d7]\s?\d|\d)")


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Mention:
    """An option's text in a response: where it stands, and the option's label."""

    start: int
    end: int
    label: str
    words: int


class OptionTexts:
    """Finds the options of one question in one response, by their texts.

    Two options with the same words are found by none of them.
    """

    def __init__(self, response: str, labels: Sequence[str], texts: Sequence[str]) -> None:
        self._response = response
        self._words = _words(response)
        self._starts = [word.start for word in self._words]
        spelled = [
            (tuple(word.text for word in _words(text)), label) for label, text in zip(labels, texts, strict=True)
        ]
        spelled = [
            (words[1:] if len(words) > 1 and words[0] in _ARTICLES else words, label) for words, label in spelled
        ]
        self._options = {
            words: label for words, label in spelled if words and [w for w, _ in spelled].count(words) == 1
        }
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for words in sorted(self._options, key=len, reverse=True):
            self._by_first.setdefault(words[0], []).append(words)

    def all(self) -> list[Mention]:
        """Every mention in order; of overlapping ones the first, of those that start together the longest."""
        found: list[Mention] = []
        index = 0
        while index < len(self._words):
            mention = self._at(index)
            found += [mention] if mention else []
            index += mention.words if mention else 1
        return found

    def stated_at(self, position: int) -> Mention | None:
        """The option that the words from `position` on state: its whole text, or the only one that begins like this."""
        first = bisect_left(self._starts, position)
        if first == len(self._words) or not _DECORATION.fullmatch(self._response, position, self._starts[first]):
            return None
        for start in range(first, min(first + 4, len(self._words))):
            mention = self._at(start) or self._begun_at(start)
            if mention:
                return mention
            if self._words[start].text not in _SKIPPED:
                return None
        return None

    def whole(self, position: int, length: int) -> str | None:
        """The label of the option that all words of a part of the response state, nothing else beside it."""
        mention = self.stated_at(position)
        last = bisect_left(self._starts, position + length) - 1
        return mention.label if mention and mention.end == self._words[last].end else None

    def _at(self, index: int) -> Mention | None:
        for words in self._by_first.get(self._words[index].text, ()):
            spoken = self._words[index : index + len(words)]
            if len(spoken) == len(words) and all(a.text == b for a, b in zip(spoken, words, strict=True)):
                if words[-1][-1].isdigit() and _GOES_ON.match(self._response, spoken[-1].end):
                    continue
                return Mention(spoken[0].start, spoken[-1].end, self._options[words], len(words))
        return None

    def _begun_at(self, index: int) -> Mention | None:
        """An option of which only the beginning is said, and then the sentence ends: two words or a number at least."""
        start = self._words[index].start
        limit = min(len(self._response), start + _LONGEST_BEGINNING)
        end = END_OF_SENTENCE.search(self._response, start, limit)
        limit = end.start() if end else limit
        spoken = [word for word in self._words[index : index + 100] if word.end <= limit]
        said = tuple(word.text for word in spoken)
        if not said or (len(said) < 2 and not said[0][0].isdigit()):
            return None
        begun = [words for words in self._by_first.get(said[0], ()) if words[: len(said)] == said]
        return Mention(spoken[0].start, spoken[-1].end, self._options[begun[0]], len(said)) if len(begun) == 1 else None


def _words(text: str) -> list[_Word]:
    return [
        _Word(
            found.start(),
            found.end(),
            found[0].replace(",", "").replace("\u2212", "-").replace("\u2013", "-").casefold(),
        )
        for found in _WORD.finditer(text)
    ]
