"""The final answer of a response: an option of a multiple-choice question, or a number."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from mipo_ray.final_choices import final_choice
from mipo_ray.final_numbers import final_number

__all__ = ["final_choice", "final_number", "gold_number", "same_final_answer"]


def gold_number(answer: str | float) -> Fraction:
    """The number of a data set's own answer: "... #### 1,234" of GSM8K, 51.0 of SVAMP, "3/4".

    Answers are compared with it exactly (Fractions, no tolerance): a tolerance would be wrong for large amounts, and
    what rounds is the question's business. 0.1 as a float counts as one tenth.

    Raises:
        ValueError: there is no number in it.
    """
    found = final_number(str(answer).rpartition("####")[2])
    if found is None:
        raise ValueError(f"expected an answer that ends on a number, found {answer!r}")
    return found


def same_final_answer(kind: Literal["choice", "number"], first: str, second: str) -> bool:
    """Whether two responses both have a final answer, and the same one; 4, 4.0 and 8/2 are the same number."""
    read: Callable[[str], str | Fraction | None] = final_choice if kind == "choice" else final_number
    answer = read(first)
    return answer is not None and answer == read(second)
