"""Words, distinct-n, self-BLEU and copying, against plain loops, sacrebleu and examples counted by hand.

python -m pytest tests/unit/text/test_statistics.py
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.text.statistics import (
    copied_spans,
    copy_rate,
    corpus_distinct_n,
    distinct_n,
    ngrams,
    only_copies,
    self_bleu,
    word_spans,
    words,
)

some_words = st.lists(st.sampled_from(["red", "green", "blue", "tea", "cat"]), max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ... !? ", []),
        ("Hello, WORLD! 42 times_over", ["hello", "world", "42", "times", "over"]),
        ("Don\u2019t stop", ["don", "t", "stop"]),
        ("Straße \uff21\uff22\uff23 \ufb01ne", ["strasse", "abc", "fine"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("我喜欢茶。GPU很快", ["我", "喜", "欢", "茶", "gpu", "很", "快"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("\u0301abc", ["abc"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@settings(deadline=None)
@given(st.text(max_size=60))
def test_words_take_any_text_and_ignore_case_and_punctuation(text: str) -> None:
    found = words(text)
    assert all(found)
    assert words(f"  ¡{text}!  ") == found
    assert words(" ".join(found)) == found


@settings(deadline=None)
@given(some_words, st.integers(1, 4))
def test_distinct_n_agrees_with_a_loop(tokens: list[str], n: int) -> None:
    seen: list[list[str]] = []
    total = 0
    for start in range(len(tokens) - n + 1):
        total += 1
        if tokens[start : start + n] not in seen:
            seen.append(tokens[start : start + n])
    assert distinct_n(tokens, n) == (len(seen) / total if total else 1.0)
    if len(tokens) < n + 1:
        assert distinct_n(tokens, n) == 1.0


def test_corpus_distinct_n_pools_responses_without_crossing_them() -> None:
    # Bigrams: (a b), (b a), (a b), (b c): three of four differ; (a b) across the border would be a fifth.
    assert corpus_distinct_n([["a", "b", "a"], ["a", "b", "c"]], 2) == 3 / 4
    assert corpus_distinct_n([["a"], []], 2) == 1.0
    assert corpus_distinct_n([["x", "y"]] * 10, 2) == 1 / 10


def test_self_bleu_counted_by_hand() -> None:
    first, second, third = self_bleu([["a", "b", "c", "d", "e"], ["a", "b", "c", "d"], ["x"]])
    # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 n-grams; longer than the closest other, so no brevity penalty.
    assert first == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    # All n-grams are there; the closest other has 5 words to its 4.
    assert second == pytest.approx(math.exp(1 - 5 / 4))
    assert third == 0.0
    # A word that the other has once counts once, and no bigram matches: half a match of one.
    assert self_bleu([["a", "a"], ["a", "b"]])[0] == pytest.approx(math.sqrt(1 / 2 * (1 / 2) / 1))
    # Two orders without a match: a half, then a quarter.
    assert self_bleu([["a", "b", "c"], ["a", "d", "e"]])[0] == pytest.approx((1 / 3 * 0.5 / 2 * 0.25 / 1) ** (1 / 3))
    assert self_bleu([["a", "b"]] * 3) == pytest.approx([1.0] * 3)
    with pytest.raises(ValueError, match="found 1"):
        self_bleu([["a"]])


# sacrebleu 2.6.0: sentence_bleu(response, others, smooth_method="exp", use_effective_order=True, tokenize="none").
SACREBLEU = [
    ("the green tea is best in the morning", 0.638943104),
    ("the black tea is best in the evening", 0.541082269),
    ("water the plants in the morning", 0.232634727),
    ("in the morning", 1.000000000),
    ("buy the bread", 0.275160604),
    ("goats", 0.000000000),
]


def test_self_bleu_agrees_with_figures_of_sacrebleu() -> None:
    assert self_bleu([text.split() for text, _ in SACREBLEU]) == pytest.approx([share for _, share in SACREBLEU])


@settings(deadline=None)
@given(st.lists(some_words.filter(bool), min_size=2, max_size=6))
def test_self_bleu_agrees_with_sacrebleu(responses: list[list[str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = [" ".join(tokens) for tokens in responses]
    for index, (text, found) in enumerate(zip(texts, self_bleu(responses), strict=True)):
        others = texts[:index] + texts[index + 1 :]
        options = {"smooth_method": "exp", "use_effective_order": True, "tokenize": "none"}
        expected = sacrebleu.sentence_bleu(text, others, **options).score / 100
        assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(some_words, some_words, st.integers(1, 4))
def test_copy_rate_agrees_with_text_search(response: list[str], source: list[str], n: int) -> None:
    spaced = f" {' '.join(source)} "
    grams = [response[start : start + n] for start in range(len(response) - n + 1)]
    if grams:
        expected = sum(f" {' '.join(gram)} " in spaced for gram in grams) / len(grams)
    else:
        expected = float(bool(response) and f" {' '.join(response)} " in spaced)
    assert copy_rate(" ".join(response), " ".join(source), n) == expected


@settings(deadline=None)
@given(some_words.filter(bool), some_words, some_words)
def test_a_piece_of_the_source_only_copies(response: list[str], before: list[str], after: list[str]) -> None:
    source = " ".join([*before, *response, *after])
    assert copy_rate(" ".join(response).upper() + "!", source) == 1.0
    assert only_copies(" ".join(response).upper() + "!", source)


def test_copying_counted_by_hand() -> None:
    source = "I am a retired tailor in a hot city. What should I cook?"
    # Eight words, six 3-grams; "a retired tailor" and "retired tailor in" are the source's.
    response = "As a retired tailor in summer, cook rice."
    assert copy_rate(response, source) == pytest.approx(2 / 6)
    assert not only_copies(response, source)


@pytest.mark.parametrize(("new_words", "expected"), [(1, True), (2, False)])
def test_only_copies_from_nine_words_in_ten(new_words: int, expected: bool) -> None:
    copied = [f"w{i}" for i in range(10 - new_words)]
    assert only_copies(" ".join(copied + ["new"] * new_words), " ".join(copied)) is expected


@pytest.mark.parametrize(
    ("response", "rate", "copies"), [("", 0.0, False), ("?!", 0.0, False), ("a tailor", 1.0, True), ("tea", 0.0, False)]
)
def test_responses_too_short_for_an_ngram(response: str, rate: float, copies: bool) -> None:
    source = "I am a tailor."
    assert copy_rate(response, source) == rate
    assert only_copies(response, source) is copies


# Letters that change their number when case, width or ligatures go, marks, joiners, and scripts without spaces.
ODD = ["a", "b", "1", " ", ".", "\u00e9", "e", "\u0301", "\u01c6", "\ufb01", "\u0130", "\u0131", "\u0390", "\u0345"]
ODD += ["\uac00", "\u1100", "\u1161", "\u11a8", "\uff8a", "\uff9e", "\uff9f", "\uffa1", "\uffc2", "\u6211", "\u200c"]
ODD += [
    "\u200d",
    "\u0939",
    "\u093f",
    "\u094d",
    "\u0e17",
    "\u0e35",
    "\u0e48",
    "\u0149",
    "\u1e9e",
    "\u2460",
    "\u03a3",
    "\u03c2",
]
odd_text = st.text(alphabet=st.sampled_from(ODD), max_size=14)


@settings(deadline=None)
@given(st.text(max_size=40) | odd_text)
def test_spans_are_where_the_words_stand(text: str) -> None:
    spans = word_spans(text)
    assert [word for word, _, _ in spans] == words(text)
    for word, start, end in spans:
        # Alone, what stands there is that word; a character may hold the end of one and the beginning of the next.
        assert word in words(text[start:end])
    assert all(before[1] <= after[1] and before[2] <= after[2] for before, after in pairwise(spans))


def test_copied_spans_by_hand() -> None:
    source = "I keep bees on the roof and I like tea"
    response = "Since YOU keep bees: on the roof, try tea. I like tea!"
    assert [response[start:end] for start, end in copied_spans(response, source)] == [
        "keep bees: on the roof",
        "I like tea",
    ]
    assert copied_spans("Bees, bees, bees.", source) == []
    assert [response[start:end] for start, end in copied_spans(response, source, n=2)] == [
        "keep bees: on the roof",
        "I like tea",
    ]


@settings(deadline=None)
@given(some_words, some_words, st.integers(1, 4))
def test_copied_spans_hold_the_ngrams_that_the_copy_rate_counts(response: list[str], source: list[str], n: int) -> None:
    text, length = " ".join(response), min(n, len(response))
    known = {tuple(source[start : start + length]) for start in range(len(source) - length + 1)}
    covered = set()
    for start in range(len(response) - length + 1):
        if response and tuple(response[start : start + length]) in known:
            covered.update(range(start, start + length))
    inside = {
        place
        for place in range(len(response))
        if any(
            start <= len(" ".join([*response[:place], ""])) < end
            for start, end in copied_spans(text, " ".join(source), n)
        )
    }
    assert inside == covered
    assert bool(copied_spans(text, " ".join(source), n)) == (copy_rate(text, " ".join(source), n) > 0)


def test_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0"):
        ngrams(["a"], 0)
