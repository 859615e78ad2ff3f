"""Intervals over users and questions hold the truth 95 times of 100, whatever rows have in common.

Tables of made-up rows with known effects of users and questions; the variances against plain loops.

python -m pytest tests/unit/evaluation/test_resampling.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    clusters_behind,
    is_on_few,
)
from mipo_ray.evaluation.resampling import Clusters, Rows, interval, resampler
from mipo_ray.evaluation.significance import over_seeds

TRIALS = 500
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.normal(size=size)


def skewed(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.exponential(size=size) - 1


def coverage(
    shape: tuple[int, int],
    effects: tuple[float, float],
    *,
    asked: float = 1.0,
    draw: Draw = normal,
    trials: int = TRIALS,
) -> float:
    """In which share of simulated tables [users, questions] the interval of the mean holds the truth, 0.

    effects: the standard deviation of users and of questions; that of single rows is 1. asked: the share of the
    questions that a user was asked.
    """
    users, questions = shape
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(trials):
        user, question = (part.ravel() for part in np.indices(shape))
        kept = generator.random(user.size) < asked
        user, question = user[kept], question[kept]
        values = effects[0] * draw(generator, users)[user] + effects[1] * draw(generator, questions)[question]
        values = values + draw(generator, len(values))
        numbered = [np.unique(labels, return_inverse=True)[1] for labels in (user, question)]
        rows = Rows(np.stack([values, np.ones(len(values))], axis=1), *numbered)
        found = interval(rows.value, *rows.samples(300, resampler(trial)))
        covered += found.low <= 0 <= found.high
    return covered / trials


@pytest.mark.parametrize(
    ("effects", "asked"),
    [((0.0, 0.0), 1.0), ((1.0, 0.0), 1.0), ((0.0, 1.0), 1.0), ((1.0, 1.0), 1.0), ((1.0, 0.0), 0.2)],
    ids=["none", "users", "questions", "both", "users with few questions each"],
)
def test_intervals_hold_the_truth_95_times_of_100(effects: tuple[float, float], asked: float) -> None:
    assert 0.93 <= coverage((36, 28), effects, asked=asked) <= 0.97


def test_skewed_effects_and_few_clusters_cost_little() -> None:
    assert 0.90 <= coverage((36, 28), (1.0, 1.0), draw=skewed, trials=200) <= 0.97
    # Six users and six questions: the interval is wide, and right as often where effects are normal.
    for effects in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        assert 0.92 <= coverage((6, 6), effects, trials=300) <= 1.0


def test_rows_alone_would_hold_it_far_too_seldom() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        user, question = (part.ravel() for part in np.indices((36, 28)))
        values = generator.normal(size=36)[user] + generator.normal(size=28)[question] + generator.normal(size=1008)
        rows = Rows(np.stack([values, np.ones(1008)], axis=1))
        found = interval(rows.value, *rows.samples(100, resampler(trial)))
        covered += found.low <= 0 <= found.high
    assert covered < 60


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=14)


def plain_variance(values: list[float], keys: list[object]) -> float:
    """Of the mean, by clusters, with plain loops."""
    mean = sum(values) / len(values)
    sums: dict[object, float] = {}
    for value, key in zip(values, keys, strict=True):
        sums[key] = sums.get(key, 0.0) + (value - mean) / len(values)
    return sum(one * one for one in sums.values()) * len(sums) / max(len(sums) - 1, 1)


@settings(deadline=None)
@given(labels, st.integers(0, 2**32 - 1))
def test_the_variance_is_that_of_cameron_gelbach_and_miller(pairs: list[tuple[int, int]], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=len(pairs)).tolist()
    users, questions = ([pair[side] for pair in pairs] for side in (0, 1))
    numbered = [np.unique(side, return_inverse=True)[1] for side in (users, questions)]
    rows = Rows(np.stack([values, np.ones(len(values))], axis=1), *numbered)
    samples, variance = rows.samples(10, resampler(0))
    says = [len(set(side)) not in (1, len(pairs)) for side in (users, questions)]
    of_users, of_questions = plain_variance(values, users), plain_variance(values, questions)
    if all(says):
        both = of_users + of_questions - plain_variance(values, pairs)
        expected = max(both, of_users, of_questions)
    elif any(says):
        expected = of_users if says[0] else of_questions
    else:
        expected = plain_variance(values, list(range(len(pairs))))
    assert variance == pytest.approx(expected)
    assert len(samples) == (2 if all(says) else 1)


def test_a_side_that_says_nothing_leaves_the_other_alone() -> None:
    values = np.random.default_rng(1).normal(size=24)
    prompts = [f"p{index:02d}" for index in range(24)]
    few = {prompt: str(index % 6) for index, prompt in enumerate(prompts)}
    own = {prompt: prompt for prompt in prompts}
    nobody = dict.fromkeys(prompts, "")
    alike = dict.fromkeys(prompts, "the same")

    def ends(clusters: Clusters | None) -> tuple[float, float]:
        found = bootstrap_mean(values, prompts, samples=300, seed=3, clusters=clusters)
        return found.low, found.high

    by_question = bootstrap_mean(values, [few[prompt] for prompt in prompts], samples=300, seed=3)
    assert ends(Clusters(own, few)) == pytest.approx((by_question.low, by_question.high))
    assert ends(Clusters(None, few)) == ends(Clusters(nobody, few)) == ends(Clusters(own, few))
    assert ends(Clusters(few, own)) == ends(Clusters(few, alike)) == ends(Clusters(own, few))
    assert ends(Clusters(own, own)) == ends(Clusters(None, own)) == ends(Clusters(alike, own)) == ends(None)


def test_how_many_users_and_questions_there_are_is_told() -> None:
    prompts = [f"p{index:02d}" for index in range(24)]
    users = {prompt: "" if index < 2 else str(index % 4) for index, prompt in enumerate(prompts)}
    questions = {prompt: str(index % 6) for index, prompt in enumerate(prompts)}
    found = bootstrap_mean(np.arange(24.0), prompts, samples=50, seed=0, clusters=Clusters(users, questions))
    assert (found.n, found.users, found.questions) == (24, 6, 6)  # two name nobody
    assert clusters_behind(found) == "6 users and 6 questions"
    assert is_on_few(found)
    alone = bootstrap_mean(np.arange(24.0), prompts, samples=50, seed=0)
    assert (alone.users, alone.questions, clusters_behind(alone)) == (None, None, "24 prompts")
    assert not is_on_few(alone)
    assert is_on_few(Estimate(1.0, 0.0, 2.0, 24, users=24, questions=14))
    assert not is_on_few(Estimate(1.0, 0.0, 2.0, 24, users=15))
    assert clusters_behind(Estimate(1.0, 0.0, 2.0, 1)) == "1 prompt"


def test_changes_and_ratios_resample_users_and_questions_too() -> None:
    generator = np.random.default_rng(5)
    user, question = (part.ravel() for part in np.indices((12, 10)))
    prompts = [f"p{index:03d}" for index in range(120)]
    clusters = Clusters(
        {prompt: str(one) for prompt, one in zip(prompts, user, strict=True)},
        {prompt: str(one) for prompt, one in zip(prompts, question, strict=True)},
    )
    base = generator.normal(0, 5, size=120)
    new = base + generator.normal(0, 2, size=12)[user] + generator.normal(0, 0.1, size=120)
    draw = {"samples": 2000, "seed": 0}
    crossed = bootstrap_change(base, prompts, new, prompts, **draw, clusters=clusters)
    rows = bootstrap_change(base, prompts, new, prompts, **draw)
    means = [(new - base)[user == one].mean() for one in range(12)]
    error = np.std(means, ddof=1) / math.sqrt(12)
    # With hardly any effect of the question it is the t interval of 12 users' means.
    assert (crossed.high - crossed.low) / 2 == pytest.approx(2.201 * error, rel=0.08)
    assert (rows.high - rows.low) < 0.5 * (crossed.high - crossed.low)

    tokens = generator.integers(20, 60, size=120).astype(float)
    nats = tokens * (0.3 + generator.normal(0, 0.1, size=12)[user])
    ratio = bootstrap_ratio(nats, tokens, prompts, **draw, clusters=clusters)
    total = nats.sum() / tokens.sum()
    sums = [(nats - total * tokens)[user == one].sum() for one in range(12)]
    error = math.sqrt(12 / 11 * sum(one * one for one in sums)) / tokens.sum()
    assert ratio.value == pytest.approx(total)
    assert (ratio.high - ratio.low) / 2 == pytest.approx(2.201 * error, rel=0.1)
    same = bootstrap_ratio_change(nats, tokens, prompts, nats, tokens, prompts, **draw, clusters=clusters)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_seeds_are_resampled_beside_users_and_questions() -> None:
    generator = np.random.default_rng(6)
    user, question = (part.ravel() for part in np.indices((20, 15)))
    prompts = [f"p{index:03d}" for index in range(300)]
    clusters = Clusters(
        {prompt: str(one) for prompt, one in zip(prompts, user, strict=True)},
        {prompt: str(one) for prompt, one in zip(prompts, question, strict=True)},
    )
    covered = alone = 0
    for trial in range(200):
        items = 0.5 + generator.normal(size=20)[user] + generator.normal(size=300)
        changes = [
            dict(zip(prompts, items + of_seed + generator.normal(0, 0.5, 300), strict=True))
            for of_seed in generator.normal(0, 0.5, size=5)
        ]
        found = over_seeds(changes, samples=100, seed=trial, clusters=clusters)
        covered += found.low <= 0.5 <= found.high
        without = over_seeds(changes[:1], samples=100, seed=trial)
        alone += without.low <= 0.5 <= without.high
    assert 0.92 <= covered / 200 <= 0.98
    assert alone / 200 < 0.5
