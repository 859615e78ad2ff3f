"""Wilson, McNemar, paired bootstrap, verdicts and seeds: against textbook values, independent lines and simulation.

python -m pytest tests/unit/evaluation/test_significance.py
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.evaluation.intervals import Estimate, bootstrap_change, change_word, describe_change
from mipo_ray.evaluation.significance import (
    holm,
    item_changes,
    mcnemar,
    mean_entry,
    over_seeds,
    sentence,
    share_entry,
    wilson,
    with_primary,
)
from mipo_ray.measures import TASKS, Measure
from mipo_ray.storage.entries import Entry


def test_wilson_of_published_examples():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for correct, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson(correct, n)
        assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
        assert estimate.value == correct / n
        assert estimate.n == n


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_is_at_its_limit(case):
    correct, n = case
    estimate = wilson(correct, n)
    mirrored = wilson(n - correct, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    for bound in (estimate.low, estimate.high):
        if 0 < bound < 1:
            score = (estimate.value - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(score) == pytest.approx(1.959963984540054, rel=1e-6)


def test_wilson_covers_what_it_promises():
    for n, share in [(20, 0.3), (50, 0.9), (100, 0.5)]:
        covered = sum(
            math.comb(n, correct) * share**correct * (1 - share) ** (n - correct)
            for correct in range(n + 1)
            if wilson(correct, n).low <= share <= wilson(correct, n).high
        )
        assert 0.93 < covered < 0.98


@pytest.mark.parametrize(("correct", "n"), [(-1, 4), (5, 4), (0, 0)])
def test_wilson_refuses_what_is_no_share(correct, n):
    with pytest.raises(ValueError, match=f"found correct {correct}, n {n}"):
        wilson(correct, n)


def test_mcnemar_against_every_outcome_of_fair_coins():
    for fixed, broken in itertools.product(range(7), range(7)):
        base = [False] * fixed + [True] * broken + [True, False]
        new = [True] * fixed + [False] * broken + [True, False]
        test = mcnemar(base, new)
        # Every sequence of fair coins is equally likely; those that are at least as lopsided count.
        sequences = list(itertools.product([0, 1], repeat=fixed + broken))
        extreme = sum(abs(2 * sum(one) - len(one)) >= abs(fixed - broken) for one in sequences)
        assert (test.fixed, test.broken) == (fixed, broken)
        assert test.p_value == pytest.approx(extreme / len(sequences), abs=1e-12)


def test_mcnemar_of_a_textbook():
    # Agresti, "Categorical data analysis", approval of a prime minister: 86 and 150 changed their mind; p < 0.0001.
    test = mcnemar([True] * 150 + [False] * 86, [False] * 150 + [True] * 86)
    assert test.p_value == pytest.approx(3.7e-5, rel=0.02)
    assert mcnemar([True, False], [True, False]).p_value == 1.0
    large = mcnemar([False] * 1300 + [True] * 1200, [True] * 1300 + [False] * 1200)
    assert large.p_value == pytest.approx(math.erfc((100 - 1) / math.sqrt(2500) / math.sqrt(2)), rel=0.01)


def test_mcnemar_refuses_different_items():
    with pytest.raises(ValueError, match="found 1 and 2"):
        mcnemar([True], [True, False])


def test_the_paired_bootstrap_covers_the_true_change():
    random = np.random.default_rng(0)
    covered = wrong = 0
    for trial in range(400):
        difficulty = random.normal(0, 3, size=40)  # of an item, shared by both policies
        items = [str(item) for item in range(40)]
        base, new = difficulty + random.normal(0, 1, 40), difficulty + 0.5 + random.normal(0, 1, 40)
        change = bootstrap_change(base, items, new, items, samples=400, seed=trial)
        covered += change.low <= 0.5 <= change.high
        equal = bootstrap_change(base, items, difficulty + random.normal(0, 1, 40), items, samples=400, seed=trial)
        wrong += describe_change(equal, "higher") != "not distinguishable"
    # 95 % of 400, give or take 3 standard errors and the known slight narrowness.
    assert 0.90 <= covered / 400 <= 0.98
    assert wrong / 400 <= 0.10


def test_verdicts():
    assert describe_change(Estimate(1.0, 0.5, 1.5, 20), "higher") == "better"
    assert describe_change(Estimate(1.0, 0.5, 1.5, 20), "lower") == "worse"
    assert describe_change(Estimate(-1.0, -1.5, -0.5, 20), "higher") == "worse"
    assert describe_change(Estimate(-1.0, -1.5, -0.5, 20), "lower") == "better"
    assert describe_change(Estimate(0.2, 0.0, 0.4, 20), "higher") == "not distinguishable"
    assert describe_change(Estimate(1.0, 0.5, 1.5, 1), "higher") == "not distinguishable"
    assert describe_change(Estimate(1.0, 0.5, 1.5, 20), "higher", p_value=0.0625) == "not distinguishable"
    assert describe_change(Estimate(1.0, 0.5, 1.5, 20), "higher", p_value=0.03) == "better"


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_sequential_procedure_rejects(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2, 0.7):
        rejected, left = set(), sorted(p_values, key=p_values.get)
        while left and p_values[left[0]] * len(left) < level:
            rejected.add(left.pop(0))
        assert {name for name, value in corrected.items() if value < level} == rejected
    assert all(p_values[name] <= corrected[name] <= 1 for name in p_values)


def test_the_primary_measure_is_marked_and_the_others_are_corrected():
    changed = {name: Entry(1.0, 0.5, 1.5, 9, "nats", None, 0.3, 0.1, 0.5, change_p_value=0.02) for name in "abc"}
    found = with_primary({**changed, "d": Entry(1.0, None, None, 9, "share", None, 0.2)}, "b")
    assert {name: entry.primary for name, entry in found.items()} == {"a": None, "b": True, "c": None, "d": None}
    assert {name: entry.holm_p_value for name, entry in found.items()} == {"a": 0.04, "b": None, "c": 0.04, "d": None}
    assert [change_word(entry) for entry in found.values()] == ["rose", "rose", "rose", ""]
    many = with_primary({**changed, "e": changed["a"]}, "b")
    assert [change_word(many[name], "higher") for name in "ab"] == ["not distinguishable", "better"]
    # With no change anywhere one of twenty looks like one in 5 of 100 families at most.
    random = np.random.default_rng(0)
    families = [holm({str(test): p for test, p in enumerate(random.random(20))}) for _ in range(2000)]
    assert np.mean([min(family.values()) < 0.05 for family in families]) < 0.06


def test_sentences_say_it_plainly():
    base, new = Estimate(0.38, 0.34, 0.42, 500), Estimate(0.412, 0.37, 0.46, 500)
    change = Estimate(0.032, 0.004, 0.06, 500)
    assert sentence("arc_easy accuracy", base, new, change, unit="share", p_value=0.031) == (
        "arc_easy accuracy is better than the base: 0.412, was 0.380 "
        "(change +0.032 [+0.004, +0.060], 500 items, exact McNemar p = 0.031)."
    )
    same = sentence("context PMI", base, new, Estimate(0.1, -1.2, 1.4, 20), unit="nats per response", than="sft")
    assert same.startswith("context PMI is not distinguishable from sft: 0.412 nats per response, was 0.380 (change")
    corrected = sentence("self-BLEU", base, new, change, unit="share", holm_p_value=0.3)
    assert "self-BLEU is not distinguishable from the base" in corrected
    assert corrected.endswith("500 items, p = 0.3 by Holm).")
    longer = sentence("length", base, new, change, unit="tokens", better="lower")
    assert "is worse than the base" in longer


def test_item_changes_average_an_items_responses_and_leave_out_what_one_side_lacks():
    changes = item_changes(([1.0, 3.0, 5.0], ["a", "a", "b"]), ([4.0, 1.0, 9.0], ["b", "a", "c"]))
    assert changes == {"a": -1.0, "b": -1.0}


def test_one_seed_is_the_paired_bootstrap():
    random = np.random.default_rng(1)
    items = [str(item) for item in range(60)]
    base, new = random.normal(size=60), random.normal(0.3, 1.0, size=60)
    one = over_seeds([item_changes((base, items), (new, items))], samples=4000, seed=0)
    known = bootstrap_change(base, items, new, items, samples=4000, seed=1)
    assert one.value == pytest.approx(known.value, abs=1e-12)
    assert one.n == 60
    assert (one.low, one.high) == pytest.approx((known.low, known.high), abs=0.03)


def test_seeds_that_disagree_widen_the_interval():
    items = {str(item): 1.0 for item in range(30)}
    agree = over_seeds([items, items, items], samples=500, seed=0)
    disagree = over_seeds([{k: v + s for k, v in items.items()} for s in (-2, 0, 2)], samples=500, seed=0)
    assert (agree.low, agree.value, agree.high) == pytest.approx((1.0, 1.0, 1.0))
    assert disagree.value == pytest.approx(1.0)
    assert disagree.low < 0 < 2 < disagree.high
    assert describe_change(disagree, "higher") == "not distinguishable"


def test_over_seeds_covers_the_change_of_the_method():
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        of_items, of_seeds = random.normal(0.4, 1.0, 40), random.normal(0.0, 0.5, 6)
        changes = [
            {str(i): float(of_items[i] + of_seed + random.normal(0, 0.5)) for i in range(40)} for of_seed in of_seeds
        ]
        estimate = over_seeds(changes, samples=300, seed=trial)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_over_seeds_refuses_what_cannot_be_paired():
    with pytest.raises(ValueError, match="found none in 0 seeds"):
        over_seeds([], samples=100, seed=0)
    with pytest.raises(ValueError, match="found none in 2 seeds"):
        over_seeds([{"a": 1.0}, {"b": 1.0}], samples=100, seed=0)
    with pytest.raises(ValueError, match="found nan for item 'a'"):
        over_seeds([{"a": math.nan}], samples=100, seed=0)


def test_share_entry_by_hand():
    items = [f"q{index}" for index in range(8)]
    base = [True, True, False, False, False, False, False, False]
    new = [True, True, True, True, True, True, True, False]
    entry = share_entry(TASKS["accuracy"], (new, items), (base, items), samples=500, seed=0)
    known = wilson(7, 8)
    assert (entry.value, entry.low, entry.high) == (0.875, known.low, known.high)
    assert (entry.n, entry.unit, entry.interval) == (8, "share", "wilson")
    assert (entry.fixed, entry.broken) == (5, 0)
    assert entry.p_value == 2 / 32
    assert entry.change == pytest.approx(0.625)
    assert entry.change_low > 0  # the bootstrap alone would call it a difference
    assert entry.verdict == "not distinguishable"
    assert share_entry(TASKS["accuracy"], (new, items), samples=500, seed=0).change is None
    # In another order it is the same: items are matched by name.
    turned = share_entry(TASKS["accuracy"], (new[::-1], items[::-1]), (base, items), samples=500, seed=0)
    assert turned == entry


def test_accuracy_of_several_responses_to_an_item_is_clustered():
    items = ["a", "a", "b", "b"]
    entry = share_entry(
        TASKS["accuracy"], ([True, False, True, True], items), ([False] * 4, items), samples=300, seed=0
    )
    assert (entry.value, entry.n, entry.interval) == (0.75, 2, "bootstrap")
    assert entry.p_value is None


@pytest.mark.parametrize(("better", "verdict"), [("lower", "better"), ("higher", "worse"), ("neither", None)])
def test_the_measure_says_whether_a_change_is_for_the_better(better, verdict):
    items = [str(index) for index in range(12)]
    base = np.arange(12.0)
    measure = Measure("made_up", "tokens", "a measure", better)
    entry = mean_entry(measure, (base - 1, items), (base, items), samples=200, seed=0)
    assert (entry.change, entry.change_low, entry.change_high) == pytest.approx((-1.0, -1.0, -1.0))
    assert entry.verdict == verdict
    assert (entry.interval, entry.unit) == ("bootstrap", "tokens")
    shares = share_entry(measure, ([False] * 12, items), ([True] * 12, items), samples=200, seed=0)
    assert shares.verdict == verdict
