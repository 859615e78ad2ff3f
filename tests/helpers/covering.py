"""What a test runs on every push, and what more where FULL_PRODUCTS=1 is set.

Faults of a combination of factors mostly show in a pair of its values: of every push are a few that hold every pair.
`make nightly` runs the full products.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

Combination = tuple[Any, ...]


def combinations(*factors: Sequence[Any]) -> list[Combination]:
    """What a test runs: the full product at night, otherwise a part of it that holds every pair of values."""
    full = os.environ.get("FULL_PRODUCTS") == "1"
    return list(itertools.product(*factors)) if full else pairwise(*factors)


def by_night(values: Sequence[Any], of_every_push: Sequence[Any]) -> list[Any]:
    """What a test runs: `of_every_push` alone, and at night the others as well."""
    return [*of_every_push, *(values if os.environ.get("FULL_PRODUCTS") == "1" else ())]


def pairwise(*factors: Sequence[Any]) -> list[Combination]:
    """Combinations of two or more factors in which every two values meet; the next one always adds most pairs."""
    # By positions, since values need not be hashable.
    product = list(itertools.product(*(range(len(factor)) for factor in factors)))
    missing = set().union(*map(_pairs, product))
    chosen = []
    while missing:
        best = max(product, key=lambda positions: len(_pairs(positions) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(factor[at] for factor, at in zip(factors, positions, strict=True)) for positions in sorted(chosen)]


def _pairs(positions: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(itertools.combinations(enumerate(positions), 2))
