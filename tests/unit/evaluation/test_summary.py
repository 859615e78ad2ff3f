"""What a run ends with: the primary measure first, and what it is read beside.

python -m pytest tests/unit/evaluation/test_summary.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.evaluation.intervals import bootstrap_mean, detectable_change
from mipo_ray.evaluation.significance import with_primary
from mipo_ray.evaluation.summary import (
    BESIDE,
    closing_note,
    closing_text,
    closing_values,
    finding_lines,
    findings,
    limit_text,
    power_text,
    primary_of,
)
from mipo_ray.measures import HELD_OUT
from mipo_ray.storage.entries import Entry, Evaluated, Evaluation, Results
from mipo_ray.storage.records import to_text
from mipo_ray.storage.run_directory import open_run


def entry(name: str, value: float, change: float | None = None, width: float = 0.5) -> Entry:
    bounds = (None, None, None) if change is None else (change, change - width, change + width)
    return Entry(value, value - 1, value + 1, 20, HELD_OUT[name].unit, None, *bounds)


def results(*, with_context: bool = True) -> Results:
    names = [name for name in HELD_OUT if with_context or not name.startswith("context")]
    return {
        "base": {name: entry(name, 1.0) for name in names},
        "0": {name: entry(name, 1.0, 0.0) for name in names},
        "1": {name: entry(name, 3.0, 2.0) for name in names},
    }


def judged(metric: str, value: float, change: float, verdict: str) -> Evaluated:
    figures = Entry(value, None, None, 20, "share", None, change, change - 0.1, change + 0.1, verdict=verdict)
    return Evaluated(kind="judge" if metric == "net_win" else "generative", metric=metric, metrics={metric: figures})


def test_the_primary_measure_is_first_and_there_are_four() -> None:
    found = findings(results(), {})
    assert [one.name for one in found] == ["context_pmi_initial", "infonce_initial", "response_tokens", "copy_rate"]
    assert next((one.base, one.entry.value, one.word) for one in found) == (1.0, 3.0, "better")
    assert [one.word for one in found[2:]] == ["rose", "rose"]  # no longer answer is better for being longer


def test_rows_without_a_context_are_about_the_prompt() -> None:
    assert findings(results(with_context=False), {})[0].name == "pmi_initial"


def test_the_measure_that_was_named_comes_first_whatever_it_is() -> None:
    named = {key: with_primary(entries, "reward_margin") for key, entries in results().items()}
    assert [one.name for one in findings(named, {})] == ["reward_margin", *BESIDE]
    # The bound may be the primary measure itself, and then a judge takes no place of its.
    bound = {key: with_primary(entries, "infonce_initial") for key, entries in results().items()}
    evaluation: Evaluation = {"1": {"judge_pairwise": judged("net_win", 0.2, 0.2, "better")}}
    assert next(one.name for one in findings(bound, evaluation)) == "infonce_initial"
    assert closing_note(named["1"]) == []  # nothing was tested


def test_where_what_was_named_has_no_figure_nothing_takes_its_place() -> None:
    tested = {name: replace(one, change_p_value=0.01) for name, one in results()["1"].items()}
    del tested["context_pmi_adjusted"]
    assert primary_of(with_primary(tested, "context_pmi_adjusted")) is None
    assert primary_of(results()["1"]) == "context_pmi_initial"  # of an earlier version, which named none


def test_the_end_says_what_is_exploratory_and_warns_of_few_clusters() -> None:
    entries = {name: replace(one, change_p_value=0.004, users=4, questions=15) for name, one in results()["1"].items()}
    marked = with_primary(entries, "context_pmi_initial")
    others = len(HELD_OUT) - 1
    assert closing_note(marked) == [
        "few clusters: 4 users and 15 questions; with fewer than 15 of a kind an interval is a rough guide",
        f"(context PMI is the primary measure; verdicts on the {others} others are corrected for their number)",
    ]
    found = findings({"base": results()["base"], "1": marked}, {})
    assert [one.word for one in found] == ["better", *["not distinguishable"] * 3]


def test_what_the_held_out_prompts_could_show_is_told_by_the_base() -> None:
    base = results()["base"]  # half an interval is 1 nat wide, 1.96 errors; 1.96 + 0.84 of them are found
    assert power_text(base) == (
        "context PMI: 20 prompts show a change of about 1.429 nats per response in 4 of 5 cases, if changes vary as "
        "the base's figures do"
    )
    assert power_text(with_primary(base, "pmi_initial")).startswith("leave-one-out PMI: 20 prompts show")
    flat = {name: replace(one, low=one.value, high=one.value) for name, one in base.items()}
    assert power_text(flat) == power_text({}) == ""


@pytest.mark.parametrize(
    ("share", "truncated", "is_said"),
    [(0.62, "drop", True), (0.5, "drop", False), (0.62, "trim", False), (0.62, "keep", False)],
)
def test_the_limit_is_warned_of_where_it_cuts_most_answers_and_pairs_are_lost(
    share: float, truncated: str, is_said: bool
) -> None:
    config = load_config(None, [f"filters.truncated={truncated}", "generation.sampling.max_tokens=40"])
    said = limit_text({**results()["base"], "truncated": entry("truncated", share)}, config)
    assert said == (
        "the limit (generation.sampling.max_tokens 40) cut 62% of the base's held-out answers, and "
        "filters.truncated=drop leaves out every pair with such an answer: expect few pairs; set "
        "filters.truncated=trim, or a larger limit"
    ) * is_said  # fmt: skip
    assert limit_text({}, config) == ""


def test_the_power_is_what_it_says_where_changes_vary_as_the_base_does() -> None:
    random = np.random.default_rng(3)
    prompts = [str(index) for index in range(60)]
    found = 0
    for trial in range(300):
        base = random.normal(10, 4, size=60)
        estimate = bootstrap_mean(base, prompts, samples=200, seed=trial)
        could = detectable_change(estimate.as_entry("nats"))
        assert could is not None
        change = bootstrap_mean(random.normal(could, 4, size=60), prompts, samples=200, seed=trial)
        found += change.low > 0
    assert 0.7 <= found / 300 <= 0.9


def test_a_judge_comes_before_a_task_and_stands_in_place_of_the_bound() -> None:
    evaluation: Evaluation = {"base": {"gsm8k": judged("accuracy", 0.4, 0.0, "")}}
    evaluation["1"] = {
        "gsm8k": judged("accuracy", 0.5, 0.1, "not distinguishable"),
        "judge_pairwise": judged("net_win", 0.2, 0.2, "better"),
    }
    names = [one.name for one in findings(results(), evaluation)]
    assert names == ["context_pmi_initial", "judge_pairwise.net_win", "response_tokens", "copy_rate"]
    del evaluation["1"]["judge_pairwise"]
    found = findings(results(), evaluation)
    assert [(one.name, one.base, one.word) for one in found][1] == ("gsm8k.accuracy", 0.4, "not distinguishable")


def test_the_base_alone_has_no_change() -> None:
    found = findings({"base": results()["base"]}, {})
    assert {(one.base, one.word) for one in found} == {(None, "")}
    assert all("->" not in line for line in finding_lines(found))


def test_the_lines_stand_in_columns() -> None:
    lines = finding_lines(findings(results(), {}))
    assert lines[0] == "context PMI     1.000 ->  3.000  nats per response  +2.000 [+1.500, +2.500]  better"
    assert len({line.index("->") for line in lines}) == 1
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("full", [False, True])
def test_where_the_rest_is(full: bool, tmp_path: Path) -> None:
    run = open_run(str(tmp_path))
    assert closing_text(run, full=full) == ""
    assert closing_values(run) == []
    run.write_text("results.json", to_text(results()))
    lines = closing_text(run, full=full).splitlines()
    if full:
        assert len(lines) == 2 + 2 * len(HELD_OUT)
    else:
        assert lines[-1] == (
            f"(after round 1; changes from the base, 95 % intervals; every measure: --full, or {tmp_path}/report.html)"
        )
        assert len(lines) == 5
    assert next(one["measure"] for one in closing_values(run)) == "context_pmi_initial"
