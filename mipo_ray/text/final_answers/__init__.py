"""The final answer of a response: an option of a multiple-choice question, or a number."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from mipo_ray.text.final_answers.choices import final_choice
from mipo_ray.text.final_answers.numbers import final_number

__all__ = ["RULES", "final_choice", "final_number", "same_final_answer"]

# Raised when a reader of final answers changes: results of different rules are not compared.
RULES = 3


def same_final_answer(kind: Literal["choice", "number"], first: str, second: str) -> bool:
    """Whether two responses both have a final answer, and the same one; 4, 4.0 and 8/2 are the same number."""
    read: Callable[[str], str | Fraction | None] = final_choice if kind == "choice" else final_number
    answer = read(first)
    return answer is not None and answer == read(second)
