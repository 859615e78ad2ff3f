"""The results.json entry of one policy and the final table.

python -m pytest tests/unit/evaluation/held_out/test_metrics.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.figures import final_table, format_change
from mipo_ray.evaluation.held_out.effects import TokenScores
from mipo_ray.evaluation.held_out.metrics import MeasuredRows, measure
from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.measures import ECHO_SHARES, HELD_OUT, format_value
from mipo_ray.storage.entries import Entry, Results
from mipo_ray.storage.records import read_record, to_json
from mipo_ray.storage.results import rounds_of

PROMPTS, SAMPLES, OTHERS = 12, 2, 3
RESPONSES = PROMPTS * SAMPLES
OPTIONS: dict[str, Any] = {"beta": 0.1, "samples": 200, "seed": 3}


def make_rows(seed: int, *, trained: bool) -> MeasuredRows:
    """Random scores; a trained policy's responses depend on their prompt by 5 nats more."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 40, size=RESPONSES)
    gain = 5.0 * trained
    own = np.asarray(-2.0 * tokens + gain, dtype=np.float64)
    others = own[:, None] - gain - 3.0 + generator.normal(size=(RESPONSES, OTHERS))
    none = own - gain - 1.0 + generator.normal(size=RESPONSES)
    none[: 2 * SAMPLES] = np.nan  # the first two prompts bring no context
    shift = trained * (0.3 * tokens + generator.normal(size=RESPONSES))
    scores = [_spread(*row, generator) for row in zip(tokens.tolist(), own, others, none, strict=True)]
    pairs = generator.normal(-50.0, 5.0, size=(2, PROMPTS))
    return MeasuredRows(
        prompt_ids=[f"prompt-{i // SAMPLES}" for i in range(RESPONSES)],
        responses=["green tea is green tea" if i % 3 else "I am a tailor" for i in range(RESPONSES - 1)]
        + ["Sorry, I cannot help with that."],
        sources=["I am a tailor. What should I drink?"] * RESPONSES,
        token_counts=tokens,
        truncated=tokens > 35,
        initial_own=own,
        initial_others=others,
        initial_none=none,
        policy_own=own + shift,
        policy_others=others + trained * 1.0,
        policy_none=none,
        pair_prompt_ids=[f"prompt-{i}" for i in range(PROMPTS)],
        pair_policy_chosen=pairs[0] + trained * 4.0,
        pair_policy_rejected=pairs[1] - trained * np.where(np.arange(PROMPTS) < 3, -9.0, 2.0),
        pair_initial_chosen=pairs[0],
        pair_initial_rejected=pairs[1],
        tokens=scores,
    )


def _spread(tokens: int, own: float, others: np.ndarray, none: float, generator: np.random.Generator) -> TokenScores:
    """Log-probs of tokens with these sums; the first two tokens copy."""
    shares = generator.dirichlet(np.ones(tokens))
    return TokenScores(
        own * shares, others[:, None] * shares, None if math.isnan(none) else none * shares, np.arange(tokens) < 2
    )


@pytest.fixture(scope="module")
def results() -> Results:
    base = make_rows(0, trained=False)
    return {
        "base": measure(base, None, **OPTIONS),
        "0": measure(make_rows(1, trained=True), base, **OPTIONS),
        "1": measure(make_rows(2, trained=True), base, **OPTIONS),
    }


def test_every_metric_is_there_with_its_fields(results: Results) -> None:
    for key, entries in results.items():
        assert list(entries) == [name for name in HELD_OUT if key != "base" or name not in ECHO_SHARES]
        for name, entry in entries.items():
            expected = {"value", "low", "high", "n", "unit"} | ({"ceiling"} if "infonce" in name else set())
            changed = key != "base" and name not in ECHO_SHARES
            expected |= {"change", "change_low", "change_high"} if changed else set()
            expected |= {"change_p_value"} if changed and name != "corpus_distinct_2" else set()
            assert set(to_json(entry)) == expected, name
            assert entry.unit == HELD_OUT[name].unit
            if name != "corpus_distinct_2":
                assert entry.low <= entry.value <= entry.high, name
    assert read_record(Results, json.dumps(to_json(results), allow_nan=False), "results.json") == results


def test_the_base_has_no_reward_and_no_kl(results: Results) -> None:
    for name, value in (("reward_accuracy", 0.5), ("reward_margin", 0.0), ("kl_per_token", 0.0)):
        entry = results["base"][name]
        assert (entry.value, entry.low, entry.high) == (value, value, value)


def test_values_agree_with_loops_over_the_rows(results: Results) -> None:
    rows, entries = make_rows(1, trained=True), results["0"]
    pmi = [
        own - math.log(statistics.fmean(math.exp(other) for other in others))
        for own, others in zip(rows.initial_own, rows.initial_others, strict=True)
    ]
    tokens = rows.token_counts.tolist()
    assert entries["pmi_initial"].value == pytest.approx(statistics.fmean(pmi))
    per_token = [value / count for value, count in zip(pmi, tokens, strict=True)]
    assert entries["pmi_initial_per_token"].value == pytest.approx(statistics.fmean(per_token))
    assert entries["infonce_initial"].ceiling == pytest.approx(math.log(4))
    assert entries["response_tokens"].value == pytest.approx(statistics.fmean(tokens))
    assert entries["truncated"].value == pytest.approx(sum(count > 35 for count in tokens) / RESPONSES)
    kl = sum(policy - initial for policy, initial in zip(rows.policy_own, rows.initial_own, strict=True)) / sum(tokens)
    assert entries["kl_per_token"].value == pytest.approx(kl)
    # Chosen rewards rise by 0.1 * 4 in every pair; rejected ones by 0.1 * 9 in 3 of 12 and fall by 0.1 * 2 in 9.
    assert entries["reward_accuracy"].value == pytest.approx(9 / 12)
    assert entries["reward_margin"].value == pytest.approx((3 * (0.4 - 0.9) + 9 * (0.4 + 0.2)) / 12)
    # 8 responses stand in the source whole; 15 share no 3-gram with it, and repeat one of 4 bigrams and 2 of 5 words;
    # the last refuses in 6 new words.
    assert entries["copy_rate"].value == entries["only_copies"].value == pytest.approx(8 / 24)
    assert entries["distinct_1"].value == pytest.approx((8 + 15 * 3 / 5 + 1) / 24)
    assert entries["distinct_2"].value == pytest.approx((8 + 15 * 3 / 4 + 1) / 24)
    assert entries["corpus_distinct_2"].value == pytest.approx((3 + 3 + 5) / (8 * 3 + 15 * 4 + 5))
    assert entries["refusals"].value == pytest.approx(1 / 24)
    # All but the refusal have a twin; it shares the word "I" with others: 1/6, 0.5/5, 0.25/4, 0.125/3, and 5 to its 6.
    refusal = (1 / 6 * 0.5 / 5 * 0.25 / 4 * 0.125 / 3) ** (1 / 4)
    assert entries["self_bleu"].value == pytest.approx((23 + refusal) / 24)


def test_context_pmi_counts_only_rows_with_a_context(results: Results) -> None:
    rows = make_rows(1, trained=True)
    assert rows.initial_none is not None
    expected = statistics.fmean((rows.initial_own - rows.initial_none)[2 * SAMPLES :])
    assert results["0"]["context_pmi_initial"].value == pytest.approx(expected)
    assert results["0"]["context_pmi_initial"].n == PROMPTS - 2
    assert results["0"]["pmi_initial"].n == PROMPTS


@pytest.mark.parametrize("none", [None, np.full(RESPONSES, np.nan)])
def test_no_context_and_no_pairs_leave_their_metrics_out(none: np.ndarray | None) -> None:
    rows = make_rows(0, trained=False)
    empty: dict[str, Any] = {
        field.name: [] if field.name == "pair_prompt_ids" else np.empty(0)
        for field in dataclasses.fields(rows)
        if field.name.startswith("pair_")
    }
    entries = measure(dataclasses.replace(rows, initial_none=none, policy_none=none, **empty), None, **OPTIONS)
    assert set(entries) == {
        name for name in HELD_OUT if not name.startswith(("context_pmi", "reward")) and name not in ECHO_SHARES
    }


def test_a_policy_measured_against_itself_does_not_change() -> None:
    rows = make_rows(4, trained=True)
    for name, entry in measure(rows, rows, **OPTIONS).items():
        assert entry.change == 0, name
        assert Estimate.of_change(entry) is None or (entry.change_low, entry.change_high) == (0, 0)


def test_what_length_cannot_buy_agrees_with_loops_over_the_tokens(results: Results) -> None:
    rows, base = make_rows(1, trained=True), make_rows(0, trained=False)
    assert rows.tokens is not None
    assert base.tokens is not None

    def context_pmi(scores: TokenScores, places: Any) -> float:
        assert scores.none is not None
        return sum(scores.own[place] - scores.none[place] for place in places)

    matched, free, copies = [], [], []
    for new, old in list(zip(rows.tokens, base.tokens, strict=True))[2 * SAMPLES :]:
        shorter = range(min(len(new.own), len(old.own)))
        matched.append(context_pmi(new, shorter) - context_pmi(old, shorter))
        free.append(context_pmi(new, range(2, len(new.own))) - context_pmi(old, range(2, len(old.own))))
        copies.append(context_pmi(new, range(2)) - context_pmi(old, range(2)))
    entries, before = results["0"], results["base"]
    assert entries["context_pmi_matched"].change == pytest.approx(statistics.fmean(matched))
    assert entries["context_pmi_copy_free"].change == pytest.approx(statistics.fmean(free))
    share = sum(copies) / (sum(copies) + sum(free))
    assert entries["context_pmi_echo"].value == pytest.approx(share)
    assert entries["context_pmi_echo"].n == PROMPTS - 2
    assert rows.initial_none is not None
    assert base.initial_none is not None
    pmi, old_pmi = ((one.initial_own - one.initial_none)[2 * SAMPLES :] for one in (rows, base))  # type: ignore[operator]
    changes, longer = (
        (new - old).reshape(-1, SAMPLES).mean(axis=1)
        for new, old in ((pmi, old_pmi), (rows.token_counts[2 * SAMPLES :], base.token_counts[2 * SAMPLES :]))
    )
    intercept = np.polyfit(longer, changes, 1)[1]
    assert entries["context_pmi_adjusted"].change == pytest.approx(intercept)
    assert entries["context_pmi_per_token"].value == pytest.approx((pmi / rows.token_counts[2 * SAMPLES :]).mean())
    for name in ("context_pmi_matched", "context_pmi_adjusted", "pmi_matched", "pmi_adjusted"):
        whole = "context_pmi_initial" if name.startswith("context") else "pmi_initial"
        assert before[name].value == before[whole].value
        assert entries[name].value == pytest.approx(before[whole].value + (entries[name].change or 0.0))


def test_a_rise_that_may_be_none_has_no_echo() -> None:
    base = make_rows(0, trained=False)
    found = {
        seed: measure(make_rows(seed, trained=False), base, **OPTIONS) for seed in range(1, 12)
    }  # equal policies, other answers
    rose = [entries for entries in found.values() if (entries["context_pmi_initial"].change or 0.0) > 0]
    assert rose
    for entries in found.values():
        low = entries["context_pmi_initial"].change_low or 0.0
        assert ("context_pmi_echo" in entries) == (low > 0)
    assert any("context_pmi_echo" not in entries for entries in rose)


def test_an_empty_response_is_measured() -> None:
    rows = make_rows(0, trained=False)
    zeros = {name: getattr(rows, name).copy() for name in ("initial_own", "initial_others", "policy_own")}
    for column in zeros.values():
        column[0] = 0.0
    tokens = rows.token_counts.copy()
    tokens[0] = 0
    changed = dataclasses.replace(rows, responses=["", *rows.responses[1:]], token_counts=tokens, **zeros)
    entries = measure(changed, None, **OPTIONS)
    assert entries["kl_per_token"].value == 0.0
    assert all(math.isfinite(entry.value) for entry in entries.values())


def test_columns_of_other_lengths_are_named() -> None:
    rows = make_rows(0, trained=False)
    with pytest.raises(ValueError, match="policy_own: expected 24 rows, found 23"):
        dataclasses.replace(rows, policy_own=rows.policy_own[1:])
    with pytest.raises(ValueError, match="pair_initial_chosen: expected 12 rows, found 11"):
        dataclasses.replace(rows, pair_initial_chosen=rows.pair_initial_chosen[1:])


def test_the_table_shows_the_base_and_each_round(results: Results) -> None:
    lines = final_table(results).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) == 2 + 2 * len(HELD_OUT)
    row = next(line for line in lines if line.startswith("pmi_initial "))
    entry = results["0"]["pmi_initial"]
    for text in (f"{results['base']['pmi_initial'].value:.3f}", f"{entry.value:.3f}", f"{entry.change:+.3f}"):
        assert text in row
    assert row.endswith("rose")
    assert next(line for line in lines if line.startswith("reward_margin")).split()[2] == "0"


def test_the_table_of_the_base_alone(results: Results) -> None:
    lines = final_table({"base": results["base"]}).splitlines()
    assert len(lines) == 2 + len(HELD_OUT) - len(ECHO_SHARES)


def test_rounds_come_in_order() -> None:
    assert rounds_of({"10": {}, "base": {}, "9": {}, "0": {}}) == ["0", "9", "10"]


figures = st.floats(-1e9, 1e9)
units = st.sampled_from(sorted({measure.unit for measure in HELD_OUT.values()}))


@settings(deadline=None)
@given(figures, units, st.booleans())
def test_formatted_figures_are_short_and_near(value: float, unit: str, signed: bool) -> None:
    text = format_value(value, unit, signed=signed)
    assert len(text) <= 7
    near = 0.5 if abs(value) >= 1e6 - 1 else 0.05 if abs(value) < 0.01 else 0.006
    assert float(text) == pytest.approx(value, rel=near, abs=0.051 if unit == "tokens" else 0.00051)
    assert not signed or text[0] in "+-0"
    assert float(text) != 0.0 or not text.startswith("-")


@settings(deadline=None)
@given(st.lists(figures, min_size=6, max_size=6))
def test_no_figure_makes_the_table_wider(values: list[float]) -> None:
    keys = ("value", "low", "high", "change", "change_low", "change_high")
    entries = {
        name: Entry(**dict(zip(keys, values, strict=True)), n=64, unit=measure.unit)
        for name, measure in HELD_OUT.items()
    }
    table = final_table({"base": entries, "0": entries, "999": entries})
    assert max(map(len, table.splitlines())) <= 110


def test_changes_are_signed_and_bracketed() -> None:
    entry = Entry(1.0, 0.5, 1.5, 9, "nats per response", None, 9.1, -0.02, 12.5)
    assert format_change(entry) == "+9.10 [-0.02, +12.50]"
    assert format_change(dataclasses.replace(entry, change_low=None, change_high=None)) == "+9.100"
    assert format_change(Entry(1.0, 0.5, 1.5, 9, "nats")) == ""
