"""The conditioning strategies: what each makes the mismatched response of, over random tables."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mipo_ray.conditioning.blocks import assign_strategies, condition_block, rows_per_block
from mipo_ray.conditioning.strategies import STRATEGIES
from mipo_ray.config.conditioning import ConditioningConfig, SimilarConfig
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.seeds import stable_seed

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
OPEN_BAND = SimilarConfig(min_similarity=-1.0, max_similarity=1.0)
ALL = [*STRATEGIES, "mixture"]


def config(strategy: str, **fields: Any) -> ConditioningConfig:
    if strategy == "mixture":
        fields["mixture"] = dict.fromkeys(STRATEGIES, 1.0)
    return ConditioningConfig(**{"strategy": strategy, "similar": OPEN_BAND, "fallback": "drop", **fields})


def condition(table: pa.Table, strategy: str, negatives: int = 1, **fields: Any) -> list[dict[str, Any]]:
    made = config(strategy, **fields)
    return condition_block(table, made, PromptsConfig(), seed=3, round_index=1, negatives=negatives).to_pylist()


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def block(
    contexts: list[str],
    questions: list[str] | None = None,
    groups: list[str] | None = None,
    embeddings: np.ndarray | None = None,
) -> pa.Table:
    rows = len(contexts)
    questions = questions or [f"What about matter {row}?" for row in range(rows)]
    prompts = [f"{c}\n\n{q}" if c else q for c, q in zip(contexts, questions, strict=True)]
    if embeddings is None:
        embeddings = np.random.default_rng(0).normal(size=(rows, 8))
    return pa.table(
        {
            "prompt_id": pa.array([f"p{row}" for row in range(rows)], pa.string()),
            "messages": pa.array([chat(prompt) for prompt in prompts], MESSAGES),
            "question_messages": pa.array([chat(question) for question in questions], MESSAGES),
            "context": pa.array(contexts, pa.string()),
            "group": pa.array(groups or [""] * rows, pa.string()),
            "text": pa.array([" ".join(prompt.split()) for prompt in prompts], pa.string()),
            "note": pa.array([row * 10 for row in range(rows)], pa.int64()),
            "embedding": pa.array(embeddings.astype(np.float32).tolist(), pa.list_(pa.float32())),
        }
    )


@st.composite
def blocks(draw: st.DrawFn, most_rows: int = 150) -> pa.Table:
    """Users with one or several rows and one context each, some without; repeated questions; any group structure."""
    rows = draw(st.integers(2, most_rows))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    users = random.integers(draw(st.integers(1, rows)), size=rows)
    asked = random.integers(draw(st.integers(1, 2 * rows)), size=rows)
    without = draw(st.sampled_from([0.0, 0.3, 1.0]))
    contexts = ["" if u % 10 < 10 * without else f"I keep {u} bees. I live alone." for u in users]
    questions = [f"Question {q}? Say it briefly." if q % 3 else f"Question {q}?" for q in asked]
    groups = [f"user {u}" for u in users] if draw(st.booleans()) else None
    return block(contexts, questions, groups, random.normal(size=(rows, 4)))


def check_rows(table: pa.Table, strategy: str, negatives: int) -> None:
    """What holds for every strategy: each row is there once, with K mismatches or a reason, and none is its own."""
    source = table.to_pylist()
    by_id = {row["prompt_id"]: row for row in source}
    rows = condition(table, strategy, negatives)
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in source]
    assert rows == condition(table, strategy, negatives)
    for row in rows:
        assert row["strategy"] in STRATEGIES
        assert strategy in ("mixture", row["strategy"])
        if row["dropped"]:
            assert not row["mismatched_messages"]
            assert not row["partner_index"]
            continue
        assert len(row["mismatched_messages"]) == len(row["mismatched_prompt_id"]) == negatives
        for number, (messages, other_id) in enumerate(
            zip(row["mismatched_messages"], row["mismatched_prompt_id"], strict=True)
        ):
            assert " ".join(messages[-1]["content"].split()) != row["text"]
            if other_id:
                other = by_id[other_id]
                assert other_id != row["prompt_id"]
                assert not row["group"] or row["group"] != other["group"]
                if row["strategy"] == "random_context":
                    assert other["context"].split() != row["context"].split()
                else:
                    assert messages == other["messages"]
                    assert other["text"] != row["text"]
                if row["strategy"] == "swapped_response":
                    assert source[row["partner_index"][number]]["prompt_id"] == other_id
                else:
                    assert row["partner_index"] == []


@pytest.mark.parametrize("strategy", ALL)
@settings(max_examples=25, deadline=None)
@given(table=blocks(), negatives=st.integers(1, 3))
def test_no_row_is_mismatched_with_itself_its_text_or_its_group(strategy: str, table: pa.Table, negatives: int) -> None:
    check_rows(table, strategy, negatives)


@pytest.mark.parametrize("strategy", ALL)
@settings(max_examples=3, deadline=None)
@given(table=blocks(most_rows=5000), negatives=st.integers(1, 3))
def test_large_blocks_too(strategy: str, table: pa.Table, negatives: int) -> None:
    check_rows(table, strategy, negatives)


@pytest.mark.parametrize("strategy", ALL)
def test_five_thousand_rows(strategy: str) -> None:
    random = np.random.default_rng(0)
    users = random.integers(700, size=5000)
    table = block(
        [f"I keep {user} bees. I live alone." for user in users],
        [f"Question {q}? Say it briefly." for q in random.integers(900, size=5000)],
        [f"user {user}" for user in users],
        random.normal(size=(5000, 4)),
    )
    check_rows(table, strategy, 1)
    assert not any(row["dropped"] for row in condition(table, strategy))


@pytest.mark.parametrize("strategy", ["random_prompt", "swapped_response", "random_context"])
def test_every_row_serves_as_a_mismatch_once(strategy: str) -> None:
    rows = condition(block([f"I am user {row}." for row in range(40)]), strategy)
    assert sorted(row["mismatched_prompt_id"][0] for row in rows) == sorted(row["prompt_id"] for row in rows)


@pytest.mark.parametrize("strategy", ALL)
@settings(max_examples=10, deadline=None)
@given(table=blocks(), cuts=st.lists(st.integers(1, 149), max_size=4))
def test_a_block_is_conditioned_alike_whatever_stands_beside_it(
    strategy: str, table: pa.Table, cuts: list[int]
) -> None:
    edges = sorted({0, table.num_rows, *(cut for cut in cuts if cut < table.num_rows)})
    parts = [table.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    forwards = [condition(part, strategy) for part in parts]
    backwards = [condition(part, strategy) for part in reversed(parts)][::-1]
    assert forwards == backwards
    assert [row["prompt_id"] for part in forwards for row in part] == table["prompt_id"].to_pylist()


def test_missing_context_asks_the_same_question_without_the_context() -> None:
    rows = condition(block(["I ski.", "", "I row."]), "missing_context", negatives=2)
    questions = [chat(f"What about matter {row}?") for row in range(3)]
    assert [row["mismatched_messages"] for row in rows] == [[questions[0]] * 2, [], [questions[2]] * 2]
    assert [row["dropped"] for row in rows] == ["", "no_context", ""]
    assert [row["mismatched_prompt_id"] for row in rows] == [["", ""], [], ["", ""]]


def test_random_context_asks_the_same_question_for_another_user() -> None:
    table = block(["I ski.", "", "I row.", "I  ski. "], groups=["a", "b", "c", "d"])
    rows = condition(table, "random_context")
    assert rows[0]["mismatched_messages"] == [chat("I row.\n\nWhat about matter 0?")]
    assert rows[0]["mismatched_prompt_id"] == ["p2"]
    assert rows[1]["dropped"] == "no_context"
    assert rows[2]["mismatched_messages"][0][0]["content"].endswith("\n\nWhat about matter 2?")
    assert rows[3]["mismatched_prompt_id"] == ["p2"]  # the context of p0 is the same but for white space


def test_random_context_of_one_user_alone_is_impossible() -> None:
    rows = condition(block(["I ski.", "I row."], groups=["a", "a"]), "random_context")
    assert [row["dropped"] for row in rows] == ["no_other_context"] * 2


def test_partial_prompt_leaves_out_one_sentence() -> None:
    text = "Anna has 3.5 kg of apples. Her brother Dr. Bo eats 1.2 kg. How much is left?"
    rows = condition(block([""], [text]), "partial_prompt", negatives=4)
    sentences = ["Anna has 3.5 kg of apples.", "Her brother Dr. Bo eats 1.2 kg.", "How much is left?"]
    expected = {" ".join(s for s in sentences if s != left_out) for left_out in sentences}
    found = [messages[0]["content"] for messages in rows[0]["mismatched_messages"]]
    assert set(found) <= expected
    assert len(set(found)) >= 2
    assert len(found) == 4


def test_partial_prompt_does_not_apply_to_one_sentence() -> None:
    table = block(["", ""], ["Write a haiku about the autumn rain.", "I like rain. Write a haiku about the autumn."])
    assert [row["dropped"] for row in condition(table, "partial_prompt", fallback=None)] == ["one_sentence", ""]
    rows = condition(table, "partial_prompt", fallback="random_prompt")
    assert [row["strategy"] for row in rows] == ["random_prompt", "partial_prompt"]
    assert rows[0]["mismatched_prompt_id"] == ["p1"]
    assert [row["dropped"] for row in rows] == ["", ""]


def angles(*degrees: float) -> np.ndarray:
    """Unit vectors in a plane: the cosine similarity of two is the cosine of the angle between them."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


# Each with its opposite, so that the mean is zero: what two rows have in common as all have is not counted.
SIX = angles(0, 3, 40, 180, 183, 220)


@pytest.mark.parametrize("common", [0.0, 100.0])
def test_similar_prompt_takes_the_nearest_inside_the_band(common: float) -> None:
    table = block([""] * 6, embeddings=SIX + common)
    band = SimilarConfig(neighbours=1, min_similarity=0.0, max_similarity=0.95)
    rows = condition(table, "similar_prompt", similar=band)
    assert [row["mismatched_prompt_id"] for row in rows] == [["p2"], ["p2"], ["p1"], ["p5"], ["p5"], ["p4"]]
    narrow = SimilarConfig(neighbours=1, min_similarity=0.79, max_similarity=0.95)
    rows = condition(table, "similar_prompt", similar=narrow)
    assert [row["dropped"] for row in rows] == ["no_similar_prompt", "", ""] * 2


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 80), st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3))
def test_similar_prompts_are_those_of_a_plain_search(rows: int, seed: int, neighbours: int, negatives: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(rows, 5)).astype(np.float32)
    questions = [f"Question {number}?" for number in random.integers(rows, size=rows)]
    groups = [f"g{number}" if number else "" for number in random.integers(4, size=rows)]
    table = block([""] * rows, questions, groups, vectors)
    band = SimilarConfig(neighbours=neighbours, min_similarity=-0.5, max_similarity=0.9)
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assume(np.abs(unit @ unit.T - 0.9).min() > 1e-3)
    assume(np.abs(unit @ unit.T + 0.5).min() > 1e-3)
    for index, row in enumerate(condition(table, "similar_prompt", negatives, similar=band)):
        best: dict[str, float] = {}
        for other in range(rows):
            similarity = float(unit[index] @ unit[other])
            same = questions[other] == questions[index] or (groups[index] and groups[index] == groups[other])
            if not same and -0.5 <= similarity <= 0.9:
                best[questions[other]] = max(best.get(questions[other], -1), similarity)
        allowed = sorted(best, key=lambda text: -best[text])[: max(neighbours, negatives)]
        if len(allowed) < negatives:
            assert row["dropped"] == "no_similar_prompt"
        else:
            drawn = [messages[0]["content"] for messages in row["mismatched_messages"]]
            assert len(set(drawn)) == negatives
            # The block's similarities are rounded to four decimals.
            assert min(best[text] for text in drawn) > best[allowed[-1]] - 2e-4


def test_a_band_without_candidates_is_refused_with_what_there_is() -> None:
    table = block([""] * 4, embeddings=angles(0, 3, 180, 183))
    with pytest.raises(UserError, match=r"prompt 'p0'.*0 to 0\.6.*0\.999, -0\.999.*conditioning\.fallback"):
        condition(table, "similar_prompt", similar=SimilarConfig(), fallback=None)


def test_a_missing_context_is_refused_where_nothing_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"prompt 'p1': expected a context"):
        condition(block(["I ski.", ""]), "random_context", fallback=None)


def test_a_mixture_keeps_its_weights_and_does_not_depend_on_the_block() -> None:
    mixture = ConditioningConfig(
        strategy="mixture", mixture={"swapped_response": 1.0, "partial_prompt": 2.0, "random_prompt": 5.0}
    )
    ids = [f"prompt {number}" for number in range(8000)]
    assigned = assign_strategies(mixture, ids, seed=0, round_index=0)
    for name, weight in mixture.mixture.items():
        # Standard deviations are 26, 39 and 43.
        assert abs(assigned.count(name) - 1000 * weight) < 200
    again = assign_strategies(mixture, ids[::-1], seed=0, round_index=0)
    assert again == assigned[::-1]
    turned = ConditioningConfig(strategy="mixture", mixture=dict(reversed(mixture.mixture.items())))
    assert assign_strategies(turned, ids, seed=0, round_index=0) == assigned
    assert assign_strategies(mixture, ids, seed=1, round_index=0) != assigned
    assert assign_strategies(mixture, ids, seed=0, round_index=1) != assigned


def test_swapped_response_and_random_prompt_draw_the_same_prompts_for_the_same_seed() -> None:
    swapped, fresh = (condition(block([""] * 8), name, 2) for name in ("swapped_response", "random_prompt"))
    assert [row["mismatched_prompt_id"] for row in swapped] == [row["mismatched_prompt_id"] for row in fresh]
    assert all(len(row["partner_index"]) == 2 for row in swapped)
    assert not any(row["partner_index"] for row in fresh)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_block_without_any_mismatch_is_dropped_with_the_same_schema(strategy: str) -> None:
    made = config(strategy)
    tables = block(["I ski.", "I row."]), block([""], ["A question without anything else?"], ["g"])
    usable, impossible = (condition_block(table, made, PromptsConfig(), seed=0, round_index=0) for table in tables)
    assert impossible.schema == usable.schema
    expected = "no_context" if STRATEGIES[strategy].needs_context else STRATEGIES[strategy].impossible
    assert impossible["dropped"].to_pylist() == [expected]
    assert usable["dropped"].to_pylist() == ["", ""]


def test_other_columns_and_the_order_of_rows_stay() -> None:
    table = block(["I ski."] * 5)
    conditioned = condition_block(table, config("random_prompt"), PromptsConfig(), seed=0, round_index=0)
    kept = [name for name in table.column_names if name != "embedding"]
    assert conditioned.column_names[: len(kept)] == kept
    assert conditioned.select(kept).equals(table.select(kept))


def test_the_draw_depends_on_seed_round_and_the_rows_of_the_block() -> None:
    def draw(table: pa.Table, **changes: Any) -> list[str]:
        arguments = {"seed": 0, "round_index": 0, **changes}
        rows = condition_block(table, config("random_prompt"), PromptsConfig(), **arguments)
        return [ids[0] for ids in rows["mismatched_prompt_id"].to_pylist()]

    table = block([""] * 32)
    assert draw(table) == draw(table)
    assert draw(table) != draw(table, seed=1)
    assert draw(table) != draw(table, round_index=1)
    renamed = table.set_column(0, "prompt_id", pa.array([f"q{row}" for row in range(32)]))
    assert [name[1:] for name in draw(renamed)] != [name[1:] for name in draw(table)]


def test_block_ids_name_the_rows_in_their_order() -> None:
    table = block([""] * 4)
    ids = {
        condition_block(part, config("random_prompt"), PromptsConfig(), seed=0, round_index=0)["block_id"][0].as_py()
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
