"""Is one policy better than another, on the same items? Intervals, tests, and the sentence that says so plainly.

An item is a held-out prompt, or a question of a task. Every comparison is paired: it looks at the same items under both
policies; of held-out prompts the users and questions are resampled (`resampling`). All intervals are 95 % ones, each
for its own comparison: of twenty comparisons of equal policies one is expected to look like a difference. That is why a
run names one measure beforehand, and the verdicts on all its others are corrected for their number (`with_primary`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from mipo_ray.evaluation.intervals import (
    Estimate,
    Groups,
    bootstrap_change,
    bootstrap_mean,
    bootstrap_seeds,
    describe_change,
    group_means,
    with_change,
    word_against,
)
from mipo_ray.evaluation.resampling import Array, Clusters
from mipo_ray.measures import Direction, Measure, format_value
from mipo_ray.storage.entries import Entries, Entry

Measured = tuple[ArrayLike, Groups]  # values [responses], and the item of each response

_Z = 1.959963984540054  # the normal distribution's 97.5th percentile


@dataclass(frozen=True)
class McNemar:
    """Items that only the new policy gets right (`fixed`), that only the old one does (`broken`), and the p-value."""

    fixed: int
    broken: int
    p_value: float


def wilson(correct: int, n: int) -> Estimate:
    """The share `correct` / `n` of independent items with its score interval (Wilson 1927), inside [0, 1].

    Raises ValueError unless 0 <= correct <= n and n >= 1.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"expected 0 <= correct <= n and n >= 1, found correct {correct}, n {n}")
    share, shrink = correct / n, 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == n else middle + half
    return Estimate(value=share, low=low, high=high, n=n)


def mcnemar(base: Sequence[bool], new: Sequence[bool]) -> McNemar:
    """McNemar's exact test (1947) of whether two policies are right equally often on the same items.

    `base` and `new` say for each item, in one order, whether the policy is right. Two-sided: twice the probability that
    of (fixed + broken) throws of a fair coin at most min(fixed, broken) show heads, at most 1; 1 where both policies
    are right on the same items. Raises ValueError where lengths differ.
    """
    if len(base) != len(new):
        raise ValueError(f"expected the same items on both sides, found {len(base)} and {len(new)}")
    fixed = sum(bool(after) and not before for before, after in zip(base, new, strict=True))
    broken = sum(bool(before) and not after for before, after in zip(base, new, strict=True))
    changed = fixed + broken
    tail = sum(math.comb(changed, heads) for heads in range(min(fixed, broken) + 1))
    return McNemar(fixed, broken, min(1.0, 2 * tail / 2**changed))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values of several tests, by name, so corrected that with no difference anywhere one of them is below 0.05
    in at most 5 of 100 families (Holm 1979, "A simple sequentially rejective multiple test procedure").

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes smaller than the one before it, and
    none larger than 1. The tests may depend on each other.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


def with_primary(entries: Entries, primary: str) -> Entries:
    """The entries of one policy, that of the primary measure marked, and the changes of all others, which are
    exploratory, with their p-values corrected for their number."""
    others = {
        name: entry.change_p_value
        for name, entry in entries.items()
        if name != primary and entry.change_p_value is not None
    }
    corrected = holm(others)
    return {
        name: replace(entry, primary=True if name == primary else None, holm_p_value=corrected.get(name))
        for name, entry in entries.items()
    }


def sentence(
    what: str,
    base: Estimate,
    new: Estimate,
    change: Estimate,
    *,
    unit: str,
    better: Direction = "higher",
    p_value: float | None = None,
    holm_p_value: float | None = None,
    than: str = "the base",
) -> str:
    """One sentence with the figures: "arc_easy accuracy is better than the base: 0.412, was 0.380 (change ...)."."""
    said = word_against(describe_change(change, better, holm_p_value if p_value is None else p_value), than)
    scale = max(abs(change.value), abs(change.low), abs(change.high))
    moved, low, high = (
        format_value(value, unit, signed=True, scale=scale) for value in (change.value, change.low, change.high)
    )
    figures = [f"change {moved} [{low}, {high}]", f"{change.n} items"]
    figures += [] if p_value is None else [f"exact McNemar p = {p_value:.2g}"]
    figures += [] if holm_p_value is None else [f"p = {holm_p_value:.2g} by Holm"]
    shown = "" if unit == "share" else f" {unit}"
    values = f"{format_value(new.value, unit)}{shown}, was {format_value(base.value, unit)}"
    return f"{what} is {said}: {values} ({', '.join(figures)})."


def item_changes(base: Measured, new: Measured) -> dict[str, float]:
    """Item -> (new mean - base mean) of that item's responses, for the items present on both sides."""
    base_names, base_means = group_means(*base)
    new_names, new_means = group_means(*new)
    before = dict(zip(base_names.tolist(), base_means.tolist(), strict=True))
    after = dict(zip(new_names.tolist(), new_means.tolist(), strict=True))
    return {name: after[name] - before[name] for name in before if name in after}


def over_seeds(
    changes: Sequence[Mapping[str, float]], *, samples: int, seed: int, clusters: Clusters | None = None
) -> Estimate:
    """The mean paired change of one method that was trained with several seeds.

    `changes` has a mapping item -> change (`item_changes`) for each training seed; items of all seeds count. The
    interval holds what other seeds and what other items (by `clusters`) would have shown. Three seeds say little about
    a fourth: where they differ, the interval is wide. One seed: items alone are resampled.

    `n` is the number of items. Raises ValueError for no seeds, no common items, or values that are not finite.
    """
    items = sorted(set.intersection(*(set(of_seed) for of_seed in changes))) if changes else []
    if not items:
        raise ValueError(f"expected items that all of at least one seed have, found none in {len(changes)} seeds")
    table: Array = np.array([[of_seed[item] for item in items] for of_seed in changes], dtype=np.float64)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"changes: expected finite numbers, found {table[row, column]} for item {items[column]!r}")
    return bootstrap_seeds(table, items, samples=samples, seed=seed, clusters=clusters)


def mean_entry(
    measure: Measure,
    new: Measured,
    base: Measured | None = None,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Entry:
    """The entry of a mean over items, with a bootstrap interval; with `base` also the paired change and, where the
    measure has a better direction, the verdict.

    An item's responses are averaged first; `clusters` are those of the items. Raises ValueError where `bootstrap_mean`
    does.
    """
    estimate = bootstrap_mean(*new, samples=samples, seed=seed, clusters=clusters)
    entry = estimate.within(measure.bounds).as_entry(measure.unit, "bootstrap")
    if base is None:
        return entry
    change = bootstrap_change(*base, *new, samples=samples, seed=seed, clusters=clusters)
    return with_change(entry, change.within(measure.change_bounds), _verdict(measure, change))


def share_entry(
    measure: Measure,
    new: Measured,
    base: Measured | None = None,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Entry:
    """The entry of a share of items, each of which is right or wrong (or another yes or no), with Wilson's interval.

    With `base` also the paired change (bootstrap over items), `fixed`, `broken` and `p_value` of McNemar's exact test,
    and the verdict, which needs both. Where an item has several responses, or items of one of `clusters` are alike,
    they are not independent: then the interval is the bootstrap's, the item's share of right answers is what is
    compared, and there is no McNemar test.
    """
    correct, items = np.asarray(new[0], dtype=bool), new[1]
    once = clusters is None and len(set(items)) == len(items)
    if once:
        estimate, interval = wilson(int(correct.sum()), len(correct)), "wilson"
    else:
        found = bootstrap_mean(correct, items, samples=samples, seed=seed, clusters=clusters)
        estimate, interval = found.within(measure.bounds), "bootstrap"
    entry = estimate.as_entry(measure.unit, interval)
    if base is None:
        return entry
    base_correct, base_items = base
    change = bootstrap_change(*base, correct, items, samples=samples, seed=seed, clusters=clusters)
    change = change.within(measure.change_bounds)
    if not once or len(set(base_items)) < len(base_items):
        return with_change(entry, change, _verdict(measure, change))
    before = dict(zip(base_items, np.asarray(base_correct, dtype=bool).tolist(), strict=True))
    both = [(before[item], right) for item, right in zip(items, correct.tolist(), strict=True) if item in before]
    test = mcnemar([pair[0] for pair in both], [pair[1] for pair in both])
    tested = replace(entry, fixed=test.fixed, broken=test.broken, p_value=test.p_value)
    return with_change(tested, change, _verdict(measure, change, test.p_value))


def _verdict(measure: Measure, change: Estimate, p_value: float | None = None) -> str | None:
    """What a change says; None for a measure that has no better direction."""
    return None if measure.better == "neither" else describe_change(change, measure.better, p_value)
