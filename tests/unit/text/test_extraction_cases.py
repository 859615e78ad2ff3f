"""The readers of final answers on outputs labelled by hand, on formatted numbers and on the solutions of GSM8K.

    python -m pytest tests/unit/text/test_extraction_cases.py

extraction_cases.jsonl holds one output a line, written for this project in the manner of real models: `response`,
`expected` (null: no one answer), `why` it is there, and for choices the question's `labels` and `texts`.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.text.final_answers import final_choice, final_number

CASES = [json.loads(line) for line in (Path(__file__).parent / "extraction_cases.jsonl").read_text().splitlines()]
NUMBERS = [case for case in CASES if case["kind"] == "number"]
CHOICES = [case for case in CASES if case["kind"] == "choice"]
GSM8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"


def named(case: dict[str, Any]) -> str:
    return f"{case['why']}: {case['response'][-40:]!r}"


def fraction(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text)


@pytest.mark.parametrize("case", NUMBERS, ids=named)
def test_number_cases(case: dict[str, Any]) -> None:
    assert final_number(case["response"]) == fraction(case["expected"]), case["why"]


@pytest.mark.parametrize("case", CHOICES, ids=named)
def test_choice_cases(case: dict[str, Any]) -> None:
    found = final_choice(case["response"], labels=case.get("labels"), texts=case.get("texts"))
    assert found == case["expected"], case["why"]


def test_the_file_covers_what_it_should() -> None:
    assert len(CASES) == len({(case["response"], str(case.get("labels")), str(case.get("texts"))) for case in CASES})
    assert len(CASES) >= 780
    assert {len(case["labels"]) for case in CHOICES if "labels" in case} >= {2, 3, 4, 5}
    assert any(case["expected"] in ("1", "2", "3", "4") for case in CHOICES)
    for kind in (NUMBERS, CHOICES):
        assert sum(case["expected"] is None for case in kind) >= 20


# --- labels and texts -------------------------------------------------------------------------------------------------

OPTIONS = ["fog", "freezing rain", "an unusually long drought", "2.5 km"]


@given(
    st.sampled_from([*"ABCD"]),
    st.sampled_from(
        ["{}", "The answer is {}.", "**{}**", r"\boxed{{{}}}", "I would choose {}.", "Answer: {}\nBecause."]
    ),
    st.sampled_from([str, str.lower, str.upper, str.capitalize]),
)
def test_an_option_is_found_by_its_text(label: str, frame: str, spelled: Any) -> None:
    text = spelled(OPTIONS["ABCD".index(label)])
    assert final_choice(frame.format(text), labels="ABCD", texts=OPTIONS) == label
    numeric = str("ABCD".index(label) + 1)
    assert final_choice(frame.format(text), labels="1234", texts=OPTIONS) == numeric


@given(st.sampled_from("ABCDEFGHJ"), st.sampled_from(["ABC", "ABCD", "ABCDE", "1234"]))
def test_a_letter_outside_the_labels_is_no_answer(letter: str, labels: str) -> None:
    assert final_choice(f"The answer is {letter}.", labels=labels) == (letter if letter in labels else None)


def test_labels_keep_their_spelling() -> None:
    assert final_choice("The answer is B.", labels=["a", "b"]) == "b"
    assert final_choice("The answer is rain.", texts=["fog", "rain"]) == "B"
    assert final_choice("The answer is rain.", labels="AB", texts=["rain", "Rain"]) is None  # which of the two?
    with pytest.raises(ValueError, match="zip"):
        final_choice("The answer is rain.", labels="ABC", texts=["fog", "rain"])


# --- formatted numbers ------------------------------------------------------------------------------------------------

FRAMES = [
    "{}",
    "The answer is {}.",
    "the answer is: **{}**",
    "#### {}",
    "So she has 3 boxes of 12.\n#### {}",
    "Final Answer: {}\n\nI checked it in 2 ways.",
    r"Thus $\boxed{{{}}}$.",
    "We add 3 and 4. The answer is {}, since 1 + 1 = 2.",
    "5 + 8 - 1 = {}",
    "The answer is 7. Wait, that's wrong. It should be {}.",
    "La respuesta es {}.",
    "The answer is {}.\n\nQuestion: What is 2 + 2?\nAnswer: 4",
]
UNITS = [
    "{}",
    "${}",
    "{} dollars",
    "€{}",
    "{} €",
    "£{}",
    "{}%",
    r"{}\%",
    "{} km",
    "{}kg",
    "{} m2",
    "{} square meters",
    r"{} \text{{ cm}}^2",
]
frames = st.sampled_from(FRAMES)


@given(
    st.integers(0, 10**15),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([",", "{,}", "\u00a0", "\u202f", ""]),
    st.sampled_from(UNITS),
    frames,
)
def test_formatted_decimals_round_trip(
    digits: int, places: int, negative: bool, separator: str, unit: str, frame: str
) -> None:
    value = Decimal(digits).scaleb(-places) * (-1 if negative else 1)
    written = unit.format(f"{value:,f}".replace(",", separator))
    assert final_number(frame.format(written)) == Fraction(value)


@given(
    st.integers(-(10**6), 10**6),
    st.integers(1, 10**4),
    st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}"]),
    frames,
)
def test_formatted_fractions_round_trip(numerator: int, denominator: int, form: str, frame: str) -> None:
    assert final_number(frame.format(form.format(numerator, denominator))) == Fraction(numerator, denominator)


@given(
    st.integers(1, 999),
    st.integers(1, 99),
    st.integers(1, 99),
    st.sampled_from(["{} {}/{}", "{} and {}/{}", r"{}\frac{{{}}}{{{}}}"]),
    frames,
)
def test_formatted_mixed_numbers_round_trip(
    whole: int, numerator: int, denominator: int, form: str, frame: str
) -> None:
    # The digit before \frac is the whole part, as "2\frac{1}{2}" is written; longer ones are not read there.
    whole = whole % 9 + 1 if "frac" in form else whole
    expected = whole + Fraction(numerator, denominator)
    assert final_number(frame.format(form.format(whole, numerator, denominator))) == expected


@given(st.integers(1, 999), st.sampled_from([("thousand", 3), ("million", 6), ("billion", 9)]), frames)
def test_formatted_scales_round_trip(count: int, scale: tuple[str, int], frame: str) -> None:
    assert final_number(frame.format(f"{count} {scale[0]}")) == count * 10 ** scale[1]
    assert final_number(frame.format(f"{count}e{scale[1]}")) == count * 10 ** scale[1]
    assert final_number(frame.format(rf"{count} \times 10^{{{scale[1]}}}")) == count * 10 ** scale[1]


UNDER_TWENTY = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
UNDER_TWENTY += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spoken(number: int) -> str:
    if number < 20:
        return UNDER_TWENTY[number]
    if number < 100:
        return TENS[number // 10] + (f"-{UNDER_TWENTY[number % 10]}" if number % 10 else "")
    base, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {'and ' if base == 100 else ''}{spoken(number % base)}" if number % base else ""
    return f"{spoken(number // base)} {name}{rest}"


@given(st.integers(0, 999_999))
def test_numbers_in_words_round_trip(number: int) -> None:
    assert final_number(f"The answer is {spoken(number)}.") == number
    assert final_number(f"{spoken(number)} apples".capitalize()) == number


# --- the solutions of GSM8K -------------------------------------------------------------------------------------------


def test_solutions_of_gsm8k_are_read_with_and_without_their_mark() -> None:
    """Of the 1,319 solutions all are read right; without the line "#### n", as a model might write them, 99 %.

    What is missed then are solutions whose last sentence states another number than the answer (dollars for cents, a
    check, a wrong sum). Nothing was tuned on the test split.
    """
    if not GSM8K.exists():
        pytest.skip(f"no data set at {GSM8K}")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    golds = [Fraction(row["answer"].rpartition("#### ")[2].replace(",", "")) for row in rows]
    marked = [final_number(row["answer"]) == gold for row, gold in zip(rows, golds, strict=True)]
    plain = [re.sub(r"<<[^<>]*>>", "", row["answer"].rpartition("#### ")[0]).rstrip() for row in rows]
    unmarked = [final_number(text) == gold for text, gold in zip(plain, golds, strict=True)]
    print(f"{sum(marked)} and {sum(unmarked)} of {len(rows)} read right with and without the mark")
    assert len(rows) == 1319
    assert all(marked)
    assert sum(unmarked) >= 0.985 * len(rows)


@pytest.mark.parametrize(
    "unit",
    ["\nSo 1 ", "wait 1 = ", "twenty ", "1 dozen or ", "1 and ", "1'", "1\u00a0", "1 000 ", "1 x 10", "1 minutes ",
     "answer is 1 or ", "answer is ", "not but ", "fog fog rain ", "**1", "<answer>", "\nQuestion:", "has 1 ", "1 (",
     "students might choose ", "I think students say the answer is ", "B is better than A, ", "B describes it ",
     "\u6b63\u89e3\u306fC\u9009", "1/3 of ", "<think>", "1/3 of 36, which is "],
)  # fmt: skip
def test_long_responses_of_any_wording_take_linear_time(unit: str) -> None:
    # A quadratic pattern would run for minutes here and trip the suite's time limit.
    text = unit * (60_000 // len(unit)) + "?"
    final_number(text)
    final_choice(text, labels="ABC", texts=["fog", "fog fog fog fog fog fog", "1"])
