"""Figures from sums that add up over blocks: moments, quantiles, histograms and duplicates. Plain numpy.

All sums are whole numbers, so that figures are the same however the values were split into blocks.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTS = (5, 25, 50, 75, 95)
UNIT = 2**20  # fractions are summed in units of 1 / UNIT: each term is rounded by at most 5e-7
HISTOGRAM_BINS = 40
_Z = 1.959964  # 97.5 % quantile of the normal distribution

Counts = dict[str, int]  # by name, or how often by value: keys are text, as sums travel as JSON


def power_sums(values: NDArray[np.float64]) -> Counts:
    """Count, sum and sum of squares as whole numbers, in units of 1 / UNIT and its square."""
    units = np.rint(values * UNIT).astype(np.int64).tolist()  # Python's numbers: squares would overflow
    return {"count": len(units), "sum": sum(units), "squares": sum(unit * unit for unit in units)}


def power_sums_of_counts(counts: dict[int, int]) -> Counts:
    """`power_sums` of whole numbers, from how often each of them is there."""
    return {
        "count": sum(counts.values()),
        "sum": sum(value * UNIT * count for value, count in counts.items()),
        "squares": sum((value * UNIT) ** 2 * count for value, count in counts.items()),
    }


def moments_of(powers: Counts) -> dict[str, float | None]:
    """Mean, its normal 95 % interval (low, high) and the standard deviation (n - 1) of what `power_sums` summed.

    None where there are too few values: of none, or of one alone.
    """
    n, total = powers["count"], powers["sum"]
    mean = ratio(total, n * UNIT)
    if mean is None or n < 2:
        return {"mean": mean, "low": None, "high": None, "standard_deviation": None}
    deviation = math.sqrt((n * powers["squares"] - total * total) / (n * (n - 1))) / UNIT
    reach = _Z * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "standard_deviation": deviation}


def quantiles_of(counts: dict[int, int]) -> dict[str, int]:
    """Percent -> the smallest value that so many percent of all do not exceed; {} of nothing."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    ranks = [-(-percent * int(reached[-1]) // 100) for percent in PERCENTS]
    found = values[np.searchsorted(reached, ranks)]
    return {str(percent): int(value) for percent, value in zip(PERCENTS, found, strict=True)}


def histogram_of(series: Sequence[dict[int, int]]) -> tuple[list[int], list[list[int]]]:
    """Edges and, for each of the series (value -> how often), the counts in [edge, next edge).

    At most HISTOGRAM_BINS bins, the same for all series, as narrow as 1, 2 or 5 times a power of ten allows.
    """
    values = [value for counts in series for value in counts]
    if not values:
        return [], [[] for _ in series]
    widths = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(width for width in widths if max(values) // width - min(values) // width < HISTOGRAM_BINS)
    first, last = min(values) // width, max(values) // width
    bars = [[0] * (last - first + 1) for _ in series]
    for bar, counts in zip(bars, series, strict=True):
        for value, count in counts.items():
            bar[value // width - first] += count
    return [index * width for index in range(first, last + 2)], bars


def add_sums(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds the numbers of `part` to those of the same name in `total`, at any depth.

    Texts are 64-bit hashes in base64: `total` gets a list of uint64 arrays, 8 bytes a hash.
    """
    for name, value in part.items():
        if isinstance(value, dict):
            add_sums(total.setdefault(name, {}), value)
        elif isinstance(value, str):
            total.setdefault(name, []).append(np.frombuffer(base64.b64decode(value), dtype=np.uint64))
        else:
            total[name] = total.get(name, 0) + value


def count_values(values: NDArray[np.int64]) -> Counts:
    """How often each of the values is there."""
    different, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, different.tolist()), counts.tolist(), strict=True))


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None
