"""The guard's decision: figures of a round beside bounds.

python -m pytest tests/unit/evaluation/test_guard.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.guard import DEFAULT_BOUNDS, Bound
from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.figures import causes
from mipo_ray.evaluation.guard import Figures, check_guard, check_measured, figures_of, verdict
from mipo_ray.evaluation.significance import with_primary
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.storage.entries import Entry, Evaluated
from mipo_ray.storage.manifests import GuardFacts
from tests.helpers.guard_figures import BASE_FIGURES, PRIMARY, entries


def policy(width: float = 3.0, **values: float) -> Figures:
    return figures_of(entries(width, **values), {})


def task(accuracy: float, kind: str = "generative") -> Evaluated:
    shares = {"accuracy": accuracy, "no_answer": 0.0}
    metrics = {name: Entry(value, value - 0.1, value + 0.1, 50, "share") for name, value in shares.items()}
    return Evaluated(kind=kind, metric="accuracy", metrics=metrics)


def broken(found: GuardFacts) -> list[str]:
    return [one.measure for one in found.broken]


def test_a_round_like_the_base_keeps_every_default_bound() -> None:
    found = verdict(policy(), {"base": policy()}, DEFAULT_BOUNDS)
    assert not found.is_bad
    assert found.compared == 9  # two of length, six more, the primary measure


@pytest.mark.parametrize(
    ("name", "on", "beyond"),
    [
        ("response_tokens", 20.0, 19.9),
        ("response_tokens", 80.0, 80.1),
        ("truncated", 0.4, 0.41),
        ("copy_rate", 0.25, 0.26),
        ("distinct_2", 0.72, 0.719),
        ("corpus_distinct_2", 0.3, 0.299),
        ("self_bleu", 0.3, 0.31),
        ("kl_per_token", 1.0, 1.01),
        (PRIMARY, 13.0, 12.9),
    ],
)
def test_every_default_bound_has_its_place(name: str, on: float, beyond: float) -> None:
    """`on` is the bound, worked out by hand from the base's figures."""
    inside = math.nextafter(on, BASE_FIGURES[name])
    assert broken(verdict(policy(**{name: inside}), {"base": policy()}, DEFAULT_BOUNDS)) == []
    assert broken(verdict(policy(**{name: beyond}), {"base": policy()}, DEFAULT_BOUNDS)) == [name]


def test_the_best_policy_before_sets_the_bound_of_what_the_run_is_about() -> None:
    good = {"base": policy(), "0": policy(**{PRIMARY: 30.0}), "2": policy(width=1.0, **{PRIMARY: 25.0})}
    (one,) = verdict(policy(**{PRIMARY: 26.9}), good, {}).broken
    assert (one.measure, one.value, one.side, one.bound, one.against, one.theirs) == (
        PRIMARY,
        26.9,
        "at least",
        27.0,
        "0",
        30.0,
    )
    assert not verdict(policy(**{PRIMARY: 27.0}), good, {}).is_bad


def test_a_primary_measure_without_a_better_way_has_no_bound_by_itself() -> None:
    def about_length(value: float) -> Figures:
        return figures_of(with_primary(entries(response_tokens=value), "response_tokens"), {})

    assert verdict(about_length(1.0), {"base": about_length(40.0)}, {}) == GuardFacts(compared=0, broken=[])


def test_tasks_are_bounded_by_their_metric_and_judges_are_not() -> None:
    def measured(accuracy: float) -> Figures:
        judged = replace(task(accuracy, kind="judge"), metric="net_win")
        return figures_of(entries(), {"sums": task(accuracy), "judge_pairwise": judged})

    assert measured(0.5).main == (PRIMARY, "sums.accuracy")
    assert broken(verdict(measured(0.39), {"base": measured(0.5)}, {})) == ["sums.accuracy"]
    assert broken(verdict(measured(0.41), {"base": measured(0.5)}, {})) == []
    bounds: dict[str, Bound | None] = {"sums.accuracy": {"max_fall": 0.02}}
    assert broken(verdict(measured(0.45), {"base": measured(0.5)}, bounds)) == ["sums.accuracy"]
    (one,) = verdict(measured(0.45), {"base": measured(0.5)}, bounds).broken
    assert causes(GuardFacts(compared=1, broken=[one])) == (
        "sums accuracy 0.450, expected at least 0.480 (the base has 0.500)"
    )


def test_a_task_that_was_added_later_is_compared_with_the_policies_that_have_it() -> None:
    """Tasks are execution only: a policy may have been measured before there were any."""
    with_task = figures_of(entries(), {"sums": task(0.5)})
    good = {"base": with_task, "0": policy(), "1": with_task}
    assert not verdict(figures_of(entries(), {"sums": task(0.45)}), good, {}).is_bad


def test_a_figure_that_a_policy_does_not_have_breaks_nothing() -> None:
    bounds: dict[str, Bound | None] = {"pmi_adjusted": {"max_fall": 1.0}, "self_bleu": {"max_rise": 0.1}}
    found = verdict(policy(self_bleu=0.5), {"base": policy(pmi_adjusted=3.0)}, bounds)
    assert broken(found) == ["self_bleu"]
    assert found.compared == 2  # with the primary measure


def test_the_cause_in_words() -> None:
    good = {"base": policy(), "3": policy(**{PRIMARY: 30.0})}
    found = verdict(policy(self_bleu=0.412), good, DEFAULT_BOUNDS)
    assert causes(found) == (
        "self-BLEU 0.412, expected at most 0.300 (the base has 0.100); "
        "context PMI 16.00 nats per response, expected at least 27.00 (round 3 has 30.00)"
    )


AMOUNT = st.floats(0, 1)
BOUND = st.fixed_dictionaries(
    {},
    optional={
        "min_ratio": AMOUNT,
        "max_ratio": st.floats(1, 4),
        "max_rise": AMOUNT,
        "max_fall": AMOUNT,
    },
)
SHARES = ("truncated", "copy_rate", "distinct_2", "self_bleu")
BOUNDS = st.dictionaries(st.sampled_from(SHARES), BOUND)
VALUES = st.fixed_dictionaries(dict.fromkeys(SHARES, st.floats(0, 1)))


@given(base=VALUES, bounds=BOUNDS)
def test_the_base_keeps_every_bound_that_there_can_be(base: dict[str, float], bounds: dict[str, Any]) -> None:
    assert not verdict(policy(**base), {"base": policy(**base)}, bounds).is_bad


@given(base=VALUES, values=VALUES, bounds=BOUNDS)
def test_a_round_is_bad_where_a_figure_is_outside_what_its_bounds_leave(
    base: dict[str, float], values: dict[str, float], bounds: dict[str, Any]
) -> None:
    """The least and the most that all sides of a bound leave together, worked out the other way round."""
    expected = set()
    for name, bound in bounds.items():
        least = max(base[name] * bound.get("min_ratio", 0.0), base[name] - bound.get("max_fall", math.inf))
        most = base[name] + bound.get("max_rise", math.inf)
        if "max_ratio" in bound:
            most = min(most, base[name] * bound["max_ratio"])
        if not least <= values[name] <= most:
            expected.add(name)
    assert set(broken(verdict(policy(**values), {"base": policy(**base)}, bounds))) == expected


@given(base=VALUES, values=VALUES, bounds=BOUNDS, loosened=st.sampled_from(SHARES))
def test_a_bound_that_is_loosened_or_taken_out_breaks_no_more(
    base: dict[str, float], values: dict[str, float], bounds: dict[str, Any], loosened: str
) -> None:
    good = {"base": policy(**base)}
    before = broken(verdict(policy(**values), good, bounds))
    looser = {
        side: amount / 2 if side == "min_ratio" else amount + 0.5 for side, amount in bounds.get(loosened, {}).items()
    }
    for changed in (looser, None):
        after = broken(verdict(policy(**values), good, {**bounds, loosened: changed}))
        assert set(after) <= set(before)
        assert set(before) - set(after) <= {loosened}


@given(
    earlier=st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 9)), min_size=1, max_size=6), value=st.floats(-70, 70)
)
def test_the_interval_is_that_of_the_highest_figure(earlier: list[tuple[float, float]], value: float) -> None:
    good = {
        ("base" if index == 0 else str(index - 1)): policy(width, **{PRIMARY: one})
        for index, (one, width) in enumerate(earlier)
    }
    best, width = max(earlier, key=lambda pair: pair[0])
    assert verdict(policy(**{PRIMARY: value}), good, {}).is_bad == (value < best - width)


def summary(with_context: int) -> PromptSummary:
    """Of 6 held-out rows, so many with a context."""
    return PromptSummary((), (), (), 6, with_context, 6, with_context, 600, "JSONL")


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("{sums.accuracy: {max_fall: 0.1}}", "guard.bounds: sums.accuracy: expected a metric of the run's tasks "),
        ("{context_pmi_policy: {max_fall: 1}}", "guard.bounds: context_pmi_policy: expected held-out rows with a con"),
    ],
)
def test_a_bound_over_what_is_not_measured_is_refused_by_name(bound: str, expected: str) -> None:
    config = load_config(overrides=["guard.when_bad=stop", f"guard.bounds={bound}"])
    with pytest.raises(UserError, match="^" + expected.replace(".", r"\.")):
        check_guard(config, summary(0), ())
    off = load_config(overrides=[f"guard.bounds={bound}"])
    check_guard(off, summary(0), ())
    if "context" in bound:
        check_guard(config, summary(6), ())


def test_what_the_base_turns_out_to_have_none_of_is_refused_by_name() -> None:
    check_measured(policy(), DEFAULT_BOUNDS)
    check_measured(policy(), {"reward_margin": None})
    assert verdict(policy(), {"base": policy()}, {"reward_margin": None}).compared == 1
    with pytest.raises(UserError, match=r"^guard\.bounds: reward_margin: expected measures that the held-out prompts"):
        check_measured(policy(), {**DEFAULT_BOUNDS, "reward_margin": {"max_fall": 1.0}})
