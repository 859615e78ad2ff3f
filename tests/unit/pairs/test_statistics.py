"""Statistics of pairs: against a plain computation over all pairs, whatever the blocks they come in.

python -m pytest tests/unit/pairs/test_statistics.py
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.pairs.preferences import REWARD_COLUMNS
from mipo_ray.pairs.schema import PAIR_SCHEMA, PAIR_SCHEMA_2, TRIMMED_RESPONSES, as_version_2
from mipo_ray.pairs.statistics import drop_table, merge_statistics, pair_statistics, prompt_fingerprint
from mipo_ray.storage.pair_statistics import Histograms, PairStatistics, StrategyStatistics
from mipo_ray.storage.records import to_json

FORMER_RELEASE_LACKS = ("pmi", "generated_tokens", "engine_prompt_tokens", "cached_prompt_tokens")
TEXTS = ("tea", "tea tea tea tea", "boil some water", "a b a b a b", "één kopje thee", "お茶をいれる")

responses = st.tuples(st.sampled_from(TEXTS), st.integers(0, 300), st.sampled_from(["stop", "length"]))


def one_pair(rejected: int) -> st.SearchStrategy[dict[str, Any]]:
    fields = st.fixed_dictionaries(
        {
            "prompt_id": st.sampled_from("abcdef"),
            "strategy": st.sampled_from(["random_prompt", "swapped_response"]),
            "dropped": st.sampled_from(["", "", "", "identical", "low_pmi"]),
            "pmi": st.none() | st.floats(-60, 500, width=32),
            "sample": st.integers(0, 2),
            "chosen": responses,
            "rejected": st.lists(responses, min_size=rejected, max_size=rejected),
            "sampled": st.booleans(),
            "tokens": st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
        }
    )
    return fields.map(_as_row)


def _as_row(drawn: dict[str, Any]) -> dict[str, Any]:
    """A row of version 2; one that was never sampled is dropped and has empty responses."""
    if not drawn["sampled"]:
        empty = ("", 0, "")
        drawn |= {"dropped": "no_context", "chosen": empty, "rejected": [empty for _ in drawn["rejected"]], "pmi": None}
    row = {name: drawn[name] for name in ("prompt_id", "strategy", "dropped", "pmi", "sample")}
    generated, engine, cached = drawn["tokens"]
    return row | {
        "chosen": drawn["chosen"][0],
        "chosen_token_ids": [1] * drawn["chosen"][1],
        "chosen_finish_reason": drawn["chosen"][2],
        "rejected": [text for text, _, _ in drawn["rejected"]],
        "rejected_token_ids": [[1] * tokens for _, tokens, _ in drawn["rejected"]],
        "rejected_finish_reason": [finish for _, _, finish in drawn["rejected"]],
        "prompt_token_ids": [1, 2, 3],
        "generated_tokens": generated,
        "engine_prompt_tokens": engine + cached,
        "cached_prompt_tokens": cached,
        "control_tokens": cached % 3,
    }


def as_table(rows: list[dict[str, Any]], version: int = 2) -> pa.Table:
    if version == 1:
        rows = [{name: value[0] if "rejected" in name else value for name, value in row.items()} for row in rows]
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA if version == 1 else PAIR_SCHEMA_2)


def test_repetition_is_that_of_answers_and_lengths_are_those_of_whole_responses() -> None:
    base = {"prompt_id": "p", "strategy": "random_prompt", "dropped": "", "pmi": 1.0, "sample": 0}
    side = {"token_ids": [1] * 7, "finish_reason": "stop"}
    said = {
        f"{name}_{key}": [value] if name == "rejected" else value
        for name in ("chosen", "rejected")
        for key, value in side.items()
    }
    texts = {"chosen": "<think>a b a b a b</think> a b c", "rejected": ["a b c"]}
    counts = dict.fromkeys(("generated_tokens", "engine_prompt_tokens", "cached_prompt_tokens"), 1)
    row = base | said | texts | counts | {"prompt_token_ids": [1]}
    found = merge_statistics([pair_statistics(as_table([row]))])
    assert found.chosen_distinct_2 == found.rejected_distinct_2 == 1.0
    assert found.chosen_tokens == 7


def quantile(values: list[float], percent: int) -> float:
    """The smallest value that `percent` % of all do not exceed, by its definition."""
    return next(v for v in sorted(values) if 100 * sum(other <= v for other in values) >= percent * len(values))


def distinct(text: str, n: int) -> float:
    """For texts in lower case without punctuation; the Japanese one has no spaces: each character is a word."""
    tokens = text.split() if " " in text or text.isascii() else list(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def expected_numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every number of the top level, computed pair by pair."""
    kept = [row for row in rows if not row["dropped"]]
    expected: dict[str, Any] = {"rows": len(rows), "kept": len(kept), "prompt_tokens": 3 * len(rows)}
    difference = [
        len(row["chosen_token_ids"]) - statistics.fmean(len(ids) for ids in row["rejected_token_ids"]) for row in kept
    ]
    pmi = [row["pmi"] for row in kept if row["pmi"] is not None]
    expected |= with_interval("tokens_difference", difference) | with_interval("pmi", pmi)
    expected["pmi_standard_deviation"] = statistics.stdev(pmi) if len(pmi) > 1 else None
    expected["pmi_count"] = len(pmi)
    expected["pmi_below_zero_share"] = mean([float(value < 0) for value in pmi])
    for side in ("chosen", "rejected"):

        def listed(row: dict[str, Any], name: str, side: str = side) -> list[Any]:
            return row[side + name] if side == "rejected" else [row[side + name]]

        texts = [text for row in kept for text in listed(row, "")]
        tokens = [float(len(ids)) for row in kept for ids in listed(row, "_token_ids")]
        cut = [float(reason == "length") for row in kept for reason in listed(row, "_finish_reason")]
        every = [reason for row in rows for reason in listed(row, "_finish_reason") if reason]
        expected |= {
            f"{side}_tokens": sum(tokens),
            f"{side}_tokens_mean": mean(tokens),
            f"{side}_tokens_standard_deviation": statistics.stdev(tokens) if len(tokens) > 1 else None,
            f"{side}_truncated_share": mean(cut),
            f"{side}_truncated_share_all_rows": mean([float(reason == "length") for reason in every]),
            f"{side}_distinct_2": mean([distinct(text, 2) for text in texts]),
            f"{side}_distinct_3": mean([distinct(text, 3) for text in texts]),
            f"{side}_duplicates": sum(text in texts[:index] for index, text in enumerate(texts)),
        }
    expected["trimmed_responses"] = None  # nothing was trimmed
    expected |= dict.fromkeys(("reward_mean", "reward_low", "reward_high", "reward_margin_mean"))  # nothing chose
    expected["pairs_with_control_tokens"] = sum(row["control_tokens"] > 0 for row in rows)
    for name in ("generated_tokens", "engine_prompt_tokens", "cached_prompt_tokens"):
        expected[name] = sum(row[name] for row in rows)
    engine = expected["engine_prompt_tokens"]
    expected["prefix_cache_hit_rate"] = expected["cached_prompt_tokens"] / engine if engine else None
    expected["generated_tokens_per_pair"] = expected["generated_tokens"] / len(kept) if kept else None
    return expected


def with_interval(name: str, values: list[float]) -> dict[str, float | None]:
    reach = None
    if len(values) > 1:
        reach = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(values) / math.sqrt(len(values))
    centre = mean(values)
    known = centre is not None and reach is not None
    return {
        f"{name}_mean": centre,
        f"{name}_low": centre - reach if known else None,  # type: ignore[operator]
        f"{name}_high": centre + reach if known else None,  # type: ignore[operator]
    }


def merged(rows: list[dict[str, Any]], cuts: list[int], version: int = 2) -> PairStatistics:
    """Statistics of the rows cut into blocks as a file holds them, whose sums travel between processes as JSON."""
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    table = as_table(rows, version)
    blocks = [table.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    return merge_statistics(json.loads(json.dumps(pair_statistics(as_version_2(block)))) for block in blocks)


tables = st.integers(1, 3).flatmap(lambda rejected: st.lists(one_pair(rejected), max_size=20))


@settings(deadline=None, max_examples=60)
@given(rows=tables, cuts=st.lists(st.integers(0, 20), max_size=5), random=st.randoms(use_true_random=False))
def test_any_split_and_order_give_the_figures_of_all_pairs(
    rows: list[dict[str, Any]], cuts: list[int], random: Any
) -> None:
    found = merged(rows, cuts)
    numbers = {name: value for name, value in vars(found).items() if not isinstance(value, dict | str | Histograms)}
    assert numbers == pytest.approx(expected_numbers(rows), abs=2e-4)
    assert found.fingerprint == (
        f"{sum(prompt_fingerprint([row['prompt_id']]) for row in rows if row['sample'] == 0) % 2**64:016x}"
    )
    assert found.dropped == Counter(row["dropped"] for row in rows if row["dropped"])
    shuffled = random.sample(rows, len(rows))
    assert merged(shuffled, []) == found
    if all(len(row["rejected"]) == 1 for row in rows):
        assert merged(rows, cuts, version=1) == found
    json.dumps(to_json(found), allow_nan=False)


@settings(deadline=None, max_examples=40)
@given(rows=tables, cuts=st.lists(st.integers(0, 20), max_size=5))
def test_quantiles_histograms_and_strategies(rows: list[dict[str, Any]], cuts: list[int]) -> None:
    found = merged(rows, cuts)
    kept = [row for row in rows if not row["dropped"]]
    tokens = {
        "chosen": [len(row["chosen_token_ids"]) for row in kept],
        "rejected": [len(ids) for row in kept for ids in row["rejected_token_ids"]],
    }
    for side, values in tokens.items():
        wanted = {str(percent): quantile([*values], percent) for percent in (5, 25, 50, 75, 95)} if values else {}
        assert getattr(found, f"{side}_tokens_quantiles") == wanted
    check_pmi(found, kept)
    assert found.by_strategy.keys() == {row["strategy"] for row in rows}
    for name, entry in found.by_strategy.items():
        of_strategy = [row for row in kept if row["strategy"] == name]
        assert entry.rows == sum(row["strategy"] == name for row in rows)
        assert entry.kept == len(of_strategy)
        check_pmi(entry, of_strategy)
        assert entry.pmi_mean == pytest.approx(
            mean([row["pmi"] for row in of_strategy if row["pmi"] is not None]), abs=1e-6
        )
    pmi = [row["pmi"] for row in kept if row["pmi"] is not None]
    assert found.histograms is not None
    lengths, pmis = found.histograms.tokens, found.histograms.pmi
    for edges, counts, values in (
        (lengths.edges, lengths.chosen, tokens["chosen"]),
        (lengths.edges, lengths.rejected, tokens["rejected"]),
        (pmis.edges, pmis.counts, pmi),
    ):
        assert len(counts) <= 40
        assert len(edges) == (len(counts) + 1 if counts else 0)
        bars = zip(itertools.pairwise(edges), counts, strict=True)
        assert all(count == sum(low <= value < high for value in values) for (low, high), count in bars)
        assert sum(counts) == len(values)


def check_pmi(figures: PairStatistics | StrategyStatistics, kept: list[dict[str, Any]]) -> None:
    values = [row["pmi"] for row in kept if row["pmi"] is not None]
    assert figures.pmi_count == len(values)
    wanted = {str(percent): quantile(values, percent) for percent in (5, 25, 50, 75, 95)} if values else {}
    assert figures.pmi_quantiles == pytest.approx(wanted, abs=0.005 + 1e-9)


def row(prompt_id: str, tokens: int, **changes: Any) -> dict[str, Any]:
    made = _as_row(
        {
            "prompt_id": prompt_id,
            "strategy": "random_prompt",
            "dropped": "",
            "pmi": 1.0,
            "sample": 0,
            "chosen": ("tea", tokens, "stop"),
            "rejected": [("water", 2, "stop")],
            "sampled": True,
            "tokens": (tokens, 0, 0),
        }
    )
    return made | changes


def test_scores_that_are_not_finite_are_no_pmi_and_large_ones_stay_in_the_mean() -> None:
    values = [math.nan, -math.inf, None, 30_000.0, 10.0]
    found = merged([row(str(index), 1, pmi=value) for index, value in enumerate(values)], [2])
    assert (found.pmi_count, found.pmi_mean) == (2, 15_005.0)
    assert found.pmi_quantiles["95"] == pytest.approx(10_000.0, abs=0.01)


def test_statistics_of_no_rows_have_no_division_by_zero() -> None:
    empty = [pair_statistics(as_version_2(schema.empty_table())) for schema in (PAIR_SCHEMA, PAIR_SCHEMA_2)]
    for parts in ([], empty):
        found = merge_statistics(parts)
        assert (found.rows, found.kept, found.generated_tokens) == (0, 0, 0)
        assert (found.chosen_tokens_mean, found.generated_tokens_per_pair) == (None, None)
        assert drop_table(found).split() == ["rows", "0", "kept", "0"]


def test_what_goes_into_the_manifest_does_not_grow_with_the_pairs() -> None:
    rows = [row(str(index), index % 300, chosen=f"text {index}", pmi=index / 7) for index in range(3000)]
    assert len(json.dumps(to_json(merged(rows, [1000, 2000])))) < 6000


@pytest.mark.parametrize(
    "other", [["a", "b"], ["a", "b", "c", "c"], ["a", "b", "b"], ["a", "a", "c"], ["a", "b", "d"], ["ab", "c"], []]
)
def test_the_fingerprint_detects_missing_and_repeated_ids(other: list[str]) -> None:
    assert prompt_fingerprint(other) != prompt_fingerprint(["a", "b", "c"])
    assert prompt_fingerprint(["c", "a", "b"]) == prompt_fingerprint(["a", "b", "c"])


def test_the_drop_table_names_the_most_frequent_reason_first() -> None:
    one = {"random_prompt": StrategyStatistics(rows=2000, kept=500)}
    dropped = {"identical": 300, "empty": 1200}
    text = drop_table(PairStatistics(rows=2000, kept=500, dropped=dropped, by_strategy=one))
    assert [line.split() for line in text.splitlines()] == [
        ["rows", "2,000"],
        ["kept", "500"],
        ["dropped:", "empty", "1,200", "60.0%"],
        ["dropped:", "identical", "300", "15.0%"],
    ]


def test_the_drop_table_has_a_line_for_each_of_several_strategies() -> None:
    found = merged(
        [row("a", 1), row("b", 1, dropped="pattern_" + "x" * 30), row("c", 1, strategy="random_context")], []
    )
    lines = drop_table(found).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["kept,", "random_context", "1", "100.0%", "of", "1", "rows"],
        ["kept,", "random_prompt", "1", "50.0%", "of", "2", "rows"],
    ]
    assert len({line.index("%") for line in lines if "%" in line}) == 1  # a long reason widens the table


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(one_pair(1), max_size=12), cut=st.integers(0, 12), data=st.data())
def test_rewards_are_averaged_over_prompts_and_margins_over_kept_pairs(
    rows: list[dict[str, Any]], cut: int, data: st.DataObject
) -> None:
    reward = st.floats(-50, 50, width=32)
    drawn = [data.draw(st.tuples(reward, reward, st.none() | reward)) for _ in rows]
    table = as_table(rows, version=1)
    for column, name in enumerate(REWARD_COLUMNS):
        table = table.append_column(name, pa.array([values[column] for values in drawn], pa.float32()))
    blocks = [table.slice(0, cut), table.slice(cut)]
    found = merge_statistics(json.loads(json.dumps(pair_statistics(as_version_2(block)))) for block in blocks)
    sampled = with_interval("reward", [values[2] for values in drawn if values[2] is not None])
    margins = [values[0] - values[1] for values, row in zip(drawn, rows, strict=True) if not row["dropped"]]
    for name, value in {**sampled, "reward_margin_mean": mean(margins)}.items():
        assert getattr(found, name) == pytest.approx(value, abs=2e-4), name


@given(st.lists(one_pair(1), min_size=1), st.data())
def test_trimmed_responses_are_those_of_kept_pairs(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    table = as_table(rows).append_column(TRIMMED_RESPONSES, pa.array(counts, pa.int32()))
    cut = data.draw(st.integers(0, len(rows)))
    found = merge_statistics(pair_statistics(part) for part in (table.slice(0, cut), table.slice(cut)))
    assert found.trimmed_responses == sum(count for row, count in zip(rows, counts, strict=True) if not row["dropped"])
