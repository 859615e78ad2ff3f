"""95 % intervals of held-out figures: the samples that a figure rests on, drawn anew.

Several responses to one prompt are alike, so they are no independent measurements: a prompt with all its responses is
one row. Rows of one user or of one question are alike, too, so users and questions are what is resampled where they are
known (`Clusters`, from the prompts' `group` and text), and rows alone where they are not; how, stands in `resampling`.
Where fewer than FEW clusters lie behind an interval it is a rough guide: they may all be unlike those not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mipo_ray.evaluation.resampling import Array, Clusters, Rows, Sample, interval, resampler, sample_of_means
from mipo_ray.measures import Direction
from mipo_ray.storage.entries import Entry

Groups = Sequence[str] | NDArray[np.str_]
ChangeWord = Literal["rose", "fell", "better", "worse", "not distinguishable"]

LEVEL = 0.05
# Behind each interval of a run.
BOOTSTRAP_SAMPLES = 2000
NOT_DISTINGUISHABLE: Final = "not distinguishable"
FEW = 15
"""Clusters of a sample, below which an interval is a rough guide."""

# The normal distribution's 97.5th percentile, and that its 80th adds to a change that is found in 4 of 5 cases.
_NORMAL, _POWER = 1.959963984540054, 0.8416212335729143


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    n: how many prompts are behind it, not responses. p_value: two-sided, of the figure being 0, by Student's t with the
    interval's error and degrees of freedom; None where it is not known. users, questions: how many of each the prompts
    are of, where that is known.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None
    users: int | None = None
    questions: int | None = None

    @classmethod
    def of_value(cls, entry: Entry) -> Self:
        """The value of an entry; without an interval both ends are the value itself."""
        low, high = (entry.value if bound is None else bound for bound in (entry.low, entry.high))
        return cls(entry.value, low, high, entry.n, None, entry.users, entry.questions)

    @classmethod
    def of_change(cls, entry: Entry) -> Self | None:
        """The change of an entry from the base; None where it has none or has no interval."""
        if entry.change is None or entry.change_low is None or entry.change_high is None:
            return None
        figures = (entry.change, entry.change_low, entry.change_high, entry.n)
        return cls(*figures, entry.change_p_value, entry.users, entry.questions)

    def within(self, bounds: tuple[float, float] | None) -> Self:
        """With an interval inside the bounds of what is measured; None: it has none."""
        if bounds is None:
            return self
        return replace(self, low=max(self.low, bounds[0]), high=min(self.high, bounds[1]))

    def as_entry(self, unit: str, interval: str | None = None) -> Entry:
        """The entry with this value; `interval` says what made the interval, where the file is to tell."""
        figures = (self.value, self.low, self.high, self.n, unit, interval)
        return Entry(*figures, users=self.users, questions=self.questions)


def with_change(entry: Entry, change: Estimate, verdict: str | None = None) -> Entry:
    """The entry with its change from the base, and what that says."""
    moved = replace(entry, change=change.value, change_low=change.low, change_high=change.high, verdict=verdict)
    return replace(moved, change_p_value=change.p_value)


def bootstrap_mean(
    values: ArrayLike, groups: Groups, *, samples: int, seed: int, clusters: Clusters | None = None
) -> Estimate:
    """Mean over prompts of each prompt's mean value, with its interval.

    `values` [items] and `groups` [items], the prompt of each item; `samples` resamples of `clusters`, of the prompts
    where that is None. Raises ValueError when there are no items, lengths differ or a value is not finite.
    """
    names, means = group_means(values, groups)
    return _estimate(_with_ones(means), names, clusters, samples, seed)


def bootstrap_change(
    base_values: ArrayLike,
    base_groups: Groups,
    new_values: ArrayLike,
    new_groups: Groups,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Estimate:
    """Mean over prompts of (new mean - base mean) of the same prompt, with its interval.

    Only prompts present on both sides count. Raises ValueError when there are none, and as `bootstrap_mean` does.
    """
    base_names, base_means = group_means(base_values, base_groups)
    new_names, new_means = group_means(new_values, new_groups)
    base_rows, new_rows = _paired_rows(base_names, new_names)
    differences = new_means[new_rows] - base_means[base_rows]
    return _estimate(_with_ones(differences), new_names[new_rows], clusters, samples, seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    groups: Groups,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Estimate:
    """sum(numerators) / sum(denominators) over all items, with its interval: nats per token, for example.

    All three are [items]. A ratio of sums gives every token the same weight, whatever the length of its response.
    Raises ValueError when a denominator is not above 0, and as `bootstrap_mean` does.
    """
    names, sums = _group_ratio_sums(numerators, denominators, groups)
    return _estimate(sums, names, clusters, samples, seed)


def bootstrap_ratio_change(
    base_numerators: ArrayLike,
    base_denominators: ArrayLike,
    base_groups: Groups,
    new_numerators: ArrayLike,
    new_denominators: ArrayLike,
    new_groups: Groups,
    *,
    samples: int,
    seed: int,
    clusters: Clusters | None = None,
) -> Estimate:
    """New ratio of sums minus base ratio of sums over the prompts present in both, with its interval."""
    base_names, base_sums = _group_ratio_sums(base_numerators, base_denominators, base_groups)
    new_names, new_sums = _group_ratio_sums(new_numerators, new_denominators, new_groups)
    base_rows, new_rows = _paired_rows(base_names, new_names)
    both = np.concatenate([new_sums[new_rows], base_sums[base_rows]], axis=1)
    return _estimate(both, new_names[new_rows], clusters, samples, seed)


def bootstrap_seeds(
    table: Array, items: Sequence[str], *, samples: int, seed: int, clusters: Clusters | None = None
) -> Estimate:
    """Mean of a table [seeds, items], of which the seeds of training were drawn as the items were, with its interval.

    The variance is that of the items' means over the seeds by `clusters`, plus that of the seeds' means; what is
    peculiar to single cells is in both, and counts a little too much. One seed: items alone are resampled.
    """
    rows, n = _rows(_with_ones(table.mean(axis=0)), items, clusters), len(items)
    generator = resampler(seed)
    parts, variance = rows.samples(samples, generator)
    if len(table) > 1:
        of_seeds = sample_of_means(table.mean(axis=1), samples, generator)
        parts, variance = [*parts, of_seeds], variance + of_seeds.variance
    return _as_estimate(rows, parts, variance, n)


def detectable_change(base: Entry) -> float | None:
    """The smallest change that held-out prompts like these would probably show, by the base's own figure; None where
    that says nothing: it has no interval, or one of no width.

    An approximation: the change is taken to have the error of the base's figure, which is so where the base's and the
    policy's figures of a row are correlated by one half. With that error a two-sided test at 5 % finds a change of
    (1.96 + 0.84) errors in 4 of 5 cases: 1.43 times half the width of the base's interval.
    """
    if base.low is None or base.high is None or base.high <= base.low:
        return None
    return (base.high - base.low) / 2 * (1 + _POWER / _NORMAL)


def clusters_behind(entry: Entry | Estimate) -> str:
    """What a figure's interval is over, for people: "20 users and 28 questions", "12 prompts"."""
    named = [(entry.users, "user"), (entry.questions, "question")]
    known = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in named if count is not None]
    return " and ".join(known) or f"{entry.n} prompt{'' if entry.n == 1 else 's'}"


def is_on_few(entry: Entry | Estimate) -> bool:
    """Whether fewer than FEW users, questions or, where neither is known, prompts are behind an interval."""
    known = [count for count in (entry.users, entry.questions) if count is not None]
    return min(known or [entry.n]) < FEW


def change_word(entry: Entry, better: Direction = "neither") -> str:
    """What an entry's change from the base says: its verdict, or what its interval says and, of an exploratory measure,
    the p-value corrected for their number; "" without a change that has an interval."""
    change = Estimate.of_change(entry)
    if entry.verdict is not None or change is None:
        return entry.verdict or ""
    return describe_change(change, better, entry.holm_p_value)


def describe_change(change: Estimate, better: Direction = "neither", p_value: float | None = None) -> ChangeWord:
    """What a paired change says: a difference needs an interval on one side of zero and at least two items.

    With `p_value` it also needs p < 0.05: McNemar's, for accuracy, where the bootstrap alone is too sure when only a
    handful of items changed; one corrected for the number of comparisons, for an exploratory measure. A measure that
    has a better direction is then "better" or "worse", any other "rose" or "fell".
    """
    unclear = change.n < 2 or change.low <= 0.0 <= change.high
    if unclear or (p_value is not None and p_value >= LEVEL):
        return NOT_DISTINGUISHABLE
    rose = change.low > 0.0
    if better == "neither":
        return "rose" if rose else "fell"
    return "better" if rose == (better == "higher") else "worse"


def word_against(word: str, other: str) -> str:
    """The word with what was compared: "better than the base", "not distinguishable from the base"."""
    return f"{word} {'from' if word == NOT_DISTINGUISHABLE else 'than'} {other}"


def group_means(values: ArrayLike, groups: Groups) -> tuple[NDArray[np.str_], Array]:
    """Sorted prompt names and each prompt's mean value; raises ValueError as `bootstrap_mean` does."""
    names, rows, (array,) = _grouped(groups, values=values)
    means: Array = np.bincount(rows, weights=array) / np.bincount(rows)
    return names, means


def _group_ratio_sums(numerators: ArrayLike, denominators: ArrayLike, groups: Groups) -> tuple[NDArray[np.str_], Array]:
    """Prompt names and their sums, [prompts, 2]: numerator, denominator."""
    names, rows, (top, bottom) = _grouped(groups, numerators=numerators, denominators=denominators)
    if (bottom <= 0).any():
        item = int(np.argmax(bottom <= 0))
        raise ValueError(
            f"denominators: expected more than 0, found {bottom[item]:g} for item {item} of {groups[item]!r}"
        )
    sums = [np.bincount(rows, weights=column) for column in (top, bottom)]
    return names, np.stack(sums, axis=1, dtype=np.float64)


def _grouped(groups: Groups, **columns: ArrayLike) -> tuple[NDArray[np.str_], NDArray[np.intp], list[Array]]:
    """Sorted group names, each item's row in them, and the columns as checked float64 arrays [items]."""
    names, rows = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    arrays = []
    for name, column in columns.items():
        array = np.asarray(column, dtype=np.float64)
        if array.shape != rows.shape or array.ndim != 1 or not len(array):
            raise ValueError(
                f"{name}: expected one value for each of at least one item; found shapes {array.shape} and {rows.shape}"
            )
        if not np.isfinite(array).all():
            item = int(np.argmin(np.isfinite(array)))
            raise ValueError(
                f"{name}: expected finite numbers, found {array[item]} for item {item} of {groups[item]!r}"
            )
        arrays.append(array)
    return names, rows, arrays


def _paired_rows(base: NDArray[np.str_], new: NDArray[np.str_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    common, base_rows, new_rows = np.intersect1d(base, new, assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError(
            f"no prompt was measured on both sides: the base has {len(base)} prompts (first {base[0]!r}), "
            f"the other {len(new)} (first {new[0]!r})"
        )
    return base_rows, new_rows


def _rows(columns: Array, names: Sequence[str] | NDArray[np.str_], clusters: Clusters | None) -> Rows:
    if clusters is None:
        return Rows(columns)
    return Rows(columns, *clusters.labels([str(name) for name in names]))


def _estimate(columns: Array, names: NDArray[np.str_], clusters: Clusters | None, samples: int, seed: int) -> Estimate:
    rows = _rows(columns, names, clusters)
    parts, variance = rows.samples(samples, resampler(seed))
    return _as_estimate(rows, parts, variance, len(columns))


def _as_estimate(rows: Rows, parts: Sequence[Sample], variance: float, n: int) -> Estimate:
    found = interval(rows.value, parts, variance)
    counts = [None if labels is None else int(labels.max()) + 1 for labels in (rows.users, rows.questions)]
    return Estimate(rows.value, found.low, found.high, n, found.p_value, *counts)


def _with_ones(values: Array) -> Array:
    """The columns of a mean."""
    return np.stack([values, np.ones(len(values))], axis=1)
