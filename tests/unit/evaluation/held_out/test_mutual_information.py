"""Mutual information per response: against enumeration of a known joint, exact arithmetic and plain loops."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.held_out import mutual_information as mi

# p(y | x) of three prompts (rows) over four one-token responses, and p(x).
CONDITIONAL = np.array([[0.7, 0.1, 0.1, 0.1], [0.05, 0.8, 0.05, 0.1], [0.2, 0.2, 0.5, 0.1]])
PRIOR = np.array([0.5, 0.3, 0.2])


def exact_mutual_information() -> float:
    """I(x; y) = H(y) - H(y | x), by enumeration of the joint."""
    marginal = PRIOR @ CONDITIONAL
    entropy = -sum(p * math.log(p) for p in marginal)
    conditional_entropy = -sum(
        PRIOR[x] * CONDITIONAL[x, y] * math.log(CONDITIONAL[x, y]) for x in range(3) for y in range(4)
    )
    return entropy - conditional_entropy


def joint_with_others(others: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every (x, y, x_1..x_K) of the joint: its probability, own log-prob and other log-probs."""
    cases = list(itertools.product(range(3), range(4), *[range(3)] * others))
    weights = np.array([PRIOR[x] * CONDITIONAL[x, y] * math.prod(PRIOR[list(drawn)]) for x, y, *drawn in cases])
    own = np.log([CONDITIONAL[x, y] for x, y, *_ in cases])
    other = np.log([[CONDITIONAL[k, y] for k in drawn] for _, y, *drawn in cases])
    return weights, own, other


def test_pmi_is_mutual_information_when_the_others_are_the_marginal() -> None:
    # Ten others in the proportions of p(x) (5, 3 and 2): their mean is p(y) itself.
    mixture = np.repeat(np.arange(3), (10 * PRIOR).astype(int))
    cases = list(itertools.product(range(3), range(4)))
    own = np.log([CONDITIONAL[x, y] for x, y in cases])
    others = np.log([[CONDITIONAL[k, y] for k in mixture] for _, y in cases])
    weights = np.array([PRIOR[x] * CONDITIONAL[x, y] for x, y in cases])
    mean_pmi = weights @ mi.leave_one_out_pmi(own, others)
    assert mean_pmi == pytest.approx(exact_mutual_information(), abs=1e-12)


@pytest.mark.parametrize("others", [1, 2, 4])
def test_bounds_hold_on_a_known_joint(others: int) -> None:
    weights, own, other = joint_with_others(others)
    tokens = np.ones(len(own))
    exact = exact_mutual_information()
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ mi.leave_one_out_pmi(own, other) >= exact
    assert weights @ mi.infonce_per_token(own, other, tokens) <= min(exact, mi.infonce_ceiling(others))


def test_both_bounds_tighten_with_more_others() -> None:
    upper, lower = [], []
    for others in (1, 2, 3, 4):
        weights, own, other = joint_with_others(others)
        upper.append(weights @ mi.leave_one_out_pmi(own, other))
        lower.append(weights @ mi.infonce_per_token(own, other, np.ones(len(own))))
    assert upper == sorted(upper, reverse=True)
    assert lower == sorted(lower)


def exact_log_mean_exp(values: list[float]) -> float:
    """log(mean(exp(values))) in 60-digit decimal arithmetic."""
    with localcontext() as context:
        context.prec = 60
        return float((sum((Decimal(value).exp() for value in values), Decimal(0)) / len(values)).ln())


log_probs = st.floats(-3000.0, 0.0)
scored = st.integers(1, 4).flatmap(
    lambda k: st.lists(
        st.tuples(log_probs, st.lists(log_probs, min_size=k, max_size=k), st.integers(1, 60)), min_size=1, max_size=5
    )
)


def columns(rows: list[tuple[float, list[float], int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    own, others, tokens = zip(*rows, strict=True)
    return np.array(own), np.array(others), np.array(tokens)


@settings(deadline=None)
@given(scored)
def test_pmi_and_infonce_agree_with_decimal_arithmetic(rows: list[tuple[float, list[float], int]]) -> None:
    own, others, tokens = columns(rows)
    pmi = mi.leave_one_out_pmi(own, others)
    per_token = mi.leave_one_out_pmi_per_token(own, others, tokens)
    infonce = mi.infonce_per_token(own, others, tokens)
    for row, (own_row, others_row, count) in enumerate(rows):
        assert pmi[row] == pytest.approx(own_row - exact_log_mean_exp(others_row), abs=1e-9)
        assert per_token[row] == pytest.approx(pmi[row] / count)
        scores = [value / count for value in [own_row, *others_row]]
        assert infonce[row] == pytest.approx(scores[0] - exact_log_mean_exp(scores), abs=1e-9)


@settings(deadline=None)
@given(scored, st.floats(-500, 500))
def test_a_shift_of_all_log_probs_changes_nothing(rows: list[tuple[float, list[float], int]], shift: float) -> None:
    own, others, tokens = columns(rows)
    moved = shift * tokens
    np.testing.assert_allclose(
        mi.leave_one_out_pmi(own + moved, others + moved[:, None]), mi.leave_one_out_pmi(own, others), atol=1e-8
    )
    np.testing.assert_allclose(
        mi.infonce_per_token(own + moved, others + moved[:, None], tokens),
        mi.infonce_per_token(own, others, tokens),
        atol=1e-8,
    )


@settings(deadline=None)
@given(scored)
def test_infonce_never_passes_its_ceiling(rows: list[tuple[float, list[float], int]]) -> None:
    own, others, tokens = columns(rows)
    assert (mi.infonce_per_token(own, others, tokens) <= mi.infonce_ceiling(others.shape[1]) + 1e-12).all()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-3, 0), min_size=4, max_size=4), min_size=1, max_size=20))
def test_retrieval_is_a_fair_choice_among_the_likeliest(rows: list[list[int]]) -> None:
    scores = np.array(rows, dtype=float)
    correct = mi.retrieval_correct(scores[:, 0], scores[:, 1:])
    for row, values in enumerate(rows):
        winners = [position for position, value in enumerate(values) if value == max(values)]
        assert correct[row] == ((1 / len(winners)) if 0 in winners else 0.0)


def test_retrieval_over_all_positions_sums_to_one() -> None:
    scores = np.random.default_rng(0).integers(-4, 0, size=(50, 5)).astype(float)
    total = sum(mi.retrieval_correct(scores[:, k], np.delete(scores, k, axis=1)) for k in range(5))
    np.testing.assert_allclose(total, 1.0)


def test_empty_response_has_no_information() -> None:
    zero, others = np.zeros(1), np.zeros((1, 3))
    assert mi.leave_one_out_pmi_per_token(zero, others, [0]) == [0.0]
    assert mi.infonce_per_token(zero, others, [0]) == [0.0]
    assert mi.retrieval_correct(zero, others) == [0.25]
    assert mi.kl_per_token(zero, zero, [0]) == [0.0]


def test_context_pmi_is_the_log_ratio() -> None:
    own, none = np.log([0.5, 0.1]), np.log([0.25, 0.4])
    np.testing.assert_allclose(np.exp(mi.pmi_without_context(own, none)), [2.0, 0.25])


def test_kl_of_one_token_responses_is_the_kl_of_their_distributions() -> None:
    policy, initial = CONDITIONAL[0], CONDITIONAL[2]
    # Responses in exact proportion to the policy: 7, 1, 1 and 1 of ten.
    drawn = np.repeat(np.arange(4), (10 * policy).round().astype(int))
    estimate = mi.kl_per_token(np.log(policy[drawn]), np.log(initial[drawn]), np.ones(10)).mean()
    exact = sum(p * math.log(p / q) for p, q in zip(policy, initial, strict=True))
    assert estimate == pytest.approx(exact)


def test_kl_per_token_weighs_tokens_not_responses() -> None:
    contributions = mi.kl_per_token([-1.0, -30.0], [-2.0, -60.0], [1, 30])
    assert contributions.mean() == pytest.approx((1.0 + 30.0) / 31)


def test_rewards_margin_and_accuracy_on_pairs() -> None:
    chosen = mi.rewards([-10.0, -12.0, -9.0], [-12.0, -10.0, -9.0], beta=0.1)
    rejected = mi.rewards([-20.0, -20.0, -7.0], [-20.0, -20.0, -7.0], beta=0.1)
    np.testing.assert_allclose(chosen, [0.2, -0.2, 0.0])
    np.testing.assert_allclose(mi.reward_margin(chosen, rejected), [0.2, -0.2, 0.0])
    assert mi.reward_accuracy(chosen, rejected).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("own", "others", "tokens", "message"),
    [
        ([-1.0, np.nan], [[-1.0], [-1.0]], [1, 1], "own_logprob: expected finite numbers, found nan at row 1"),
        ([-1.0], [[-np.inf]], [1], "other_logprobs: expected finite numbers, found -inf at row 0"),
        ([-1.0], np.empty((1, 0)), [1], "K >= 1"),
        ([-1.0], [[-1.0], [-2.0]], [1], r"found \(1,\) and \(2, 1\)"),
        ([-1.0], [[-1.0]], [1, 2], r"token_counts: expected shape \(1,\), found \(2,\)"),
        ([-1.0], [[-1.0]], [-1], "found -1 in row 0"),
    ],
)
def test_bad_input_is_named(own: list[float], others: list[list[float]], tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mi.infonce_per_token(own, others, tokens)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="policy_logprob and initial_logprob"):
        mi.rewards([-1.0, -2.0], [-1.0], beta=0.1)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_matrix_agrees_with_a_loop_and_its_diagonal_with_pmi(size: int, seed: int) -> None:
    logprobs = np.random.default_rng(seed).normal(-60.0, 10.0, size=(size, size))
    pmi = mi.pmi_matrix(logprobs)
    for i in range(size):
        others = [logprobs[i, k] for k in range(size) if k != i]
        marginal = math.log(math.fsum(math.exp(other) for other in others) / (size - 1))
        assert pmi[i] == pytest.approx([value - marginal for value in logprobs[i]])
        assert pmi[i, i] == pytest.approx(mi.leave_one_out_pmi([logprobs[i, i]], [others])[0])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        mi.pmi_matrix(np.zeros(shape))
