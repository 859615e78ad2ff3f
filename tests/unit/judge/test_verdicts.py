"""What a judge wrote -> its verdict, or None.

python -m pytest tests/unit/judge/test_verdicts.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.judge.verdicts import pairwise_verdict, pointwise_rating


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "first"),
        ("Verdict: B", "second"),
        ("Verdict: tie", "tie"),
        ("verdict: b.", "second"),
        ("VERDICT : a", "first"),
        ("**Verdict:** A", "first"),
        ("**Verdict: B**", "second"),
        ("### Verdict\n\nB", "second"),
        ("Final verdict: [[A]]", "first"),
        ("My final verdict is: Answer B", "second"),
        ("The verdict is A.", "first"),
        ("Verdict: Response A is better", "first"),
        ("Verdict = Tie.", "tie"),
        ("Verdict \u2013 B", "second"),
        ("Verdict: \u201cA\u201d", "first"),
        ("Verdict: $\\boxed{A}$", "first"),
        ("Answer B rambles; answer A is short.\n\nVerdict: A\n\nI hope that this helps!", "first"),
        ("At first sight\nVerdict: A\nbut the date is wrong, so\nVerdict: B", "second"),
        ("A knows the user, B does not.\n[[A]]", "first"),
        ("B", "second"),
        ("<think>Verdict: A? No.</think>\nVerdict: B", "second"),
        ("Verdict: A\n</think>\n\nVerdict: tie", "tie"),
        ("Verdict: equal", "tie"),
        ("Verdict: A\r\n", "first"),
        ("> Verdict: `B`", "second"),
    ],
)
def test_verdicts_are_read(text: str, verdict: str) -> None:
    assert pairwise_verdict(text) == verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n\n",
        "Both are good.",
        "A is better than B.",
        "Verdict: A or B",
        "Verdict: A, B or tie",
        "Verdict: A and B are equal",
        "Verdict: C",
        "Verdict: AB",
        "Verdict:",
        "The verdict is hard to give",
        "Verdict: A\nBut then:\nThe verdict is not clear",
        "<think>Verdict: A, I think, but",
        "<thinking>\nVerdict: A",
        "Verdict: 4",
        "I prefer answer A because it is personal",
        "\x00\ufffd",
        "Verdict: not A",
    ],
)
def test_what_is_no_verdict_is_not_guessed_at(text: str) -> None:
    assert pairwise_verdict(text) is None


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: 4", 4),
        ("**Rating:** 5/5", 5),
        ("rating: 3 out of 5.", 3),
        ("Score: 2.0", 2),
        ("Rating: 1 point", 1),
        ("Final rating is [[4]]", 4),
        ("The reference has 5 steps, the answer 2.\nRating: 3", 3),
        ("Rating: 5\nNo, it forgets the user.\nRating: 2", 2),
        ("3", 3),
        ("Rating:\n4", 4),
        ("<think>Rating: 5</think>Rating: 1", 1),
    ],
)
def test_ratings_are_read(text: str, rating: int) -> None:
    assert pointwise_rating(text) == rating


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rating: 0",
        "Rating: 6",
        "Rating: 45",
        "Rating: 3.5",
        "Rating: -3",
        "Rating: 4 or 5",
        "Rating: 3-4",
        "Rating: 8/10",
        "Rating: four",
        "Rating: good",
        "It has 5 stars in my book, says the user",
        "1: of no use to this user",
    ],
)
def test_what_is_no_rating_is_not_guessed_at(text: str) -> None:
    assert pointwise_rating(text) is None


MARKS = st.sampled_from(["", "**", "*", "`", "_", '"', "[["])
CLOSING = {"[[": "]]"}
CASE = st.sampled_from([str, str.lower, str.upper, str.title])
# Reasoning before the verdict: anything but lines that are verdicts themselves, or thoughts that are never closed.
PROSE = st.text(max_size=200).filter(
    lambda text: not any(word in text.lower() for word in ("verdict", "rating", "score", "think"))
)


@given(PROSE, st.sampled_from(["A", "B", "tie"]), MARKS, CASE, st.sampled_from(["", ".", "  ", "\n\n"]))
def test_a_verdict_is_read_whatever_stands_before_it_and_however_it_is_dressed(prose, word, mark, case, end) -> None:
    text = f"{prose}\n{case('Verdict')}: {mark}{case(word)}{CLOSING.get(mark, mark)}{end}"
    assert pairwise_verdict(text) == {"A": "first", "B": "second", "tie": "tie"}[word]


@given(PROSE, st.integers(1, 5), MARKS, CASE, st.sampled_from(["", ".", "/5", " out of 5", ".0"]))
def test_a_rating_is_read_whatever_stands_before_it_and_however_it_is_dressed(prose, number, mark, case, end) -> None:
    text = f"{prose}\n{mark}{case('Rating')}: {number}{end}{CLOSING.get(mark, mark)}"
    assert pointwise_rating(text) == number


@given(st.text(max_size=300))
def test_any_text_gives_a_verdict_or_none(text: str) -> None:
    assert pairwise_verdict(text) in ("first", "second", "tie", None)
    assert pointwise_rating(text) in (1, 2, 3, 4, 5, None)


@given(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=1, max_size=20), PROSE)
def test_a_label_with_another_word_is_unreadable(word: str, prose: str) -> None:
    known = {"a", "b", "tie", "draw", "equal"}
    if word.lower() not in known:
        assert pairwise_verdict(f"{prose}\nVerdict: {word}") is None
    if word not in {"1", "2", "3", "4", "5"}:
        assert pointwise_rating(f"{prose}\nRating: {word}") is None
