"""Pairs chosen by a reward: the best of a prompt's responses against the worst.

python -m pytest tests/unit/pairs/test_preferences.py
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.conditioning.blocks import BY_REWARD, own_prompts
from mipo_ray.config.filters import FiltersConfig
from mipo_ray.pairs.assemble import pair_id
from mipo_ray.pairs.filters import drop_reason
from mipo_ray.pairs.preferences import (
    EQUAL_REWARDS,
    NO_REWARD,
    REWARD_COLUMNS,
    REWARDS,
    best_and_worst,
    choose_pairs,
    pmi_of_responses,
    responses_to_score,
)
from mipo_ray.pairs.schema import RESPONSES, SCORES, TOKEN_IDS, TRIMMED_RESPONSES, as_version_2, kept_pairs
from mipo_ray.prompts.rows import MESSAGES

LOOSE = FiltersConfig(max_repetition=1, max_copy_rate=1, min_length_ratio=0, max_length_ratio=None)

rewards = st.none() | st.integers(-3, 3).map(float)


def response(text: str, finish: str = "stop") -> dict[str, Any]:
    ids = list(text.encode())
    counts = {"prompt_tokens": 5, "cached_tokens": 2, "control_tokens": 0}
    side = {"token_ids": ids, "text": text, "answer_tokens": len(ids), "finish_reason": finish, "logprob": -1.5}
    return side | counts


def block(*rows: list[tuple[str, float | None, str]], dropped: str = "") -> pa.Table:
    """A sampled block of rows with (text, reward, finish reason) of each response."""
    prompts = pa.table(
        {
            "prompt_id": [f"p{index}" for index in range(len(rows))],
            "messages": pa.array([[{"role": "user", "content": f"Question {i}?"}] for i in range(len(rows))], MESSAGES),
            "context": [""] * len(rows),
            "extra": ["{}"] * len(rows),
        }
    )
    table = own_prompts(prompts)
    table = table.set_column(table.schema.get_field_index("dropped"), "dropped", pa.array([dropped] * len(rows)))
    table = table.append_column("prompt_token_ids", pa.array([[1, 2]] * len(rows), pa.list_(pa.int32())))
    answers = [[response(text, finish) for text, _, finish in row] for row in rows]
    table = table.append_column("responses", pa.array(answers, RESPONSES))
    return table.append_column("rewards", pa.array([[reward for _, reward, _ in row] for row in rows], REWARDS))


def chosen(*rows: list[tuple[str, float | None, str]], filters: FiltersConfig = LOOSE, dropped: str = "") -> pa.Table:
    return choose_pairs(block(*rows, dropped=dropped), seed=3, round_index=1, filters=filters)


@given(st.lists(st.tuples(rewards, st.booleans()), max_size=6))
def test_the_best_and_the_worst_are_those_that_a_plain_search_finds(drawn: list[tuple[float | None, bool]]) -> None:
    values, usable = [value for value, _ in drawn], [use for _, use in drawn]
    known = [value if use and value is not None else math.nan for value, use in drawn]
    places = best_and_worst(values, usable)
    if sum(not math.isnan(value) for value in known) < 2:
        assert places is None
        return
    assert places is not None
    best, worst = places
    assert all(math.isnan(value) or known[worst] <= value <= known[best] for value in known)
    assert all(math.isnan(value) or value < known[best] for value in known[:best])
    assert all(math.isnan(value) or value > known[worst] for value in known[:worst])


def test_a_pair_is_the_best_against_the_worst_and_accounts_for_every_response() -> None:
    row = [("fine tea", 2.0, "stop"), ("no tea", -1.0, "stop"), ("best tea", 4.0, "stop"), ("tea", 0.0, "stop")]
    (pair,) = chosen(row).to_pylist()
    assert (pair["chosen"], pair["rejected"], pair["dropped"]) == ("best tea", "no tea", "")
    assert [pair[name] for name in REWARD_COLUMNS] == [4.0, -1.0, 1.25]
    assert (pair["pair_id"], pair["round"], pair["sample"]) == (pair_id(3, 1, "p0", 0), 1, 0)
    assert (pair["strategy"], pair["pmi"], pair["mismatched_messages"]) == (BY_REWARD, None, [])
    assert pair["generated_tokens"] == sum(len(text) for text, _, _ in row)
    assert (pair["engine_prompt_tokens"], pair["cached_prompt_tokens"]) == (20, 8)


def test_training_reads_them_as_any_other_pairs() -> None:
    table = kept_pairs(chosen([("good", 1.0, "stop"), ("bad", 0.0, "stop")]))
    assert table["rejected_token_ids"].to_pylist() == [[list(b"bad")]]
    assert table["chosen_token_ids"].to_pylist() == [list(b"good")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([("a", 1.0, "stop"), ("b", 1.0, "stop")], EQUAL_REWARDS),
        ([("a", 1.0, "stop"), ("b", None, "stop")], NO_REWARD),
        ([("a", None, "stop"), ("b", None, "stop")], NO_REWARD),
        ([("a", 1.0, "stop"), ("a", 0.0, "stop")], "identical"),
        ([("a", 1.0, "stop"), (" ", 0.0, "stop")], "empty"),
    ],
)
def test_pairs_that_say_nothing_are_dropped_by_name(row: list[tuple[str, float | None, str]], reason: str) -> None:
    table = chosen(row, [("x", 1.0, "stop"), ("y", 0.0, "stop")])
    assert table["dropped"].to_pylist() == [reason, ""]


def test_whole_responses_are_chosen_from_where_there_are_two() -> None:
    whole = LOOSE.model_copy(update={"truncated": "drop"})
    row = [("cut", 9.0, "length"), ("good", 1.0, "stop"), ("bad", 0.0, "stop")]
    (pair,) = chosen(row, filters=whole).to_pylist()
    assert (pair["chosen"], pair["rejected"], pair["dropped"]) == ("good", "bad", "")
    (pair,) = chosen(row[:2], filters=whole).to_pylist()
    assert pair["dropped"] == "truncated"
    (pair,) = chosen(row).to_pylist()
    assert pair["chosen"] == "cut"


def test_trimmed_responses_are_chosen_from_and_those_without_a_whole_sentence_are_not() -> None:
    row = [("Cut.", 9.0, "length"), ("cut and", 8.0, "length"), ("good", 1.0, "stop"), ("bad", 0.0, "stop")]
    sampled = block(row)
    responses = sampled["responses"].to_pylist()
    responses[0][0]["trimmed_tokens"] = 7
    sampled = sampled.set_column(
        sampled.schema.get_field_index("responses"), "responses", pa.array(responses, RESPONSES)
    )
    table = choose_pairs(sampled, seed=3, round_index=1, filters=LOOSE.model_copy(update={"truncated": "trim"}))
    (pair,) = table.to_pylist()
    assert (pair["chosen"], pair["rejected"], pair["dropped"], pair[TRIMMED_RESPONSES]) == ("Cut.", "bad", "", 1)
    assert pair["generated_tokens"] == sum(len(text) for text, _, _ in row) + 7


def test_a_row_that_was_not_sampled_keeps_its_reason() -> None:
    (pair,) = chosen([], dropped="too_long").to_pylist()
    assert (pair["dropped"], pair["chosen"], pair["rejected"]) == ("too_long", "", "")


def test_the_filters_of_sampled_pairs_hold() -> None:
    row = [("tea tea tea tea tea tea", 1.0, "stop"), ("a cup of tea", 0.0, "stop")]
    table = chosen(row, filters=LOOSE.model_copy(update={"max_repetition": 0.3}))
    (pair,) = as_version_2(table).to_pylist()
    assert pair["dropped"] == "repetition" == drop_reason(pair, FiltersConfig(max_repetition=0.3), with_pmi=False)


logprobs = st.integers(-400, -1).map(lambda value: value / 8)


@given(st.lists(st.tuples(logprobs, logprobs, logprobs), min_size=1, max_size=4), st.booleans())
def test_the_pmi_of_a_response_is_what_it_gains_by_its_own_prompt(
    drawn: list[tuple[float, float, float]], equal: bool
) -> None:
    """log p(y | x) - log mean p(y | x'), here by plain sums of probabilities; equal prompts are scored once."""
    table = block([(f"answer {number}", 0.0, "stop") for number in range(len(drawn))]).drop_columns(["rewards"])
    (row,) = table["responses"].to_pylist()
    sampled = [one | {"logprob": own} for one, (own, _, _) in zip(row, drawn, strict=True)]
    table = table.set_column(table.column_names.index("responses"), "responses", pa.array([sampled], RESPONSES))
    mismatched = [[7], [7]] if equal else [[7], [8, 9]]
    column = pa.array([mismatched], pa.list_(TOKEN_IDS))
    if "mismatched_token_ids" in table.column_names:
        table = table.drop_columns(["mismatched_token_ids"])
    table = table.append_column("mismatched_token_ids", column)
    (asked,) = responses_to_score(table)
    expected = [(number, which) for number in range(len(drawn)) for which in ([0] if equal else [0, 1])]
    assert [(one["sample"], one["negative"]) for one in asked] == expected
    assert all(one["prompt_token_ids"] == mismatched[one["negative"]] for one in asked)
    assert all(one["response_token_ids"] == sampled[one["sample"]]["token_ids"] for one in asked)
    scored = [{**one, "logprob": drawn[one["sample"]][1 + one["negative"]]} for one in asked]
    scores = [{name: one[name] for name in ("sample", "negative", "logprob")} for one in scored]
    (found,) = pmi_of_responses(table.append_column("scores", pa.array([scores], SCORES)))
    for value, (own, first, second) in zip(found, drawn, strict=True):
        under = [first, first if equal else second]
        assert value == pytest.approx(own - math.log(sum(math.exp(one) for one in under) / 2), abs=1e-9)


def test_a_response_that_could_not_be_scored_has_no_pmi() -> None:
    table = block([("answer", 0.0, "stop")]).drop_columns(["rewards"])
    table = table.append_column("mismatched_token_ids", pa.array([[[7]]], pa.list_(TOKEN_IDS)))
    assert pmi_of_responses(table.append_column("scores", pa.array([[]], SCORES))) == [[None]]
