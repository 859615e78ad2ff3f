"""Several answers compared two by two: against a plain count of wins.

python -m pytest tests/unit/judge/test_comparisons.py
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.judge import JudgeConfig
from mipo_ray.judge.comparisons import comparison_prompts, net_wins
from mipo_ray.judge.prompts import judge_prompt
from tests.helpers.fake_judge_endpoint import shown

ROW = {"question_messages": [{"role": "user", "content": "Which tea?"}], "context": "likes mint"}


@given(st.lists(st.integers(0, 4), min_size=2, max_size=5))
def test_a_judge_with_an_opinion_ranks_by_it(worth: list[int]) -> None:
    """Each answer's net wins are those that its worth has against the others'; equal ones tie."""
    said = []
    for one, other in itertools.permutations(worth, 2):
        said.append("Verdict: A" if one > other else "Verdict: B" if other > one else "Verdict: tie")
    assert net_wins(said, len(worth)) == [
        sum((mine > yours) - (mine < yours) for yours in worth) for mine in map(float, worth)
    ]


@given(st.integers(2, 5))
def test_a_judge_that_likes_what_stands_first_says_nothing(answers: int) -> None:
    assert net_wins(["Verdict: A"] * (answers * (answers - 1)), answers) == [0.0] * answers


def test_one_order_that_cannot_be_read_decides_nothing() -> None:
    assert net_wins(["Verdict: A", "who knows"], 2) == [0.0, 0.0]
    assert net_wins(["hm", "who knows"], 2) == [None, None]


def test_another_number_of_judgements_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        net_wins(["Verdict: A"], 2)


def test_every_two_answers_are_shown_in_both_orders() -> None:
    prompts = comparison_prompts(judge_prompt(JudgeConfig(), "pairwise"), ROW, ["mint", "black", "green"])  # type: ignore[arg-type]
    pairs = [(shown(prompt, "ANSWER A"), shown(prompt, "ANSWER B")) for prompt in prompts]
    assert pairs == list(itertools.permutations(["mint", "black", "green"], 2))
    assert all("likes mint" in prompt and "Which tea?" in prompt for prompt in prompts)
