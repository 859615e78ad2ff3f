"""Pairs: how responses become rows, both versions of the schema, and what is scored for the PMI.

python -m pytest tests/unit/pairs/test_pairs.py
"""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.filters import FiltersConfig
from mipo_ray.config.generation import GenerationConfig
from mipo_ray.pairs.assemble import assemble_pairs, pair_id, pointwise_mutual_information, to_score
from mipo_ray.pairs.schema import (
    MESSAGES,
    PAIR_SCHEMA,
    PAIR_SCHEMA_2,
    RESPONSES,
    SCORES,
    TOKEN_IDS,
    TRIMMED_RESPONSES,
    as_version_2,
    kept_pairs,
    missing_columns,
    pair_columns,
)
from mipo_ray.pairs.statistics import merge_statistics, pair_statistics

ONE = GenerationConfig()
SAMPLED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("mismatched_messages", pa.list_(MESSAGES)),
        ("mismatched_prompt_id", pa.list_(pa.string())),
        ("context", pa.string()),
        ("extra", pa.string()),
        ("strategy", pa.string()),
        ("block_id", pa.string()),
        ("partner_index", pa.list_(pa.int32())),
        ("dropped", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("mismatched_token_ids", pa.list_(TOKEN_IDS)),
        ("responses", RESPONSES),
    ]
)


def response(text: str, tokens: int, finish: str = "stop", logprob: float = -1.5) -> dict[str, Any]:
    ids = list(range(tokens))
    return {"token_ids": ids, "text": text, "finish_reason": finish, "logprob": logprob,
            "answer_tokens": tokens, "prompt_tokens": 10, "cached_tokens": tokens,
            "control_tokens": 0}  # fmt: skip


def row(prompt_id: str, responses: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A conditioned and sampled row of one mismatched prompt; `others` mismatched ones, or `partners` of its block."""
    partners = changes.pop("partners", [])
    others = len(partners) or changes.pop("others", 1)
    return {
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": f"question {prompt_id}"}],
        "mismatched_messages": [[{"role": "user", "content": f"other question {k}"}] for k in range(others)],
        "mismatched_prompt_id": [f"other-{k}" for k in range(others)],
        "context": "",
        "extra": '{"topic": "tea"}',
        "strategy": "swapped_response" if partners else "random_prompt",
        "block_id": "b",
        "partner_index": partners,
        "dropped": "",
        "prompt_token_ids": [7, 8, 9],
        "mismatched_token_ids": [[50 + k] for k in range(others)],
        "responses": responses,
        **changes,
    }


def dropped_row(prompt_id: str, reason: str = "no_context") -> dict[str, Any]:
    """As conditioning leaves a row that it cannot condition: nothing was sampled."""
    return row(prompt_id, [], dropped=reason, mismatched_messages=[], mismatched_prompt_id=[], mismatched_token_ids=[])


def block_of(rows: list[dict[str, Any]], scores: list[list[dict[str, Any]]] | None = None) -> pa.Table:
    """The rows as a sampled block, in which `mismatched_prompt_id` names the partners."""
    for row_ in rows:
        if row_["partner_index"]:
            row_["mismatched_prompt_id"] = [rows[index]["prompt_id"] for index in row_["partner_index"]]
    block = pa.Table.from_pylist(rows, schema=SAMPLED)
    return block if scores is None else block.append_column("scores", pa.array(scores, SCORES))


def assemble(block: pa.Table, generation: GenerationConfig = ONE, **filters: Any) -> list[dict[str, Any]]:
    pairs = assemble_pairs(block, seed=0, round_index=2, generation=generation, filters=FiltersConfig(**filters))
    schema = PAIR_SCHEMA if generation.rejected_per_pair == 1 else PAIR_SCHEMA_2
    assert pairs.schema.equals(schema, check_metadata=True)
    return pairs.to_pylist()


def test_the_schemas_say_their_versions() -> None:
    assert PAIR_SCHEMA.metadata == {b"mipo_ray.pair_schema": b"1"}
    assert PAIR_SCHEMA_2.metadata == {b"mipo_ray.pair_schema": b"2"}
    assert PAIR_SCHEMA.names == PAIR_SCHEMA_2.names


def test_a_fresh_mismatched_response_is_the_second_one() -> None:
    (pair,) = assemble(block_of([row("a", [response("yes", 2, "stop", -0.5), response("no", 3, "length", -4.0)])]))
    assert (pair["chosen"], pair["chosen_token_ids"], pair["chosen_finish_reason"]) == ("yes", [0, 1], "stop")
    assert (pair["rejected"], pair["rejected_token_ids"], pair["rejected_finish_reason"]) == ("no", [0, 1, 2], "length")
    assert (pair["chosen_logprob"], pair["rejected_logprob"]) == (-0.5, -4.0)
    assert (pair["round"], pair["sample"], pair["dropped"], pair["pmi"]) == (2, 0, "", None)
    assert (pair["prompt_token_ids"], pair["mismatched_prompt_id"]) == ([7, 8, 9], "other-0")
    assert pair["mismatched_prompt_token_ids"] == [50]
    assert pair["mismatched_messages"] == [{"role": "user", "content": "other question 0"}]
    assert json.loads(pair["extra"]) == {"topic": "tea"}
    assert pair["pair_id"] == pair_id(0, 2, "a", 0)


def test_control_tokens_inside_responses_are_counted_and_by_default_a_reason() -> None:
    forged = {**response("yes", 3), "control_tokens": 2}
    former = {name: value for name, value in response("no", 3).items() if name != "control_tokens"}
    rows = [row("a", [forged, response("no", 3)]), row("b", [response("yes", 3), former]), row("c", [former, forged])]
    pairs = assemble(block_of(rows))
    assert [(pair["control_tokens"], pair["dropped"]) for pair in pairs] == [
        (2, "control_tokens"),
        (0, ""),
        (2, "control_tokens"),
    ]
    kept = assemble(block_of(rows), control_tokens=False)
    assert [(pair["control_tokens"], pair["dropped"]) for pair in kept] == [(2, ""), (0, ""), (2, "")]


def test_a_swapped_response_is_the_matched_one_of_the_partner() -> None:
    texts = ["first", "second", "third"]
    rows = [row(text, [response(text, 2 + index)], partners=[(index + 1) % 3]) for index, text in enumerate(texts)]
    pairs = assemble(block_of(rows))
    assert [pair["chosen"] for pair in pairs] == texts
    assert [pair["rejected"] for pair in pairs] == ["second", "third", "first"]
    assert [len(pair["rejected_token_ids"]) for pair in pairs] == [3, 4, 2]
    assert [pair["dropped"] for pair in pairs] == ["", "", ""]
    assert [pair["generated_tokens"] for pair in pairs] == [2, 3, 4]  # a reused response was sampled once


def test_swapped_responses_of_several_samples_come_from_several_partners() -> None:
    rows = [
        row(str(index), [response(f"{index}{s}", 1) for s in range(2)], partners=[(index + 1) % 3, (index + 2) % 3])
        for index in range(3)
    ]
    generation = GenerationConfig(samples_per_prompt=2, negatives_per_prompt=2)
    pairs = assemble(block_of(rows), generation)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("00", "10"), ("01", "21"), ("10", "20"), ("11", "01"), ("20", "00"), ("21", "11"),
    ]  # fmt: skip


def test_rows_without_responses_stay_as_dropped_rows() -> None:
    rows = [
        dropped_row("no-context"),
        row("kept", [response("yes", 1), response("no", 1)]),
        row("partner-was-dropped", [response("yes", 1)], partners=[0]),
    ]
    pairs = assemble(block_of(rows))
    assert [pair["prompt_id"] for pair in pairs] == ["no-context", "kept", "partner-was-dropped"]
    assert [pair["dropped"] for pair in pairs] == ["no_context", "", "no_partner_response"]
    assert pairs[0]["chosen_token_ids"] == pairs[0]["rejected_token_ids"] == pairs[0]["mismatched_messages"] == []
    assert [pair["mismatched_prompt_token_ids"] for pair in pairs] == [[], [50], [50]]
    assert math.isnan(pairs[0]["chosen_logprob"])
    assert (pairs[0]["pmi"], pairs[0]["generated_tokens"]) == (None, 0)


def test_a_dropped_row_may_lend_its_matched_response() -> None:
    lender = row("lender", [response("mine", 2)], dropped="one_sentence", mismatched_messages=[])
    rows = [{**lender, "mismatched_prompt_id": []}, row("kept", [response("yes", 1)], partners=[0])]
    pairs = assemble(block_of(rows))
    assert [pair["dropped"] for pair in pairs] == ["one_sentence", ""]
    assert pairs[1]["rejected"] == "mine"
    assert [pair["generated_tokens"] for pair in pairs] == [2, 1]


def test_a_block_that_was_cut_is_refused_and_not_paired_with_other_rows() -> None:
    rows = [row("a", [response("one", 4)], partners=[1]), row("b", [response("two", 3)], partners=[0])]
    whole = block_of([*rows, row("c", [response("three", 2)], partners=[0])])
    for piece in (whole.slice(1), whole.slice(0, 1)):
        with pytest.raises(RuntimeError, match="the block was cut or merged"):
            assemble_pairs(piece, seed=0, round_index=0, generation=ONE, filters=FiltersConfig())


def sampled(n: int, k: int) -> list[dict[str, Any]]:
    matched = [response(f"m{s}", 1 + s, logprob=-1.0 - s) for s in range(n)]
    return matched + [response(f"x{s}", 20 + s, logprob=-50.0 - s) for s in range(k)]


@pytest.mark.parametrize(
    ("n", "k", "pairing", "rejected"),
    [
        (1, 1, "zip", [["x0"]]),
        (2, 2, "zip", [["x0"], ["x1"]]),
        (2, 4, "zip", [["x0", "x1"], ["x2", "x3"]]),
        (1, 3, "zip", [["x0", "x1", "x2"]]),
        (2, 1, "all", [["x0"], ["x0"]]),
        (2, 3, "all", [["x0", "x1", "x2"], ["x0", "x1", "x2"]]),
    ],
)
def test_matched_responses_share_the_mismatched_ones_out_or_have_all(
    n: int, k: int, pairing: Any, rejected: list[list[str]]
) -> None:
    generation = GenerationConfig(samples_per_prompt=n, negatives_per_prompt=k, pairing=pairing)
    pairs = assemble(block_of([row("a", sampled(n, k), others=k), dropped_row("b")]), generation)
    assert len(pairs) == 2 * n
    assert [pair["sample"] for pair in pairs] == [*range(n)] * 2
    assert len({pair["pair_id"] for pair in pairs}) == 2 * n
    assert [pair["chosen"] for pair in pairs[:n]] == [f"m{s}" for s in range(n)]
    assert [pair["dropped"] for pair in pairs] == [""] * n + ["no_context"] * n
    found = [pair["rejected"] if len(rejected[0]) > 1 else [pair["rejected"]] for pair in pairs[:n]]
    assert found == rejected
    # What the engine spent on the prompt stands in one of its rows.
    tokens = [sum(range(1, n + 1)) + sum(range(20, 20 + k))] + [0] * (2 * n - 1)
    assert [pair["generated_tokens"] for pair in pairs] == tokens
    assert [pair["cached_prompt_tokens"] for pair in pairs] == tokens  # `response` makes them equal
    assert sum(pair["engine_prompt_tokens"] for pair in pairs) == 10 * (n + k)


def test_every_rejected_response_keeps_its_own_prompt_ids_and_log_prob() -> None:
    generation = GenerationConfig(samples_per_prompt=2, negatives_per_prompt=4)
    _, pair = assemble(block_of([row("a", sampled(2, 4), others=4)]), generation)
    assert pair["rejected"] == ["x2", "x3"]
    assert pair["mismatched_prompt_id"] == ["other-2", "other-3"]
    assert pair["mismatched_prompt_token_ids"] == [[52], [53]]
    assert [messages[0]["content"] for messages in pair["mismatched_messages"]] == [
        "other question 2",
        "other question 3",
    ]
    assert [len(ids) for ids in pair["rejected_token_ids"]] == [22, 23]
    assert pair["rejected_logprob"] == [-52.0, -53.0]
    assert pair["rejected_finish_reason"] == ["stop", "stop"]


def version_1() -> pa.Table:
    rows = [row("a", sampled(1, 1)), dropped_row("b")]
    return assemble_pairs(block_of(rows), seed=0, round_index=0, generation=ONE, filters=FiltersConfig())


def version_2(k: int = 2) -> pa.Table:
    generation = GenerationConfig(negatives_per_prompt=k)
    rows = [row("c", sampled(1, k), others=k), dropped_row("d")]
    return assemble_pairs(block_of(rows), seed=0, round_index=0, generation=generation, filters=FiltersConfig())


@pytest.mark.parametrize("former_release", [False, True])
def test_both_versions_are_read_from_parquet_beside_each_other(tmp_path: Path, former_release: bool) -> None:
    new = ["mismatched_prompt_token_ids", "pmi", "generated_tokens", "engine_prompt_tokens", "cached_prompt_tokens"]
    new = new if former_release else []
    tables = []
    for name, table in (("1", version_1().drop_columns(new)), ("2", version_2())):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        tables.append(as_version_2(pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")))
    both = pa.concat_tables(tables, promote_options="default")
    assert both["rejected"].to_pylist() == [["x0"], [""], ["x0", "x1"], ["", ""]]
    assert both["rejected_token_ids"].to_pylist()[0] == [list(range(20))]
    assert both["mismatched_messages"].to_pylist()[0] == [[{"role": "user", "content": "other question 0"}]]
    assert both["chosen"].to_pylist() == ["m0", "", "m0", ""]
    mismatched = [None, None] if former_release else [[[50]], [[]]]
    assert both["mismatched_prompt_token_ids"].to_pylist() == [*mismatched, [[50], [51]], []]
    assert set(both.schema.names) == set(PAIR_SCHEMA_2.names)
    assert tables[0].schema.names == [name for name in PAIR_SCHEMA.names if name not in new]


def test_version_2_stays_as_it_is_and_version_1_keeps_its_other_columns() -> None:
    kept = version_2().slice(0, 1)  # dropped rows have log-probs that are not numbers, which equal nothing
    assert as_version_2(kept).equals(kept, check_metadata=True)
    others = [name for name in PAIR_SCHEMA.names if "rejected" not in name and "mismatched" not in name]
    kept = version_1().slice(0, 1)
    assert as_version_2(kept).select(others).equals(kept.select(others))


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=8), st.lists(st.integers(0, 8), max_size=3))
def test_a_column_of_version_1_becomes_lists_of_one(token_ids: list[list[int]], cuts: list[int]) -> None:
    """In tables of several chunks too, each a slice of something larger."""
    bounds = [*sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    rest = token_ids[bounds[0] :]
    whole = pa.array(token_ids, TOKEN_IDS)
    chunks = [whole.slice(start, end - start) for start, end in itertools.pairwise(bounds)]
    ids = pa.array([str(index) for index in range(len(rest))], pa.string())
    table = as_version_2(pa.table({"rejected_token_ids": pa.chunked_array(chunks, TOKEN_IDS), "pair_id": ids}))
    table.validate(full=True)
    assert table.schema.types == [pa.list_(TOKEN_IDS), pa.string()]
    assert table.to_pylist() == [{"rejected_token_ids": [ids], "pair_id": str(row)} for row, ids in enumerate(rest)]


def test_large_columns_are_not_copied() -> None:
    table = version_1()
    for name in ("rejected_token_ids", "mismatched_prompt_token_ids", "rejected", "mismatched_messages"):
        (before,), (after,) = table[name].chunks, as_version_2(table)[name].chunks
        addresses = [buffer.address for buffer in before.buffers() if buffer]
        assert addresses
        assert set(addresses) <= {buffer.address for buffer in after.buffers() if buffer}


def test_kept_pairs_are_those_without_a_reason_in_the_form_of_version_2() -> None:
    for table in (version_1(), version_2()):
        kept = kept_pairs(table)
        assert kept["prompt_id"].to_pylist() == [table["prompt_id"][0].as_py()]
        assert kept.schema.names == [name for name in PAIR_SCHEMA.names if name != "dropped"]
        assert [kept.schema.field(name).type for name in kept.schema.names] == [
            PAIR_SCHEMA_2.field(name).type for name in kept.schema.names
        ]
        assert kept_pairs(table.slice(1)).num_rows == 0


def test_an_objective_reads_what_it_compares() -> None:
    ids = ["pair_id", "prompt_token_ids", "chosen_token_ids"]
    assert pair_columns("sft") == ids
    for objective in ("dpo", "ipo", "infonce"):
        assert pair_columns(objective) == [*ids, "rejected_token_ids"]
    assert pair_columns("sami") == [*ids, "rejected_token_ids", "mismatched_prompt_token_ids"]


def test_columns_that_a_file_lacks_are_named() -> None:
    assert missing_columns(["b", "a"], ["a", "b", "c"]) == ""
    assert missing_columns(["c", "a", "b"], ["a", "d"]) == "expected the columns b, c too, found a, d"


def wanted(block: pa.Table, generation: GenerationConfig = ONE, **filters: Any) -> list[list[tuple[Any, ...]]]:
    rows = to_score(block, generation=generation, filters=FiltersConfig(**filters))
    return [
        [(item["sample"], item["negative"], item["prompt_token_ids"], len(item["response_token_ids"])) for item in row_]
        for row_ in rows
    ]


def test_chosen_responses_are_scored_under_the_mismatched_prompts_of_their_pair() -> None:
    rows = [row("a", sampled(2, 4), others=4), dropped_row("b")]
    generation = GenerationConfig(samples_per_prompt=2, negatives_per_prompt=4)
    assert wanted(block_of(rows), generation) == [
        [(0, 0, [50], 1), (0, 1, [51], 1), (1, 2, [52], 2), (1, 3, [53], 2)],
        [],
    ]
    every = GenerationConfig(samples_per_prompt=2, negatives_per_prompt=2, pairing="all")
    both = wanted(block_of([row("a", sampled(2, 2), others=2)]), every)
    assert both == [[(0, 0, [50], 1), (0, 1, [51], 1), (1, 0, [50], 2), (1, 1, [51], 2)]]


def test_equal_mismatched_prompts_are_scored_once() -> None:
    one_prompt = row("a", sampled(1, 3), others=3, mismatched_token_ids=[[50], [51], [50]])
    generation = GenerationConfig(negatives_per_prompt=3)
    block = block_of([one_prompt])
    assert wanted(block, generation) == [[(0, 0, [50], 1), (0, 1, [51], 1)]]
    scores = [{"sample": 0, "negative": 0, "logprob": -3.0}, {"sample": 0, "negative": 1, "logprob": -4.0}]
    (pair,) = assemble(block_of([one_prompt], [scores]), generation)
    marginal = (2 * math.exp(-3.0) + math.exp(-4.0)) / 3
    assert pair["pmi"] == pytest.approx(pair["chosen_logprob"] - math.log(marginal), abs=1e-5)


def test_pairs_that_another_filter_drops_are_not_scored() -> None:
    rows = [
        row("same", [response("one", 1), response("one", 1)]),
        row("cut", [response("one", 1, "length"), response("two", 1)]),
        row("fine", [response("one", 1), response("two", 1)]),
    ]
    assert [len(items) for items in wanted(block_of(rows), min_pmi=5.0)] == [0, 1, 1]
    assert [len(items) for items in wanted(block_of(rows), truncated="drop")] == [0, 0, 1]


def test_scored_pairs_have_a_pmi_that_the_filter_sees() -> None:
    rows = [row(str(index), [response("one", 1, logprob=-2.0), response("two", 1)]) for index in range(3)]
    under_mismatched: tuple[float | None, ...] = (-2.5, -4.0, None)
    scores = [[{"sample": 0, "negative": 0, "logprob": value}] for value in under_mismatched]
    block = block_of([*rows, dropped_row("d")], [*scores, []])
    assert [pair["pmi"] for pair in assemble(block)] == [0.5, 2.0, None, None]
    assert [pair["dropped"] for pair in assemble(block)] == ["", "", "", "no_context"]
    dropped = [pair["dropped"] for pair in assemble(block, min_pmi=1.0)]
    assert dropped == ["low_pmi", "", "no_pmi", "no_context"]
    # Without scores there is nothing to filter by.
    assert [pair["dropped"] for pair in assemble(block.drop_columns(["scores"]), min_pmi=1.0)][:3] == ["", "", ""]


def test_the_pmi_of_a_pair_takes_its_own_mismatched_prompts() -> None:
    generation = GenerationConfig(samples_per_prompt=2, negatives_per_prompt=4)
    scores = [{"sample": s, "negative": k, "logprob": -5.0 - k} for s, k in ((0, 0), (0, 1), (1, 2), (1, 3))]
    first, second = assemble(block_of([row("a", sampled(2, 4), others=4)], [scores]), generation)
    assert first["pmi"] == pytest.approx(-1.0 - math.log((math.exp(-5) + math.exp(-6)) / 2))
    assert second["pmi"] == pytest.approx(-2.0 - math.log((math.exp(-7) + math.exp(-8)) / 2))


@given(st.floats(-30, 0), st.lists(st.floats(-30, 0), min_size=1, max_size=6))
def test_the_pmi_is_the_log_ratio_to_the_mean_probability(matched: float, mismatched: list[float]) -> None:
    # In exact fractions of probabilities rather than with shifted logarithms.
    mean = sum(Fraction(math.exp(value)) for value in mismatched) / len(mismatched)
    expected = math.log(Fraction(math.exp(matched)) / mean)
    assert pointwise_mutual_information(matched, [*mismatched]) == pytest.approx(expected, abs=1e-9)


def test_the_pmi_of_improbable_responses_does_not_underflow() -> None:
    assert pointwise_mutual_information(-4000.0, [-5000.0, -5000.0]) == pytest.approx(1000.0)
    assert pointwise_mutual_information(-1.0, [-2.0, None]) is None
    assert pointwise_mutual_information(-1.0, []) is None


def test_pair_ids_are_stable() -> None:
    # First 16 hex digits of `printf '0/1/0/prompt-7' | sha256sum`.
    assert pair_id(0, 1, "prompt-7", 0) == "5bb827f04a589f58"


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.text(max_size=4), st.integers(0, 20)),
        unique=True,
        max_size=30,
    )
)
def test_pair_ids_are_distinct(parts: list[tuple[int, int, str, int]]) -> None:
    assert len({pair_id(*part) for part in parts}) == len(parts)


def trimmed_response(text: str, tokens: int, cut_off: int | None) -> dict[str, Any]:
    return response(text, tokens, "length") | {"trimmed_tokens": cut_off}


def test_trimmed_responses_are_counted_in_a_column_of_their_own_and_with_all_their_tokens() -> None:
    rows = [
        row("whole", [response("yes", 2), response("no", 3)]),
        row("both", [trimmed_response("Yes.", 4, 5), trimmed_response("No.", 3, 1)]),
        row("at the end", [trimmed_response("Yes.", 4, 0), response("no", 3)]),
        row("no sentence", [trimmed_response("yes and", 4, None), trimmed_response("No.", 3, 6)]),
        dropped_row("not sampled"),
    ]
    block = block_of(rows)
    table = assemble_pairs(block, seed=0, round_index=2, generation=ONE, filters=FiltersConfig(truncated="trim"))
    assert table.schema.names == [*PAIR_SCHEMA.names, TRIMMED_RESPONSES]
    pairs = table.to_pylist()
    assert [pair[TRIMMED_RESPONSES] for pair in pairs] == [0, 2, 0, 1, 0]
    assert [pair["dropped"] for pair in pairs] == ["", "", "", "truncated", "no_context"]
    assert [pair["generated_tokens"] for pair in pairs] == [5, 13, 7, 13, 0]
    # What was trained on before is untouched: a prefix, which the limit cut.
    assert [(pair["chosen_token_ids"], pair["chosen_finish_reason"]) for pair in pairs[1:2]] == [
        ([*range(4)], "length")
    ]
    assert len(kept_pairs(table)) == 3
    assert [len(items) for items in wanted(block, truncated="trim")] == [1, 1, 1, 0, 0]


def test_several_rejected_responses_are_trimmed_each() -> None:
    rows = [row("a", [trimmed_response("Yes.", 4, 5), *(trimmed_response(f"No {n}.", 3, 1) for n in "ab")], others=2)]
    generation = GenerationConfig(negatives_per_prompt=2)
    filters = FiltersConfig(truncated="trim")
    table = assemble_pairs(block_of(rows), seed=0, round_index=2, generation=generation, filters=filters)
    assert table.schema.names == [*PAIR_SCHEMA_2.names, TRIMMED_RESPONSES]
    assert table[TRIMMED_RESPONSES].to_pylist() == [3]
    assert merge_statistics([pair_statistics(table)]).trimmed_responses == 3
