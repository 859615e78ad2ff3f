"""Derangements and the conditioning strategies over one block."""

from __future__ import annotations

import itertools
from typing import Any

import networkx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.conditioning import STRATEGIES, condition_block, derangement, rows_per_block, swapped_response
from mipo_ray.seeds import stable_seed

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
    partner = derangement(*table, seed)
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
    partner = derangement(*table, seed)
    if max(len(part) for part in closure_classes(table)) <= len(partner) / 2:
        assert sorted(partner) == list(range(len(partner)))


@settings(max_examples=60, deadline=None)
@given(tables(most_rows=40), st.integers(0, 2**62))
def test_as_many_rows_as_possible_have_a_partner_of_their_own(table: Tables, seed: int) -> None:
    partner = derangement(*table, seed)
    assert len(set(partner[partner >= 0])) == most_rows_with_a_partner_of_their_own(table)


@settings(max_examples=30, deadline=None)
@given(tables(most_rows=60), st.integers(0, 2**62))
def test_the_same_seed_gives_the_same_derangement(table: Tables, seed: int) -> None:
    np.testing.assert_array_equal(derangement(*table, seed), derangement(*table, seed))


def test_another_seed_gives_another_derangement() -> None:
    texts, groups = [f"text {row}" for row in range(64)], [""] * 64
    assert any(derangement(texts, groups, 0) != derangement(texts, groups, 1))


def test_every_partner_comes_about_as_often_as_any_other() -> None:
    texts, groups = list("abcdef"), [""] * 6
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), derangement(texts, groups, seed)] += 1
    assert (counts.diagonal() == 0).all()
    off_diagonal = counts[~np.eye(6, dtype=bool)]
    # 600 each; the binomial standard error is 22, and the draw is not exactly uniform.
    assert off_diagonal.min() > 480
    assert off_diagonal.max() < 720


def test_rows_of_a_class_larger_than_half_reuse_partners() -> None:
    texts = ["same"] * 6 + ["other 1", "other 2"]
    partner = derangement(texts, [""] * 8, 3)
    assert set(partner[:6]) <= {6, 7}
    assert set(partner[6:]) <= set(range(6))
    assert len(set(partner[:6])) == 2


def test_one_class_has_no_partners() -> None:
    assert derangement(["a", "b", "c"], ["g", "g", "g"], 0).tolist() == [-1, -1, -1]
    assert derangement(["a"], [""], 0).tolist() == [-1]
    assert derangement([], [], 0).tolist() == []


def test_texts_and_groups_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 groups"):
        derangement(["a", "b"], [""], 0)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def block(contexts: list[str], groups: list[str] | None = None) -> pa.Table:
    rows = range(len(contexts))
    questions = [f"question {row}" for row in rows]
    prompts = [f"{context} {question}".strip() for context, question in zip(contexts, questions, strict=True)]
    return pa.table(
        {
            "prompt_id": pa.array([f"p{row}" for row in rows], pa.string()),
            "messages": pa.array([chat(prompt) for prompt in prompts], MESSAGES),
            "question_messages": pa.array([chat(question) for question in questions], MESSAGES),
            "context": pa.array(contexts, pa.string()),
            "group": pa.array(groups or [""] * len(contexts), pa.string()),
            "text": pa.array(prompts, pa.string()),
            "note": pa.array([row * 10 for row in rows], pa.int64()),
        }
    )


def test_missing_context_asks_the_same_question_without_the_context() -> None:
    rows = condition_block(block(["I ski.", "", "I row."]), "missing_context", seed=0, round_index=0).to_pylist()
    assert [row["mismatched_messages"] for row in rows] == [chat("question 0"), [], chat("question 2")]
    assert [row["dropped"] for row in rows] == ["", "no_context", ""]
    assert [row["mismatched_prompt_id"] for row in rows] == ["", "", ""]
    assert [row["partner_index"] for row in rows] == [-1, -1, -1]


@pytest.mark.parametrize("strategy", ["random_prompt", "swapped_response"])
def test_another_prompt_of_another_group_is_the_mismatch(strategy: str) -> None:
    groups = ["a", "a", "b", "b", "", ""]
    table = block([""] * 6, groups)
    rows = condition_block(table, strategy, seed=0, round_index=0).to_pylist()
    by_id = {row["prompt_id"]: row for row in table.to_pylist()}
    assert sorted(row["mismatched_prompt_id"] for row in rows) == sorted(by_id)
    for row in rows:
        other = by_id[row["mismatched_prompt_id"]]
        assert row["mismatched_messages"] == other["messages"]
        assert row["prompt_id"] != other["prompt_id"]
        assert row["group"] == "" or row["group"] != other["group"]
        if strategy == "random_prompt":
            assert row["partner_index"] == -1
        else:
            assert rows[row["partner_index"]]["prompt_id"] == other["prompt_id"]


def test_swapped_response_and_random_prompt_draw_the_same_prompts_for_the_same_seed() -> None:
    columns = block([""] * 8).to_pydict()
    swapped, fresh = swapped_response(columns, 5), STRATEGIES["random_prompt"].condition(columns, 5)
    assert swapped.mismatched_prompt_id == fresh.mismatched_prompt_id
    assert (swapped.partner >= 0).all()
    assert (fresh.partner == -1).all()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_block_without_any_mismatch_is_dropped_with_the_same_schema(strategy: str) -> None:
    usable = condition_block(block(["I ski.", "I row."]), strategy, seed=0, round_index=0)
    impossible = condition_block(block([""], ["g"]), strategy, seed=0, round_index=0)
    assert impossible.schema == usable.schema
    assert impossible["dropped"].to_pylist() == [STRATEGIES[strategy].impossible]
    assert usable["dropped"].to_pylist() == ["", ""]


def test_other_columns_and_the_order_of_rows_stay() -> None:
    table = block(["I ski."] * 5)
    conditioned = condition_block(table, "random_prompt", seed=0, round_index=0)
    assert conditioned.select(table.column_names).equals(table)
    assert conditioned.schema.field("partner_index").type == pa.int32()


def test_the_draw_depends_on_seed_round_and_the_rows_of_the_block() -> None:
    def draw(table: pa.Table, **changes: Any) -> list[str]:
        arguments = {"seed": 0, "round_index": 0, **changes}
        return condition_block(table, "random_prompt", **arguments)["mismatched_prompt_id"].to_pylist()

    table = block([""] * 32)
    assert draw(table) == draw(table)
    assert draw(table) != draw(table, seed=1)
    assert draw(table) != draw(table, round_index=1)
    renamed = table.set_column(0, "prompt_id", pa.array([f"q{row}" for row in range(32)]))
    assert [name[1:] for name in draw(renamed)] != [name[1:] for name in draw(table)]


def test_block_ids_name_the_rows_in_their_order() -> None:
    table = block([""] * 4)
    ids = {
        condition_block(part, "random_prompt", 0, 0)["block_id"][0].as_py()
        for part in (table, table.take([1, 0, 2, 3]), table.slice(0, 3))
    }
    assert len(ids) == 3
    assert all(len(block_id) == 16 and int(block_id, 16) >= 0 for block_id in ids)


def test_stable_seed_is_fixed_for_ever_and_tells_its_parts_apart() -> None:
    # From `printf '["conditioning", 0, 1]' | sha256sum`: first 8 bytes, shifted right by one bit.
    assert stable_seed("conditioning", 0, 1) == 0x61858BA548906C42 >> 1
    assert stable_seed("ab", "c") != stable_seed("a", "bc")
    assert stable_seed(1) != stable_seed("1")
    assert 0 <= stable_seed("x") < 2**63


def test_rows_per_block() -> None:
    assert rows_per_block(320, 64) == 64
    assert rows_per_block(337, 64) == 68  # 337 = 4 * 68 + 65; 64 to 67 leave 17, 12, 7 and 2
    assert rows_per_block(127, 64) == 127
    assert rows_per_block(128, 64) == 64
    assert rows_per_block(1, 64) == 1


@given(st.integers(1, 5000), st.integers(2, 300))
def test_no_block_is_smaller_than_half_a_block(rows: int, block_size: int) -> None:
    size = rows_per_block(rows, block_size)
    tail = rows % size
    assert tail == 0 or 2 * tail >= size
    assert size >= min(rows, block_size)
    if rows >= 2 * block_size:
        assert all(0 < 2 * (rows % smaller) < smaller for smaller in range(block_size, size))
