"""Seeded derangements: for every row of a block other rows that it may be mismatched with. Pure numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def derangement(texts: Sequence[str], groups: Sequence[str], seed: int, count: int = 1) -> np.ndarray:
    """For each row `count` seeded random partner rows: int64 [rows, count], -1 where no admissible partner is left.

    Row j is admissible for row i when their texts differ and they do not share a non-empty group; so no row is its own
    partner. The partners of one row differ in their texts. In each column, as many rows as possible get a partner that
    no other row has there: it is a permutation whenever the rows, and the columns before it, admit one. A row left over
    then reuses a random admissible partner.

    A random permutation is kept where it is admissible and completed to a maximum bipartite matching by shortest
    augmenting paths (Berge 1957), in O(rows) memory. The draw is random but not exactly uniform over derangements.
    """
    if len(texts) != len(groups):
        raise ValueError(f"expected one group per text, found {len(texts)} texts and {len(groups)} groups")
    rows = len(texts)
    random = np.random.default_rng(seed)
    text_class = classes(texts)
    group_class = classes(groups)
    grouped = np.array([group != "" for group in groups], dtype=bool)
    partners = np.full((rows, count), -1, dtype=np.int64)
    for column in range(count):
        # -1 is no text's class, so that a partner that was not found forbids nothing.
        earlier = np.where(partners[:, :column] >= 0, text_class[partners[:, :column]], -1)
        partners[:, column] = _matching(text_class, group_class, grouped, earlier, random)
    return partners


def classes(values: Sequence[str]) -> np.ndarray:
    """int64 [rows]: equal numbers for equal values."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _matching(
    text_class: np.ndarray,
    group_class: np.ndarray,
    grouped: np.ndarray,
    earlier: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """One partner for each row, int64 [rows]; `earlier` [rows, columns] are texts that the row has had already."""
    rows = len(text_class)

    def admissible(row: int) -> np.ndarray:
        other_group = (group_class != group_class[row]) | ~grouped
        fresh = (text_class != text_class[row]) & other_group
        for taken in earlier[row]:
            fresh &= text_class != taken
        return fresh

    shuffled = random.permutation(rows)
    kept = (text_class[shuffled] != text_class) & ((group_class[shuffled] != group_class) | ~grouped)
    kept &= (text_class[shuffled][:, None] != earlier).all(axis=1)
    partner = np.where(kept, shuffled, -1)
    holder = np.full(rows, -1, dtype=np.int64)  # holder[j]: the row whose partner is j
    holder[shuffled[kept]] = np.flatnonzero(kept)

    # Partners that a failed search reached lie on no augmenting path of any later search either.
    exhausted = np.zeros(rows, dtype=bool)
    for row in random.permutation(np.flatnonzero(partner < 0)):
        _augment(int(row), admissible, partner, holder, exhausted, random)
    for row in np.flatnonzero(partner < 0):
        choices = np.flatnonzero(admissible(int(row)))
        if len(choices):
            partner[row] = random.choice(choices)
    return partner


def _augment(
    start: int,
    admissible: Callable[[int], np.ndarray],
    partner: np.ndarray,
    holder: np.ndarray,
    exhausted: np.ndarray,
    random: np.random.Generator,
) -> None:
    """Gives `start` an unused partner by moving other rows to new partners along a shortest augmenting path.

    Breadth first from `start`: a row reaches its admissible partners, a used partner reaches the row that holds it.
    Changes `partner` and `holder` on success, `exhausted` on failure.
    """
    reached = exhausted.copy()
    reached_from = np.full(len(partner), -1, dtype=np.int64)
    frontier = [start]
    while frontier:
        following: list[int] = []
        for row in frontier:
            fresh = random.permutation(np.flatnonzero(admissible(row) & ~reached))
            reached[fresh] = True
            reached_from[fresh] = row
            unused = fresh[holder[fresh] < 0]
            if len(unused):
                _move_partners(int(unused[0]), start, partner, holder, reached_from)
                return
            following.extend(int(other) for other in holder[fresh])
        frontier = following
    exhausted |= reached


def _move_partners(free: int, start: int, partner: np.ndarray, holder: np.ndarray, reached_from: np.ndarray) -> None:
    while True:
        row = int(reached_from[free])
        released = int(partner[row])
        partner[row], holder[free] = free, row
        if row == start:
            return
        free = released
