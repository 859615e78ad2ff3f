"""Beyond length and verbatim copies: prefixes, copies, equal lengths and echo shares against plain loops and matrices.

python -m pytest tests/unit/evaluation/held_out/test_effects.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.held_out.effects import (
    ScoredAnswers,
    TokenScores,
    at_equal_length,
    echo_values,
    effect_columns,
    matched_changes,
    paired_answers,
)
from mipo_ray.evaluation.intervals import bootstrap_mean
from mipo_ray.evaluation.resampling import Clusters, Rows, interval, resampler

seeds = st.integers(0, 2**32 - 1)


def token_scores(generator: np.random.Generator, tokens: int, *, with_context: bool = True) -> TokenScores:
    """Random log-probs of a response of so many tokens, of which about a third copy."""
    own, none = (-generator.exponential(size=tokens).astype(np.float32) for _ in range(2))
    others = -generator.exponential(size=(3, tokens)).astype(np.float32)
    return TokenScores(own, others, none if with_context else None, generator.random(tokens) < 0.3)


def plain_pmi(kind: str, scores: TokenScores, places: Sequence[int]) -> float:
    """What the tokens at these places add to the PMI of those before them, by sums over Python's numbers."""
    return sum(prefix_pmi(kind, scores, place + 1) - prefix_pmi(kind, scores, place) for place in places)


def prefix_pmi(kind: str, scores: TokenScores, length: int) -> float:
    own = sum(map(float, scores.own[:length]))
    if kind == "context_pmi":
        assert scores.none is not None
        return own - sum(map(float, scores.none[:length]))
    others = [sum(map(float, row[:length])) for row in scores.others]
    return own - math.log(sum(map(math.exp, others)) / len(others))


def test_copied_and_other_tokens_add_up_and_equal_ones_have_equal_shares() -> None:
    """Under one other prompt the first token is unlikely, under the second one the second: each is worth half."""
    others = np.array([[-10.0, -1.0], [-1.0, -10.0]])
    scores = TokenScores(np.zeros(2), others, None, np.array([True, False]))
    whole = scores.pmi(slice(None))
    assert whole == pytest.approx(11.0)
    assert scores.pmi(scores.copied) + scores.pmi(~scores.copied) == pytest.approx(whole)


def answers(kind: str, tokens: Sequence[TokenScores], prompts: Sequence[str]) -> ScoredAnswers:
    whole = np.array([plain_pmi(kind, one, range(len(one.own))) for one in tokens])
    return ScoredAnswers(kind, prompts, whole, np.array([float(len(one.own)) for one in tokens]), tokens)


kinds = pytest.mark.parametrize("kind", ["context_pmi", "pmi"])
PROMPTS = ["a", "a", "b", "b", "c", "c", "d", "d"]


@kinds
@settings(deadline=None)
@given(seeds)
def test_prefixes_and_copies_agree_with_loops(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    new, old = (
        [token_scores(generator, int(length)) for length in generator.integers(0, 9, size=len(PROMPTS))] for _ in "ab"
    )
    policy, base = answers(kind, new, PROMPTS), answers(kind, old, PROMPTS)
    matched = matched_changes(policy, base)
    for prompt in "abcd":
        rows = [row for row, name in enumerate(PROMPTS) if name == prompt]
        changes = []
        for row in rows:
            shorter = range(min(len(new[row].own), len(old[row].own)))
            changes.append(plain_pmi(kind, new[row], shorter) - plain_pmi(kind, old[row], shorter))
        assert matched[prompt] == pytest.approx(sum(changes) / 2, abs=1e-5)
    free = [plain_pmi(kind, one, [place for place, copied in enumerate(one.copied) if not copied]) for one in new]
    assert policy.without_copies() == pytest.approx(np.array(free), abs=1e-5)
    columns = effect_columns(policy, base)
    groups, values = columns[f"{kind}_matched"]
    before = [np.mean([base.pmi[row] for row, name in enumerate(PROMPTS) if name == prompt]) for prompt in groups]
    assert values - before == pytest.approx([matched[prompt] for prompt in groups])


def test_answers_are_compared_in_their_order_and_only_where_both_have_some() -> None:
    assert paired_answers(["b", "a", "b", "c", "b"], ["a", "b", "b", "d"]) == [(0, 1), (1, 0), (2, 2)]


def test_equal_answers_have_no_effect() -> None:
    tokens = [token_scores(np.random.default_rng(row), 5) for row in range(8)]
    same = answers("pmi", tokens, PROMPTS)
    columns = effect_columns(same, same)
    assert columns.keys() == {"pmi_copy_free", "pmi_adjusted", "pmi_matched"}  # and no echo of no rise
    plain = effect_columns(same, None)
    assert columns["pmi_matched"][1].mean() == pytest.approx(plain["pmi_matched"][1].mean())
    assert columns["pmi_adjusted"][1].mean() == pytest.approx(same.pmi.mean())


def test_what_an_earlier_version_did_not_keep_is_left_out() -> None:
    tokens = [token_scores(np.random.default_rng(row), 5 + row) for row in range(8)]
    new = answers("pmi", tokens, PROMPTS)
    old = ScoredAnswers("pmi", PROMPTS, new.pmi - 1.0, new.lengths - 2.0, None)
    assert effect_columns(old, None).keys() == {"pmi_adjusted"}
    # All lengths change by 2 tokens: nobody knows what would be at equal length.
    assert effect_columns(new, old).keys() == {"pmi_copy_free"}


# The change at equal length

numbers = st.lists(st.tuples(st.floats(-50, 50), st.integers(-40, 40)), min_size=4, max_size=20)


@settings(deadline=None)
@given(numbers)
def test_the_effect_at_equal_length_is_the_intercept_of_least_squares(pairs: list[tuple[float, int]]) -> None:
    changes, longer = (np.array([pair[side] for pair in pairs], dtype=np.float64) for side in (0, 1))
    values = at_equal_length(changes, longer)
    if len(set(longer.tolist())) == 1:
        assert (values is None) == bool(longer[0])
        return
    design = np.stack([np.ones(len(longer)), longer], axis=1)
    fitted = np.linalg.lstsq(design, changes, rcond=None)[0]
    scale = 1 + np.abs(changes).max() * 100
    assert values is not None
    assert values.mean() == pytest.approx(fitted[0], abs=1e-9 * scale)
    # The variance of the mean of the values is that of White's estimator (1980) with n / (n - 2), written as matrices.
    residuals = changes - design @ fitted
    bread = np.linalg.inv(design.T @ design)
    white = bread @ (design.T * residuals**2) @ design @ bread * len(longer) / (len(longer) - 2)
    rows = Rows(np.stack([values, np.ones(len(values))], axis=1))
    assert rows.samples(10, resampler(0))[1] == pytest.approx(white[0, 0], rel=1e-6, abs=1e-12 * scale**2)


def test_where_no_length_changes_the_change_is_that_at_equal_length() -> None:
    changes = np.array([1.0, 4.0])
    assert at_equal_length(changes, np.zeros(2)) is changes
    assert at_equal_length(changes, np.array([1.0, 2.0])) is None  # a line through two points leaves nothing over
    assert at_equal_length(np.ones(5), np.full(5, 1 / 3)) is None


@pytest.mark.parametrize("effects", [0.0, 1.0], ids=["rows alone", "users and questions"])
def test_its_interval_holds_the_truth_95_times_of_100(effects: float) -> None:
    generator, covered, trials = np.random.default_rng(3), 0, 300
    for trial in range(trials):
        user, question = (part.ravel() for part in np.indices((24, 28)))
        kept = generator.random(user.size) < 0.15
        user, question = user[kept], question[kept]

        def shared(user: np.ndarray = user, question: np.ndarray = question) -> np.ndarray:
            return effects * (generator.normal(size=24)[user] + generator.normal(size=28)[question])

        longer = np.round(6 + 3 * shared() + generator.exponential(10, size=len(user)) - 10)
        changes = 2 + 0.3 * longer + shared() + generator.normal(0, 3, size=len(user))
        values = at_equal_length(changes, longer)
        assert values is not None
        numbered = [np.unique(labels, return_inverse=True)[1] for labels in (user, question)]
        rows = Rows(np.stack([values, np.ones(len(values))], axis=1), *numbered)
        found = interval(rows.value, *rows.samples(200, resampler(trial)))
        covered += found.low <= 2 <= found.high
    assert 0.92 <= covered / trials <= 0.98


# The echo share


def test_an_echo_counted_by_hand() -> None:
    # The PMI rises by 2 and 6; without copies by 1 and 1: of 8 nats 6 sit in copies.
    values = echo_values(np.array([2.0, 6.0]), np.array([1.0, 1.0]))
    assert values is not None
    assert values.mean() == 0.75
    # Without copies it fell: more than all of the rise sits in them. And the other way round.
    more, less = (echo_values(np.array([2.0, 2.0]), np.full(2, free)) for free in (-1.0, 3.0))
    assert more is not None
    assert less is not None
    assert (more.mean(), less.mean()) == (1.5, -0.5)


@pytest.mark.parametrize("changes", [[-1.0, 0.5], [0.0, 0.0], [1.0, -1.0]])
def test_without_a_rise_there_is_no_echo(changes: list[float]) -> None:
    assert echo_values(np.array(changes), np.array([5.0, -9.0])) is None


@settings(deadline=None)
@given(seeds)
def test_the_echo_varies_as_the_ratio_does(seed: int) -> None:
    """Against the ratio's derivative by the weight of each prompt, taken numerically."""
    generator = np.random.default_rng(seed)
    changes, free = generator.normal(4, 3, size=12), generator.normal(1, 3, size=12)
    values = echo_values(changes, free)
    if changes.mean() <= 0.2:
        return
    assert values is not None

    def ratio(weights: np.ndarray) -> float:
        return float(1 - (weights * free).sum() / (weights * changes).sum())

    step = 1e-6
    moved = [(ratio(np.ones(12) + step * row) - ratio(np.ones(12) - step * row)) / (2 * step) for row in np.eye(12)]
    assert (values - values.mean()) / 12 == pytest.approx(np.array(moved), rel=1e-4, abs=1e-6)


def test_the_interval_of_an_echo_is_over_users_and_questions() -> None:
    generator = np.random.default_rng(1)
    names = [f"p{row}" for row in range(40)]
    clusters = Clusters({name: f"u{row % 20}" for row, name in enumerate(names)}, dict.fromkeys(names, "q"))
    values: Any = echo_values(generator.normal(5, 2, size=40), generator.normal(3, 2, size=40))
    found = bootstrap_mean(values, names, samples=200, seed=0, clusters=clusters)
    assert (found.n, found.users) == (40, 20)
    assert found.low < found.value < found.high
