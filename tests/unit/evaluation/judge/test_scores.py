"""From judgements to win, tie, loss and ratings.

python -m pytest tests/unit/evaluation/judge/test_scores.py
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.scores import (
    Judgement,
    check_readable,
    describe_judgement,
    outcome,
    pair_outcome,
    pairwise_metrics,
    pointwise_metrics,
)

BOOTSTRAP = {"samples": 500, "seed": 0}


def judged(say: Callable[[str, int, str], str | None], prompts: int = 40, samples: int = 2) -> list[Judgement]:
    """Judgements of every pair in both orders by a judge that says `say(prompt, sample, order)`."""
    return [
        Judgement(f"p{prompt}", sample, order, say(f"p{prompt}", sample, order))
        for prompt in range(prompts)
        for sample in range(samples)
        for order in ("base_first", "policy_first")
    ]


def prefers(winner: str, order: str) -> str:
    """What a judge says, by position, that prefers the answer of `winner`, whatever the order."""
    return "first" if order == f"{winner}_first" else "second"


def half_ties(metrics: dict) -> float:
    return metrics["win"].value + metrics["tie"].value / 2


def test_a_judge_that_always_says_first_wins_nothing_and_gives_half() -> None:
    metrics = pairwise_metrics(judged(lambda *_: "first"), **BOOTSTRAP)
    assert (metrics["win"].value, metrics["tie"].value, metrics["loss"].value) == (0.0, 1.0, 0.0)
    assert half_ties(metrics) == 0.5
    assert metrics["net_win"].value == metrics["net_win"].change == 0.0
    assert metrics["net_win"].verdict == "not distinguishable"
    assert metrics["position_bias"].value == 0.5
    assert metrics["self_consistency"].value == 0.0


def test_a_judge_that_always_says_second_has_the_opposite_bias() -> None:
    metrics = pairwise_metrics(judged(lambda *_: "second"), **BOOTSTRAP)
    assert half_ties(metrics) == 0.5
    assert metrics["position_bias"].value == -0.5


@pytest.mark.parametrize(("winner", "net", "verdict"), [("policy", 1.0, "better"), ("base", -1.0, "worse")])
def test_a_judge_that_prefers_one_policy_in_both_orders(winner: str, net: float, verdict: str) -> None:
    metrics = pairwise_metrics(judged(lambda _, __, order: prefers(winner, order)), **BOOTSTRAP)
    assert metrics["net_win"].value == metrics["net_win"].low == metrics["net_win"].change_high == net
    assert metrics["net_win"].verdict == verdict
    assert metrics["position_bias"].value == 0.0
    assert metrics["self_consistency"].value == 1.0
    assert metrics["unreadable"].value == 0.0
    assert {entry.n for entry in metrics.values()} == {40}


def test_a_judge_that_throws_a_coin_is_not_distinguishable() -> None:
    coin = random.Random(7)
    metrics = pairwise_metrics(judged(lambda *_: coin.choice(["first", "second"]), prompts=200), **BOOTSTRAP)
    assert metrics["net_win"].verdict == "not distinguishable"
    assert metrics["net_win"].low < 0 < metrics["net_win"].high
    assert 0.4 < metrics["tie"].value < 0.6  # the two orders contradict each other half of the time
    assert 0.4 < metrics["self_consistency"].value < 0.6
    assert abs(metrics["position_bias"].value) < 0.1


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("win", "win"), "win"),
        (("loss", "loss"), "loss"),
        (("tie", "tie"), "tie"),
        (("win", "loss"), "tie"),
        (("win", "tie"), "tie"),
        (("tie", "loss"), "tie"),
        (("win", None), "tie"),
        ((None, "loss"), "tie"),
        ((None, None), "tie"),
    ],
)
def test_a_pair_is_decided_only_where_both_orders_agree(outcomes, expected) -> None:
    assert pair_outcome(outcomes) == pair_outcome(outcomes[::-1]) == expected


def test_outcomes_are_seen_from_the_side_of_the_policy() -> None:
    assert outcome(Judgement("p", 0, "policy_first", "first")) == "win"
    assert outcome(Judgement("p", 0, "policy_first", "second")) == "loss"
    assert outcome(Judgement("p", 0, "base_first", "first")) == "loss"
    assert outcome(Judgement("p", 0, "base_first", "second")) == "win"
    assert outcome(Judgement("p", 0, "base_first", "tie")) == "tie"
    assert outcome(Judgement("p", 0, "base_first", None)) is None


def test_an_unreadable_order_makes_its_pair_a_tie_and_is_counted() -> None:
    def say(prompt: str, _: int, order: str) -> str | None:
        return None if prompt == "p0" and order == "base_first" else prefers("policy", order)

    metrics = pairwise_metrics(judged(say, prompts=4, samples=1), **BOOTSTRAP)
    assert (metrics["win"].value, metrics["tie"].value, metrics["loss"].value) == (0.75, 0.25, 0.0)
    assert metrics["unreadable"].value == 1 / 8
    assert (metrics["self_consistency"].value, metrics["self_consistency"].n) == (1.0, 3)


def test_figures_that_nothing_was_measured_of_are_absent() -> None:
    ties = pairwise_metrics(judged(lambda *_: "tie"), **BOOTSTRAP)
    assert "position_bias" not in ties
    assert ties["self_consistency"].value == 1.0
    halves = pairwise_metrics(judged(lambda _, __, order: "tie" if order == "base_first" else None), **BOOTSTRAP)
    assert "self_consistency" not in halves
    assert halves["unreadable"].value == 0.5


SAID = st.sampled_from(["first", "second", "tie", None])


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=12))
def test_shares_add_up_and_swapping_the_policies_swaps_wins_and_losses(pairs) -> None:
    judgements = [
        Judgement(f"p{index}", 0, order, said)
        for index, pair in enumerate(pairs)
        for order, said in zip(("base_first", "policy_first"), pair, strict=True)
    ]
    swapped = [
        Judgement(item.prompt_id, 0, "base_first" if item.order == "policy_first" else "policy_first", item.parsed)
        for item in judgements
    ]
    metrics, other = (pairwise_metrics(items, samples=20, seed=0) for items in (judgements, swapped))
    assert metrics["win"].value + metrics["tie"].value + metrics["loss"].value == pytest.approx(1)
    assert metrics["win"].value == other["loss"].value
    assert metrics["net_win"].value == pytest.approx(-other["net_win"].value)
    bias, turned = metrics.get("position_bias"), other.get("position_bias")
    assert (bias and bias.value) == (turned and turned.value)
    wins = sum(pair == ("second", "first") for pair in pairs)
    assert metrics["win"].value == pytest.approx(wins / len(pairs))


def test_a_pair_without_both_orders_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 'p0', sample 0: expected each order once, found base_first"):
        pairwise_metrics([Judgement("p0", 0, "base_first", "first")], **BOOTSTRAP)


def ratings(*values: int | None) -> list[Judgement]:
    return [Judgement(f"p{index}", 0, "", None if value is None else str(value)) for index, value in enumerate(values)]


def test_ratings_are_averaged_and_compared_by_prompt() -> None:
    base = pointwise_metrics(ratings(1, 2, 3, None), None, **BOOTSTRAP)
    assert (base["rating"].value, base["rating"].n) == (2.0, 3)
    assert (base["rating"].unit, base["rating"].interval) == ("points", "bootstrap")
    assert base["rating"].change is None
    assert base["unreadable"].value == 0.25
    metrics = pointwise_metrics(ratings(2, 3, None, 5), ratings(1, 2, 3, None), **BOOTSTRAP)
    assert metrics["rating"].value == pytest.approx(10 / 3)
    # Two prompts were rated on both sides, both one point higher.
    assert (metrics["rating"].change, metrics["rating"].verdict) == (1.0, "better")
    apart = pointwise_metrics(ratings(None, 3), ratings(2, None), **BOOTSTRAP)
    assert apart["rating"].change is None


def test_a_judge_that_cannot_be_read_is_refused_with_what_it_said() -> None:
    judgements = judged(lambda prompt, _, __: None if prompt != "p0" else "tie", prompts=3, samples=1)
    texts = ["Verdict: tie", "Verdict: tie", *["blah " * 200, "No.", "Hm", "Well"]]
    with pytest.raises(UserError) as error:
        check_readable(judgements, texts, "round 0  pairwise by org/judge", "/runs/x/judge")
    message = str(error.value)
    assert message.startswith("round 0  pairwise by org/judge: 4 of 6 judgements name no verdict that can be read")
    assert "more than 50%. The judge must end with a line such as" in message
    assert "remove /runs/x/judge" in message
    assert "prompt 'p1': 'blah blah" in message
    assert "prompt 'p2': 'Hm'" in message
    assert "Well" not in message
    assert max(map(len, message.splitlines()[1:])) < 340
    with pytest.raises(UserError, match="2 of 2 judgements name no verdict"):
        check_readable(ratings(None, None), ["", ""], "base", "")


def test_a_judge_of_which_half_can_be_read_is_taken() -> None:
    check_readable(ratings(None, 3), ["", ""], "base", "")
    with pytest.raises(UserError, match="2 of 3 judgements"):
        check_readable(ratings(None, None, 3), ["", "", ""], "base", "")


def test_the_line_for_people_says_what_was_found() -> None:
    wins = pairwise_metrics(judged(lambda _, __, order: prefers("policy", order)), **BOOTSTRAP)
    assert describe_judgement(wins) == (
        "win 1.000, tie 0.000, loss 0.000; win - loss +1.000 [+1.000, +1.000]: better; unreadable 0.000"
    )
    rated = pointwise_metrics(ratings(4, 4), ratings(2, 2), **BOOTSTRAP)
    assert describe_judgement(rated) == (
        "mean rating 4.00 [4.00, 4.00] of 5, change from the base +2.00 [+2.00, +2.00]: better; unreadable 0.000"
    )
    assert describe_judgement(pointwise_metrics(ratings(3, 3), None, **BOOTSTRAP)) == (
        "mean rating 3.00 [3.00, 3.00] of 5; unreadable 0.000"
    )
