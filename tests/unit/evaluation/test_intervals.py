"""Intervals over rows: estimates by plain loops; intervals against theory, enumeration and coverage.

Those over users and questions are in test_resampling.py.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.intervals import (
    Estimate,
    bootstrap_change,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_change,
    describe_change,
    with_change,
)
from mipo_ray.storage.entries import Entry

items = st.lists(st.tuples(st.sampled_from("abcde"), st.floats(-100, 100)), min_size=1, max_size=15)


def means_by_group(rows: list[tuple[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(value for group, value in rows if group == name) for name, _ in rows}


@settings(deadline=None)
@given(items, st.randoms(use_true_random=False))
def test_mean_is_the_mean_of_prompt_means_in_any_order(rows: list[tuple[str, float]], shuffler: random.Random) -> None:
    groups, values = [row[0] for row in rows], [row[1] for row in rows]
    estimate = bootstrap_mean(values, groups, samples=200, seed=1)
    expected = means_by_group(rows)
    assert estimate.value == pytest.approx(statistics.fmean(expected.values()), abs=1e-9)
    assert estimate.n == len(expected)
    assert estimate.low <= estimate.value <= estimate.high
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    again = bootstrap_mean([row[1] for row in shuffled], [row[0] for row in shuffled], samples=200, seed=1)
    assert (again.value, again.low, again.high) == pytest.approx((estimate.value, estimate.low, estimate.high))


@settings(deadline=None)
@given(items, items)
def test_change_pairs_the_prompts_of_both_sides(base: list[tuple[str, float]], new: list[tuple[str, float]]) -> None:
    base_means, new_means = means_by_group(base), means_by_group(new)
    common = base_means.keys() & new_means.keys()
    sides = ([row[1] for row in base], [row[0] for row in base], [row[1] for row in new], [row[0] for row in new])
    if not common:
        with pytest.raises(ValueError, match="no prompt was measured on both sides"):
            bootstrap_change(*sides, samples=100, seed=0)
        return
    estimate = bootstrap_change(*sides, samples=100, seed=0)
    expected = statistics.fmean(new_means[name] - base_means[name] for name in common)
    assert estimate.value == pytest.approx(expected, abs=1e-9)
    assert estimate.n == len(common)


def test_interval_is_that_of_all_resamples_as_wide_as_students_t() -> None:
    values = [0.0, 1.0, 3.0, 7.0, 20.0]
    mean = statistics.fmean(values)
    every = [statistics.fmean(drawn) - mean for drawn in itertools.product(values, repeat=5)]
    # 2.776 is the 97.5th percentile of t with 4 degrees of freedom; 5 / 4 mends what a sample of 5 underestimates.
    wider = 2.7764451 / 1.959964 * math.sqrt(5 / 4)
    low, high = mean + wider * np.quantile(every, [0.025, 0.975])
    estimate = bootstrap_mean(values, list("abcde"), samples=40_000, seed=0)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.4)
    assert estimate.low < 0 < estimate.high


def test_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=2000)
    groups = [str(i) for i in range(2000)]
    estimate = bootstrap_mean(values, groups, samples=4000, seed=0)
    error = values.std(ddof=1) / np.sqrt(2000)
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_coverage_respects_the_prompts() -> None:
    """About 95 of 100 intervals hold the truth with 4 alike items per prompt; ignoring the prompts would give ~67."""
    generator = np.random.default_rng(11)
    clustered = ignoring = 0
    for trial in range(300):
        prompt_means = generator.normal(size=40)
        values = np.repeat(prompt_means, 4) + 0.05 * generator.normal(size=160)
        groups = [str(i) for i in np.repeat(np.arange(40), 4)]
        estimate = bootstrap_mean(values, groups, samples=300, seed=trial)
        clustered += estimate.low <= 0.0 <= estimate.high
        alone = bootstrap_mean(values, [str(i) for i in range(160)], samples=300, seed=trial)
        ignoring += alone.low <= 0.0 <= alone.high
    assert 0.90 * 300 <= clustered <= 0.985 * 300
    assert ignoring < 0.80 * 300


def test_pairing_sees_a_small_change_between_unlike_prompts() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(0.0, 50.0, size=30)
    new = base + 1.0 + 0.5 * generator.normal(size=30)
    groups = [str(i) for i in range(30)]
    estimate = bootstrap_change(base, groups, new, groups, samples=500, seed=0)
    assert describe_change(estimate) == "rose"
    assert describe_change(bootstrap_change(new, groups, base, groups, samples=500, seed=0)) == "fell"
    assert describe_change(bootstrap_mean(new, groups, samples=500, seed=0)) == "not distinguishable"


def test_ratio_is_a_ratio_of_sums_with_the_delta_method_error() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 60, size=800).astype(float)
    nats = 0.3 * tokens + generator.normal(size=800)
    groups = [str(i) for i in range(800)]
    estimate = bootstrap_ratio(nats, tokens, groups, samples=3000, seed=0)
    ratio = sum(nats) / sum(tokens)
    error = np.std(nats - ratio * tokens, ddof=1) / np.sqrt(800) / tokens.mean()
    assert estimate.value == pytest.approx(ratio)
    assert estimate.low == pytest.approx(ratio - 1.96 * error, abs=0.2 * error)
    assert estimate.high == pytest.approx(ratio + 1.96 * error, abs=0.2 * error)


def test_ratio_change_uses_only_common_prompts() -> None:
    estimate = bootstrap_ratio_change(
        [1.0, 1.0, 99.0], [2.0, 2.0, 1.0], ["a", "b", "x"], [3.0, 5.0, 77.0], [4.0, 4.0, 1.0], ["b", "a", "y"],
        samples=200, seed=0,
    )  # fmt: skip
    assert estimate.value == pytest.approx(8.0 / 8.0 - 2.0 / 4.0)
    # Both prompts have one base ratio, 1/2; the new ones are 5/4 (a) and 3/4 (b). Resamples are a and a, b and b, or
    # both: 1/4 to 3/4, which two prompts widen by Student's t with one degree of freedom.
    wider = 12.7062 / 1.959964 * math.sqrt(2)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - 0.25 * wider, 0.5 + 0.25 * wider), rel=1e-4)


def test_same_seed_same_interval_other_seed_another() -> None:
    values, groups = np.arange(20.0) ** 2, [str(i) for i in range(20)]
    first = bootstrap_mean(values, groups, samples=300, seed=7)
    assert bootstrap_mean(values, groups, samples=300, seed=7) == first
    assert bootstrap_mean(values, groups, samples=300, seed=8) != first


def test_constant_values_have_a_degenerate_interval() -> None:
    assert bootstrap_mean([0.5] * 7, list("abcdefg"), samples=100, seed=0) == Estimate(0.5, 0.5, 0.5, 7, p_value=0.0)
    assert bootstrap_mean([0.0] * 7, list("abcdefg"), samples=100, seed=0) == Estimate(0.0, 0.0, 0.0, 7, p_value=1.0)
    assert bootstrap_mean([3.0], ["a"], samples=100, seed=0) == Estimate(3.0, 3.0, 3.0, 1, p_value=1.0)


def test_the_p_value_is_that_of_the_t_test_and_agrees_with_the_interval() -> None:
    generator = np.random.default_rng(4)
    for shift in (0.0, 0.3, 0.5, 1.5):
        values = generator.normal(shift, 1.0, size=25)
        estimate = bootstrap_mean(values, [str(i) for i in range(25)], samples=4000, seed=0)
        ratio = values.mean() / (values.std(ddof=1) / 5)
        # The density of t with 24 degrees of freedom, summed up far into its tail.
        points = np.linspace(abs(ratio), abs(ratio) + 80, 400_001)
        density = (
            math.exp(math.lgamma(12.5) - math.lgamma(12)) / math.sqrt(24 * math.pi) * (1 + points**2 / 24) ** -12.5
        )
        tail = float(((density[1:] + density[:-1]) / 2 * np.diff(points)).sum())
        assert estimate.p_value == pytest.approx(2 * tail, rel=0.01, abs=1e-6)
        if estimate.p_value is not None and not 0.03 < estimate.p_value < 0.08:
            assert (estimate.p_value < 0.05) == (not estimate.low <= 0 <= estimate.high)


def test_shares_stay_shares() -> None:
    estimate = bootstrap_mean([1.0, 1.0, 1.0, 0.0], list("abcd"), samples=300, seed=0)
    assert estimate.high > 1
    assert estimate.within((0.0, 1.0)).high == 1
    assert estimate.within(None) == estimate


@pytest.mark.parametrize(
    ("estimate", "word"),
    [
        (Estimate(1.0, 0.1, 2.0, 9), "rose"),
        (Estimate(-1.0, -2.0, -0.1, 9), "fell"),
        (Estimate(1.0, -0.1, 2.0, 9), "not distinguishable"),
        (Estimate(1.0, 0.0, 2.0, 9), "not distinguishable"),
        (Estimate(0.0, 0.0, 0.0, 9), "not distinguishable"),
        (Estimate(1.0, 1.0, 1.0, 1), "not distinguishable"),
    ],
)
def test_describe_change(estimate: Estimate, word: str) -> None:
    assert describe_change(estimate) == word


def test_an_entry_holds_an_estimate_and_gives_it_back() -> None:
    estimate = Estimate(1.0, 0.5, 1.5, 9)
    entry = estimate.as_entry("nats")
    assert entry == Entry(value=1.0, low=0.5, high=1.5, n=9, unit="nats")
    assert Estimate.of_value(entry) == estimate
    assert Estimate.of_value(replace(entry, low=None, high=None)) == Estimate(1.0, 1.0, 1.0, 9)
    assert Estimate.of_change(entry) is None
    changed = with_change(entry, Estimate(0.2, 0.1, 0.3, 9, 0.01), "rose")
    assert changed == replace(entry, change=0.2, change_low=0.1, change_high=0.3, verdict="rose", change_p_value=0.01)
    assert Estimate.of_change(changed) == Estimate(0.2, 0.1, 0.3, 9, 0.01)
    assert Estimate(1.0, 0.5, 1.5, 9, users=3, questions=6).as_entry("nats").users == 3
    assert Estimate.of_change(replace(changed, change_low=None, change_high=None)) is None


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], [], "at least one item"),
        ([1.0, 2.0], ["a"], "one value for each"),
        ([1.0, float("nan")], ["a", "b"], "found nan for item 1 of 'b'"),
    ],
)
def test_bad_values_are_named(values: list[float], groups: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, groups, samples=100, seed=0)


def test_bad_denominators_and_sample_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="denominators: expected more than 0, found 0 for item 1 of 'b'"):
        bootstrap_ratio([1.0, 1.0], [1.0, 0.0], ["a", "b"], samples=100, seed=0)
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        bootstrap_mean([1.0], ["a"], samples=0, seed=0)
