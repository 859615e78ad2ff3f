"""Words, distinct-n and copying, against plain loops and examples counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.text_statistics import copy_rate, corpus_distinct_n, distinct_n, ngrams, only_copies, words

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


def test_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0"):
        ngrams(["a"], 0)
