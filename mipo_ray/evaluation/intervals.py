"""95 % bootstrap intervals of held-out figures, with the prompt as the unit that is resampled.

Two responses to one prompt are alike, so they are no two independent measurements: prompts are drawn with replacement,
each with all its responses (cluster bootstrap), and the interval is the 2.5th to 97.5th percentile of the resampled
figures (percentile bootstrap; Efron and Tibshirani 1993, chapter 13). With few prompts (below about 15) percentile
intervals are somewhat too narrow. All in float64; the same seed gives the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mipo_ray.measures import Direction
from mipo_ray.storage.entries import Entry

Array = NDArray[np.float64]
Groups = Sequence[str] | NDArray[np.str_]
ChangeWord = Literal["rose", "fell", "better", "worse", "not distinguishable"]

LEVEL = 0.05
# Behind each interval of a run.
BOOTSTRAP_SAMPLES = 2000
NOT_DISTINGUISHABLE: Final = "not distinguishable"

_PERCENTILES = (2.5, 97.5)
# Bounds the memory of one step of resampling: indices drawn at once.
_INDICES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `n` is the number of prompts behind it, not of responses."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of_value(cls, entry: Entry) -> Self:
        """The value of an entry; without an interval both ends are the value itself."""
        low, high = (entry.value if bound is None else bound for bound in (entry.low, entry.high))
        return cls(entry.value, low, high, entry.n)

    @classmethod
    def of_change(cls, entry: Entry) -> Self | None:
        """The change of an entry from the base; None where it has none or has no interval."""
        if entry.change is None or entry.change_low is None or entry.change_high is None:
            return None
        return cls(entry.change, entry.change_low, entry.change_high, entry.n)

    def as_entry(self, unit: str, interval: str | None = None) -> Entry:
        """The entry with this value; `interval` says what made the interval, where the file is to tell."""
        return Entry(self.value, self.low, self.high, self.n, unit, interval)


def with_change(entry: Entry, change: Estimate, verdict: str | None = None) -> Entry:
    """The entry with its change from the base, and what that says."""
    return replace(entry, change=change.value, change_low=change.low, change_high=change.high, verdict=verdict)


def bootstrap_mean(values: ArrayLike, groups: Groups, *, samples: int, seed: int) -> Estimate:
    """Mean over prompts of each prompt's mean value, with its interval.

    `values` [items] and `groups` [items], the prompt of each item; `samples` resamples. Raises ValueError when there
    are no items, lengths differ or a value is not finite.
    """
    _, means = group_means(values, groups)
    resampled = _resample_sums(means[:, None], samples, seed)[:, 0] / len(means)
    return _estimate(float(means.mean()), resampled, len(means))


def bootstrap_change(
    base_values: ArrayLike,
    base_groups: Groups,
    new_values: ArrayLike,
    new_groups: Groups,
    *,
    samples: int,
    seed: int,
) -> Estimate:
    """Mean over prompts of (new mean - base mean) of the same prompt, with its interval.

    Only prompts present on both sides count. Raises ValueError when there are none, and as `bootstrap_mean` does.
    """
    base_names, base_means = group_means(base_values, base_groups)
    new_names, new_means = group_means(new_values, new_groups)
    base_rows, new_rows = _paired_rows(base_names, new_names)
    differences = new_means[new_rows] - base_means[base_rows]
    resampled = _resample_sums(differences[:, None], samples, seed)[:, 0] / len(differences)
    return _estimate(float(differences.mean()), resampled, len(differences))


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, groups: Groups, *, samples: int, seed: int
) -> Estimate:
    """sum(numerators) / sum(denominators) over all items, with its interval: nats per token, for example.

    All three are [items]. A ratio of sums gives every token the same weight, whatever the length of its response.
    Raises ValueError when a denominator is not above 0, and as `bootstrap_mean` does.
    """
    _, sums = _group_ratio_sums(numerators, denominators, groups)
    resampled = _resample_sums(sums, samples, seed)
    return _estimate(_ratio(sums.sum(axis=0)), resampled[:, 0] / resampled[:, 1], len(sums))


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
) -> Estimate:
    """New ratio of sums minus base ratio of sums over the prompts present in both, with its interval."""
    base_names, base_sums = _group_ratio_sums(base_numerators, base_denominators, base_groups)
    new_names, new_sums = _group_ratio_sums(new_numerators, new_denominators, new_groups)
    base_rows, new_rows = _paired_rows(base_names, new_names)
    both = np.concatenate([new_sums[new_rows], base_sums[base_rows]], axis=1)
    resampled = _resample_sums(both, samples, seed)
    changes = resampled[:, 0] / resampled[:, 1] - resampled[:, 2] / resampled[:, 3]
    totals = both.sum(axis=0)
    return _estimate(_ratio(totals[:2]) - _ratio(totals[2:]), changes, len(both))


def describe_change(change: Estimate, better: Direction = "neither", p_value: float | None = None) -> ChangeWord:
    """What a paired change says: a difference needs an interval on one side of zero and at least two items.

    With `p_value` (McNemar's, for accuracy) it also needs p < 0.05: the bootstrap alone is too sure where only a
    handful of items changed. A measure that has a better direction is then "better" or "worse", any other "rose" or
    "fell".
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


def _resample_sums(columns: Array, samples: int, seed: int) -> Array:
    """Column sums of `samples` draws of all rows with replacement: [prompts, columns] -> [samples, columns]."""
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, found {samples}")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = len(columns)
    step = max(1, _INDICES_AT_ONCE // rows)
    sums = np.empty((samples, columns.shape[1]))
    for start in range(0, samples, step):
        drawn = generator.integers(rows, size=(min(step, samples - start), rows))
        sums[start : start + step] = columns[drawn].sum(axis=1)
    return sums


def _estimate(value: float, resampled: Array, n: int) -> Estimate:
    low, high = np.percentile(resampled, _PERCENTILES)
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _ratio(sums: Array) -> float:
    return float(sums[0] / sums[1])
