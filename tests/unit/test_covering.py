"""Pairwise sets of combinations: smaller than the product, and every pair of values meets.

python -m pytest tests/unit/test_covering.py
"""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.covering import by_night, combinations, pairwise


@pytest.mark.parametrize(("sizes", "most"), [((3, 4, 4, 2), 20), ((4, 2, 3), 13), ((2, 2, 2), 5)], ids=str)
def test_every_two_values_meet(sizes: tuple[int, ...], most: int) -> None:
    factors = [[f"{name}{value}" for value in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    found = pairwise(*factors)
    assert len(found) == len(set(found)) <= most
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        met = {(combination[i], combination[j]) for combination in found}
        assert met == set(itertools.product(first, second))


def test_the_night_has_the_full_product(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = ["ab", "cd", "ef"]
    monkeypatch.delenv("FULL_PRODUCTS", raising=False)
    assert combinations(*factors) == pairwise(*factors)
    monkeypatch.setenv("FULL_PRODUCTS", "1")
    assert combinations(*factors) == list(itertools.product(*factors))


def test_what_waits_for_the_night_runs_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULL_PRODUCTS", raising=False)
    assert by_night(["a", "b"], ["c"]) == ["c"]
    monkeypatch.setenv("FULL_PRODUCTS", "1")
    assert by_night(["a", "b"], ["c"]) == ["c", "a", "b"]
