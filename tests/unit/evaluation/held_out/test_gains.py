"""Which users, questions and lengths gained: groups of prompts, against plain loops.

python -m pytest tests/unit/evaluation/held_out/test_gains.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.held_out.gains import SHOWN_EACH_WAY, Labels, where_gained
from mipo_ray.evaluation.held_out.metrics import MeasuredRows, measure
from mipo_ray.storage.gains import GainGroup, Gains
from mipo_ray.storage.records import read_record, to_json

DRAW: dict[str, Any] = {"samples": 50, "seed": 0}


def rows(
    pmi: list[float], lengths: list[int], users: list[str] | None, questions: list[str] | None, *, context: bool = True
) -> MeasuredRows:
    """One answer to each prompt, with a PMI of so many nats."""
    count = len(pmi)
    own, none = np.full(count, -20.0), np.full(count, -20.0) - pmi
    return MeasuredRows(
        prompt_ids=[f"p{row:03d}" for row in range(count)],
        responses=["some words"] * count,
        sources=["a question"] * count,
        token_counts=np.asarray(lengths),
        truncated=np.zeros(count, dtype=bool),
        initial_own=own,
        initial_others=none[:, None],
        initial_none=none if context else None,
        policy_own=own,
        policy_others=none[:, None],
        policy_none=none if context else None,
        pair_prompt_ids=[],
        pair_policy_chosen=np.empty(0),
        pair_policy_rejected=np.empty(0),
        pair_initial_chosen=np.empty(0),
        pair_initial_rejected=np.empty(0),
        users=users,
        questions=questions,
    )


def labels(count: int) -> Labels:
    prompts = [f"p{row:03d}" for row in range(count)]
    return Labels({one: f"user of {one}" for one in prompts}, {one: f"question of {one}" for one in prompts})


def gained(
    changes: list[float], users: list[str] | None, questions: list[str], lengths: list[int] | None = None
) -> Gains:
    count = len(changes)
    base_lengths = lengths or [10] * count
    base = rows([1.0] * count, base_lengths, users, questions)
    policy = rows([1.0 + change for change in changes], [length + 3 for length in base_lengths], users, questions)
    found = where_gained(policy, base, labels(count), **DRAW)
    assert found is not None
    return found


def test_users_and_questions_are_ranked_by_their_gain() -> None:
    found = gained([3.0, 1.0, -2.0, 0.5], ["ann", "ann", "ben", ""], ["q1", "q2", "q1", "q2"])
    assert found.measure == "context_pmi_initial"
    users, questions = found.by["users"], found.by["questions"]
    assert (users.count, users.gained) == (2, 1)  # the row that names nobody is no user
    assert [(one.label, one.n, one.change, one.longer) for one in users.groups] == [
        ("user of p000", 2, 2.0, 3.0),
        ("user of p002", 1, -2.0, 3.0),
    ]
    several, single = users.groups
    assert several.low is not None
    assert several.high is not None
    assert several.low < 2.0 < several.high
    assert (single.low, single.high) == (None, None)
    assert [(one.label, one.change) for one in questions.groups] == [
        ("question of p001", 0.75),
        ("question of p000", 0.5),
    ]
    assert read_record(Gains, json.dumps(to_json(found)), "manifest.json") == found


def test_lengths_are_quarters_of_the_mean_of_base_and_policy_in_their_own_order() -> None:
    lengths = [40, 10, 20, 30, 11, 21, 31, 41]
    found = gained([4.0, -1.0, 0.0, 2.0, -3.0, 2.0, 4.0, 6.0], None, list("abcdefgh"), lengths)
    assert "users" not in found.by
    assert [(one.label, one.n, one.change) for one in found.by["lengths"].groups] == [
        ("11.5 to 12.5", 2, -2.0),
        ("21.5 to 22.5", 2, 1.0),
        ("31.5 to 32.5", 2, 3.0),
        ("41.5 to 42.5", 2, 5.0),
    ]
    assert [one.label for one in gained([1.0, 2.0], None, ["a", "b"]).by["lengths"].groups] == ["11.5"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-9, 9), st.integers(1, 60)), min_size=2, max_size=60))
def test_groups_agree_with_loops(drawn: list[tuple[int, int, int]]) -> None:
    users, changes, lengths = (list(column) for column in zip(*drawn, strict=True))
    named = [f"u{user}" for user in users]
    found = gained([float(change) for change in changes], named, [f"q{row}" for row in range(len(drawn))], lengths)
    means = {
        name: statistics.fmean(change for user, change in zip(named, changes, strict=True) if user == name)
        for name in named
    }
    by_user = found.by["users"]
    assert by_user.count == len(means)
    assert by_user.gained == sum(mean > 0 for mean in means.values())
    ranked = sorted(means.values(), reverse=True)
    most = 2 * SHOWN_EACH_WAY
    shown = ranked if len(ranked) <= most else ranked[:SHOWN_EACH_WAY] + ranked[-SHOWN_EACH_WAY:]
    assert [one.change for one in by_user.groups] == pytest.approx(shown)
    by_length = found.by["lengths"].groups
    assert sum(one.n for one in by_length) == len(drawn)
    assert sum(one.n * one.change for one in by_length) == pytest.approx(sum(changes), abs=1e-9)


def test_rows_without_a_context_gain_leave_one_out_pmi_and_a_run_that_knows_no_questions_nothing() -> None:
    base, policy = (rows(pmi, [10, 10], None, ["a", "b"], context=False) for pmi in ([1.0, 1.0], [2.0, 4.0]))
    found = where_gained(policy, base, labels(2), **DRAW)
    assert found is not None
    assert found.measure == "pmi_initial"
    change = measure(policy, base, beta=0.1, **DRAW)["pmi_initial"].change
    assert statistics.fmean(one.change for one in found.by["questions"].groups) == pytest.approx(change)
    unknown = [rows(pmi, [10, 10], None, None) for pmi in ([1.0, 1.0], [2.0, 4.0])]
    assert where_gained(unknown[1], unknown[0], labels(2), **DRAW) is None


def test_a_policy_that_is_the_base_gains_at_no_length() -> None:
    """Answers drawn twice, of lengths that vary by chance and with a PMI in proportion: by the base's lengths alone the
    short ones would grow by two nats."""
    generator = np.random.default_rng(0)
    prompts = 4_000
    middle = generator.normal(60, 20, prompts)
    base, policy = (np.maximum(1.0, middle + generator.normal(0, 20, prompts)) for _ in "ab")
    questions = [str(row) for row in range(prompts)]
    of_base, of_policy = (rows(list(0.1 * drawn), list(drawn), None, questions) for drawn in (base, policy))
    found = where_gained(of_policy, of_base, labels(prompts), **DRAW)
    assert found is not None
    changes = [one.change for one in found.by["lengths"].groups]
    assert changes == pytest.approx([0.0] * 4, abs=0.3)  # 0.09 each by chance


def test_long_labels_are_cut() -> None:
    base, policy = (rows([pmi] * 2, [10, 10], None, ["a", "b"]) for pmi in (1.0, 2.0))
    long = Labels({}, dict.fromkeys(["p000", "p001"], "word " * 100))
    found = where_gained(policy, base, long, **DRAW)
    assert found is not None
    assert isinstance(found.by["questions"].groups[0], GainGroup)
    assert len(found.by["questions"].groups[0].label) < 230
