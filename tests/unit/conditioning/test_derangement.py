"""Derangements: no conflict, as many different partners as possible, the same for the same seed."""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.conditioning.derangement import derangement

Tables = tuple[list[str], list[str]]


@st.composite
def tables(draw: st.DrawFn, most_rows: int) -> Tables:
    """Texts and groups with few or many repetitions; half of the tables are ungrouped."""
    rows = draw(st.integers(2, most_rows))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    different_texts = draw(st.integers(1, 2 * rows))
    different_groups = draw(st.integers(1, rows))
    texts = [f"text {number}" for number in generator.integers(different_texts, size=rows)]
    if draw(st.booleans()):
        return texts, [""] * rows
    return texts, [f"group {number}" if number else "" for number in generator.integers(different_groups, size=rows)]


def conflict(table: Tables, first: int, second: int) -> bool:
    texts, groups = table
    return texts[first] == texts[second] or (groups[first] != "" and groups[first] == groups[second])


def closure_classes(table: Tables) -> list[set[int]]:
    """Connected components of 'equal text or same group', by an independent library."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(table[0])))
    for row, (text, group) in enumerate(zip(*table, strict=True)):
        graph.add_edge(row, ("text", text))
        if group:
            graph.add_edge(row, ("group", group))
    return [{node for node in part if isinstance(node, int)} for part in networkx.connected_components(graph)]


def most_rows_with_a_partner_of_their_own(table: Tables) -> int:
    """Size of a maximum matching between rows and admissible partners, by an independent library."""
    rows = range(len(table[0]))
    graph = networkx.Graph()
    graph.add_nodes_from(("row", row) for row in rows)
    for row, other in itertools.product(rows, rows):
        if not conflict(table, row, other):
            graph.add_edge(("row", row), ("partner", other))
    matching = networkx.bipartite.hopcroft_karp_matching(graph, [("row", row) for row in rows])
    return len(matching) // 2


@settings(max_examples=60, deadline=None)
@given(tables(most_rows=400), st.integers(0, 2**62))
def test_no_partner_conflicts_and_none_is_missing_without_need(table: Tables, seed: int) -> None:
    partner = derangement(*table, seed)[:, 0]
    assert partner.dtype == np.int64
    for row, other in enumerate(partner):
        if other >= 0:
            assert row != other
            assert not conflict(table, row, int(other))
        else:
            assert all(conflict(table, row, candidate) for candidate in range(len(partner)))


@settings(max_examples=60, deadline=None)
@given(tables(most_rows=400), st.integers(0, 2**62))
def test_every_row_is_used_once_when_no_class_is_larger_than_half(table: Tables, seed: int) -> None:
    partner = derangement(*table, seed)[:, 0]
    if max(len(part) for part in closure_classes(table)) <= len(partner) / 2:
        assert sorted(partner) == list(range(len(partner)))


@settings(max_examples=60, deadline=None)
@given(tables(most_rows=40), st.integers(0, 2**62))
def test_as_many_rows_as_possible_have_a_partner_of_their_own(table: Tables, seed: int) -> None:
    partner = derangement(*table, seed)[:, 0]
    assert len(set(partner[partner >= 0])) == most_rows_with_a_partner_of_their_own(table)


@settings(max_examples=30, deadline=None)
@given(tables(most_rows=60), st.integers(0, 2**62))
def test_the_same_seed_gives_the_same_derangement(table: Tables, seed: int) -> None:
    np.testing.assert_array_equal(derangement(*table, seed), derangement(*table, seed))


def test_another_seed_gives_another_derangement() -> None:
    texts, groups = [f"text {row}" for row in range(64)], [""] * 64
    assert any(derangement(texts, groups, 0)[:, 0] != derangement(texts, groups, 1)[:, 0])


def test_every_partner_comes_about_as_often_as_any_other() -> None:
    texts, groups = list("abcdef"), [""] * 6
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), derangement(texts, groups, seed)[:, 0]] += 1
    assert (counts.diagonal() == 0).all()
    off_diagonal = counts[~np.eye(6, dtype=bool)]
    # 600 each; the binomial standard error is 22, and the draw is not exactly uniform.
    assert off_diagonal.min() > 480
    assert off_diagonal.max() < 720


def test_rows_of_a_class_larger_than_half_reuse_partners() -> None:
    texts = ["same"] * 6 + ["other 1", "other 2"]
    partner = derangement(texts, [""] * 8, 3)[:, 0]
    assert set(partner[:6]) <= {6, 7}
    assert set(partner[6:]) <= set(range(6))
    assert len(set(partner[:6])) == 2


def test_one_class_has_no_partners() -> None:
    assert derangement(["a", "b", "c"], ["g", "g", "g"], 0).tolist() == [[-1], [-1], [-1]]
    assert derangement(["a"], [""], 0).tolist() == [[-1]]
    assert derangement([], [], 0).tolist() == []


def test_texts_and_groups_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 groups"):
        derangement(["a", "b"], [""], 0)


@settings(max_examples=60, deadline=None)
@given(tables(most_rows=120), st.integers(0, 2**62), st.integers(2, 4))
def test_several_partners_of_a_row_have_different_texts_and_none_is_missing_without_need(
    table: Tables, seed: int, count: int
) -> None:
    partners = derangement(*table, seed, count)
    assert partners.shape == (len(table[0]), count)
    for row, others in enumerate(partners.tolist()):
        found = [other for other in others if other >= 0]
        assert not any(conflict(table, row, other) for other in found)
        assert len({table[0][other] for other in found}) == len(found)
        available = {text for other, text in enumerate(table[0]) if not conflict(table, row, other)}
        assert len(found) == min(count, len(available))


def test_each_of_several_columns_is_a_permutation_where_texts_are_plenty() -> None:
    partners = derangement([f"text {row}" for row in range(200)], [""] * 200, 1, 5)
    for column in range(5):
        assert sorted(partners[:, column]) == list(range(200))


@pytest.mark.parametrize("different", [3, 50, 5000])
def test_five_thousand_rows(different: int) -> None:
    random = np.random.default_rng(different)
    texts = [f"text {number}" for number in random.integers(different, size=5000)]
    groups = [f"group {number}" for number in random.integers(different, size=5000)]
    partner = derangement(texts, groups, 0)[:, 0]
    assert sorted(partner) == list(range(5000))
    assert not any(conflict((texts, groups), row, int(other)) for row, other in enumerate(partner))
