"""Final answers read from responses that state them in every way that models do; expected values written by hand."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.text.final_answers import final_choice, final_number, same_final_answer

LISTED = "A) fog\nB) rain\nC) drought\nD) tornado\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("**D**", "D"),
        ("B) because air sinks.", "B"),
        (r"\boxed{A}", "A"),
        (r"So we get $\boxed{\text{(C)}}$.", "C"),
        ("a", "A"),
        ("A.", "A"),
        ("(c)", "C"),
        ("I would choose option C", "C"),
        ("I'd go with B, since it rains.", "B"),
        ("the correct answer is B, not A", "B"),
        ("A is wrong because fog is not dry, so the answer is C", "C"),
        ("Option A is incorrect, so the correct option is B.", "B"),
        ("The answer is 2", "2"),
        ("I pick option 3.", "3"),
        ("2", "2"),
        ("The answer is 2 apples", None),
        ("The answer is 2.5", None),
        ("The answer is 3 + 4", None),
        ("A dog barks.", None),
        ("I think that a dog barks.", None),
        ("I", "I"),
        ("The answer is a dog.", None),
        ("The answer is A because dogs bark.", "A"),
        ("The answer is I think B.", "B"),
        ("**Answer:** B", "B"),
        ("**Final Answer**\n\n(D) tornado", "D"),
        ("Answer:\n\nB. rain", "B"),
        ("answer is b", "B"),
        ("The best answer is: “C”.", "C"),
        ("The answer to this question, based on the text, is B.", "B"),
        ("The answer would be option D: tornado.", "D"),
        ("The answer is most likely B.", "B"),
        ("B is the most likely answer.", "B"),
        ("Therefore, (B) rain is the correct answer.", "B"),
        ("A is wrong and B is correct.", "B"),
        ("A) fog is not right. B) rain is right.", "B"),
        ("C is the right idea, but it is too simple.", None),
        ("The answer is not A but B.", "B"),
        ("The answer cannot be A.", None),
        ("The answer isn't A; it is B.", "B"),
        ("If the answer is A, it never rains.", None),
        ("The wrong answer is A.", None),
        ("I would not choose C.", None),
        ("Is the answer B?", None),
        ("The answer is A. Wait, no: the answer is D.", "D"),
        ("The answer is A and C.", None),
        ("The answers are B, C and D.", None),
        ("The answer is B, I think.", "B"),
        ("The answer is B and A is wrong.", "B"),
        ("The answer is vitamin B12.", None),
        ("The answer is B-cells.", None),
        ("The grade is A+. The answer is A+.", None),
        ("The answer is e.g. a dog", None),
        (LISTED, None),
        ("Answer choices: " + LISTED, None),
        (LISTED + "The answer is C.", "C"),
        (LISTED + "\nC) drought", "C"),
        ("C) drought\n\nA) is wet. \nB) is wet.\nD) has wind.", "C"),
        ("Air sinks, so no cloud can form.\n\nC", "C"),
        ("**C) drought**, as air sinks", "C"),
        ("High pressure keeps it dry (C) for weeks.", "C"),
        ("Dry air fits option C, while others are wet.", "C"),
        ("Dry air fits (C), wet air fits (B).", None),
        ("The most likely result is C) drought.", "C"),
        ("It must be D.", "D"),
        ("Steps:\n1. read\n2. think\n3.", None),
        ("It is a question of taste.", None),
        ("", None),
        ("42", None),
    ],
)
def test_final_choice(text: str, expected: str | None) -> None:
    assert final_choice(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 42", "42"),
        ("She has 5.\n####  1,234\nThat took 3 steps.", "1234"),
        ("The answer is 42.", "42"),
        ("The answer is **42** apples out of 50.", "42"),
        ("Final answer: $1,234.50.", "1234.5"),
        ("The answer is \\$18 per day.", "18"),
        ("Answer: \u22123 °C", "-3"),
        ("The answer is -$5.", "-5"),
        ("The answer is $-5$.", "-5"),
        ("+3", "3"),
        ("12 - 5", "5"),
        ("It is 12 -5", "5"),
        (r"\boxed{42}", "42"),
        (r"Hence $\boxed{\$1{,}234}$, in 2 steps.", "1234"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"-\frac{3}{4}", "-3/4"),
        (r"2\dfrac{1}{2}", "5/2"),
        (r"\boxed{x = 7}", "7"),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{42 \text{ cm}^2}", "42"),
        ("He ate 3/4 of it", "3/4"),
        ("2 1/2 cups", "5/2"),
        ("2½ cups", "5/2"),
        ("half of 0 is 1/0", "0"),
        ("50%", "50"),
        ("€ 7.25", "7.25"),
        ("£1,000,000", "1000000"),
        ("5 million people", "5000000"),
        ("1.5e3", "1500"),
        (".5", "0.5"),
        ("It weighs 20kg", "20"),
        ("25 m² or 25 cm^2", "25"),
        ("She sold 48/2 = <<48/2=24>>24 clips and 48+24 = $<<48+24=72>>72.", "72"),
        ("3 + 4 = 7. She bought them in 2 days.", "7"),
        ("In 2 days he makes 3 * 4", "4"),
        ("The answer is 5 + 3 = 8.", "8"),
        ("The answer is 5-3=2", "2"),
        ("The answer is 5 + 3", None),
        ("The answer is that 12 people paid 5 dollars, 60 in total.", "60"),
        ("The answer is 5, because x = 2.", "5"),
        ("The answer is not 5 but 6.", "6"),
        ("The answer to question 5 is 12.", "12"),
        ("The answer is 4. No, wait. The answer is 6.", "6"),
        ("Answer 42: the sum of 40 and 2", "42"),
        ("Answer: let us see.\n7 - 1 = 6", "6"),
        ("**Final Answer**\n\n42", "42"),
        ("1. She has 5.\n2. She eats two.\n3. The rest stays.", "5"),
        ("42. This follows.", "42"),
        ("1. One", "1"),
        ("Step 1: add 2 to get eight. Step 2: stop.", "2"),
        ("On the 3rd day, 8 came 1st", "8"),
        ("H2O has 3 atoms, see B12", "3"),
        ("She has 12 by 3:30 pm on 2024-05-01", "12"),
        ("The answer is 3:30 pm", None),
        ("The answer is 10-20 days", None),
        ("The answer is 1,5", None),
        ("Version 1.2.3", None),
        ("1,2,3", None),
        ("forty-two", "42"),
        ("", None),
        ("1 234 567", "1234567"),
        ("٤٢", "42"),
        ("x >= 5, y is 2", "2"),
        ("9" * 5000, None),
    ],
)
def test_final_number(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Fraction(expected))


RESTATED = "To find the answer, let's restate it.\n\n**Problem:** Tom has 5 apples and buys 2.\n\n5 + 2 = 7\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{RESTATED}The answer is 7.", "7"),
        (f"{RESTATED}The answer is 7.\n\nProblem: And 3 more?\nThe answer is 10.", "7"),
        ("Let's find the answer step by step.\n\nProblem: 3 boxes of 4.\n3*4 = 12\n#### 12", "12"),
        ("Let's find the answer:\n\nProblem: 3 boxes of 4.\n3*4 = 12\n#### 12", "12"),
        ("The answer is\n\nQuestion: 3 boxes of 4?\n#### 12", "12"),
        ("Answer: 12\n\nQuestion: 3 more?\nAnswer: 15", "12"),
        ("Answer:\n12\n\nQ: 3 more?\nAnswer: 15", "12"),
        ("Answer 12\n\nQ: 3 more?\nAnswer 15", "12"),
    ],
)
def test_a_question_that_is_restated_before_an_answer_is_no_next_one(text: str, expected: str) -> None:
    assert final_number(text) == Fraction(expected)


def test_a_choice_is_read_behind_a_restated_question() -> None:
    text = "To answer the question, think.\nQuestion: what falls?\nSnow falls. The answer is B."
    assert final_choice(text, labels="ABCD", texts=["fog", "snow", "drought", "tornado"]) == "B"
    text += "\nQuestion: and what blows?\nThe answer is D."
    assert final_choice(text, labels="ABCD", texts=["fog", "snow", "drought", "tornado"]) == "B"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 40 minutes. He has to wait 40 minutes, so it is 5 minutes more than last time.", 40),
        ("The answer is 12. They had to wait in line for 3 minutes; it is 3 minutes longer.", 12),
        ("The answer is $18.\nIf they wait 10 days, it is 10 times more.", 18),
        ("The answer is 18. Wait times vary: it is 10 on Sundays.", 18),
        ("The answer is 4. The cashier made a mistake; it is 3 dollars.", 4),
        ("The answer is 4. He was sorry, because it is 3 miles to the shop.", 4),
        ("The answer is 4. Wait, it should be 5.", 5),
        ("The answer is 4. Oh no, wait! That is off: it is 5.", 5),
        ("The answer is 4 - sorry, it is 5.", 5),
        ("The answer is 4. **Wait**, it's 5.", 5),
        ("The answer is 4. Wait a minute, it is 6.", 6),
        ("The answer is 4. I made a mistake. It should be 6.", 6),
        ("The answer is 4. Sorry, that's wrong. It must be 6.", 6),
    ],
)
def test_only_who_takes_an_answer_back_corrects_it(text: str, expected: int) -> None:
    assert final_number(text) == expected


@pytest.mark.parametrize(
    ("kind", "first", "second", "same"),
    [
        ("number", "4", "The answer is 4.0.", True),
        ("number", "8/2", "#### 4", True),
        ("number", "0.1", "1/10", True),
        ("number", "4", "-4", False),
        ("number", "none", "none", False),
        ("number", "4", "four", True),
        ("number", "4", "for", False),
        ("choice", "B", "The answer is (b).", True),
        ("choice", "B", "C", False),
        ("choice", "It rains.", "It rains.", False),
    ],
)
def test_same_final_answer(kind: str, first: str, second: str, same: bool) -> None:
    assert same_final_answer(kind, first, second) is same  # type: ignore[arg-type]
    assert same_final_answer(kind, second, first) is same  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "frame",
    ["{}", "The answer is {}.", "**{}**", "#### {}", r"\boxed{{{}}}", "It took 3 steps: x = {} in all 2 ways.", "€{}"],
)
@given(st.decimals(min_value=-(10**12), max_value=10**12, places=3), st.booleans())
def test_final_number_reads_what_was_formatted(frame: str, value: Decimal, with_commas: bool) -> None:
    assert final_number(frame.format(f"{value:,f}" if with_commas else f"{value:f}")) == Fraction(value)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_final_number_reads_fractions_exactly(numerator: int, denominator: int) -> None:
    expected = Fraction(numerator, denominator)
    assert final_number(f"The answer is {numerator}/{denominator}.") == expected
    assert final_number(rf"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}") == expected


@given(st.sampled_from("ABCDEFGHJ"), st.sampled_from(["The answer is {}", "({})", "Answer: **{}**.", "{}) rain"]))
def test_final_choice_wins_as_the_last_statement(letter: str, frame: str) -> None:
    assert final_choice(frame.format(letter)) == letter
    assert final_choice("The answer is A.\nNo, that was wrong.\nThe answer is " + letter) == letter


@given(
    st.lists(st.sampled_from([*"AbI 120/.,:-=+%$()*{}#<?\n", "answer is", "\\frac{", "\\boxed{", " 1", "not ", "B) "]))
)
def test_no_text_breaks_the_readers(parts: list[str]) -> None:
    text = "".join(parts)
    assert same_final_answer("choice", text, text) == (final_choice(text) is not None)
    assert same_final_answer("number", text, text) == (final_number(text) is not None)


@pytest.mark.parametrize(
    "unit",
    ["1", "1,", "1.", "1/", "1-", "1:", "1,111", " ", "\n", "A", "A ", "(", "answer ", "answer is ", "= ", "#", "<<",
     "*", "A) ", "A) fog\n", "\\boxed{", "\\frac{", "-", "$", "the option ", "not ", "e1", ".", "A, ", "1 1/", "x_{"],
)  # fmt: skip
def test_long_responses_take_linear_time(unit: str) -> None:
    # A quadratic pattern would run for minutes here and trip the suite's time limit.
    text = unit * (200_000 // len(unit))
    final_choice(text + "?")
    final_number(text + "?")
