"""The report's parts on their own: heat maps, flow, tasks and judge, cost.

python -m pytest tests/unit/report/test_report_sections.py
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from mipo_ray.evaluation.held_out.metrics import MeasuredRows
from mipo_ray.evaluation.held_out.mutual_information import pmi_matrix
from mipo_ray.evaluation.intervals import bootstrap_mean
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.report.charts import drift_charts, interval_chart
from mipo_ray.report.cost import ShownStage, run_cost
from mipo_ray.report.effects import NO_RISE, NOT_KNOWN, NOT_MEASURED, effect_rows
from mipo_ray.report.flow import flows
from mipo_ray.report.gains import MOST_MOVED, gain_tables, most_moved
from mipo_ray.report.heatmaps import heat_maps
from mipo_ray.report.page import render_report
from mipo_ray.report.tasks_and_judge import comparisons, definitions, headline, judgings, task_charts, task_rows
from mipo_ray.storage.entries import Entry, Evaluated
from mipo_ray.storage.gains import GainGroup, Gains, GainsBy
from mipo_ray.storage.manifests import Matrix
from mipo_ray.storage.pair_statistics import PairStatistics, StrategyStatistics
from tests.helpers.report_data import (
    JUDGE_PROMPT,
    make_evaluation,
    make_matrix,
    make_results,
    make_run,
    make_statistics,
)

GENERATOR = np.random.default_rng


def entry(value: float, change: float | None = None, **more: Any) -> Entry:
    made = Entry(value, value - 0.04, value + 0.04, 200, "share", "wilson", **more)
    if change is None:
        return made
    return dataclasses.replace(made, change=change, change_low=change - 0.03, change_high=change + 0.03)


def task(**metrics: Entry) -> Evaluated:
    return Evaluated(kind="generative", version=1, prompt_hash="0123456789ab", data="a.parquet", metrics=metrics)


# Heat maps


def test_heat_maps_share_a_scale_and_show_every_cell() -> None:
    matrices = {"base": make_matrix(GENERATOR(0), 5.0), "3": make_matrix(GENERATOR(1), 20.0)}
    contexts, prompts = heat_maps(matrices)
    assert [maps.column for maps in (contexts, prompts)] == ["user", "prompt"]
    assert [map.title for map in contexts.maps] == [
        "base", "round 3, judged by the initial model", "round 3, judged by itself"
    ]  # fmt: skip
    tables = [pmi_matrix(getattr(matrices[key]["contexts"], judge)) for key, judge in (
        ("base", "initial"), ("3", "initial"), ("3", "policy"))]  # fmt: skip
    reach = max(abs(table).max() for table in tables)
    for map, table in zip(contexts.maps, tables, strict=True):
        shades = [(cell.tone, cell.opacity) for cell in map.cells]
        assert shades == [("cool" if value >= 0 else "warm", round(abs(value) / reach, 3)) for value in table.flat]
        assert max(cell.x + map.side for cell in map.cells) == pytest.approx(360)
        assert max(cell.y + map.side for cell in map.cells) == pytest.approx(map.height)
        assert f"own user: {table.diagonal().mean():.0f} [" in map.summary
        assert "of 8 answers are likeliest under their own" in map.summary
    assert "8 of 8" in contexts.maps[1].summary
    assert max(cell.opacity for map in contexts.maps for cell in map.cells) == 1.0


def test_a_round_measured_without_a_base_and_a_base_alone_have_maps() -> None:
    matrix = make_matrix(GENERATOR(0), 5.0)
    assert [map.title for map in heat_maps({"base": {"prompts": matrix["prompts"]}})[0].maps] == ["base"]
    assert len(heat_maps({"1": matrix})[0].maps) == 2
    assert heat_maps({}) == heat_maps({"base": {}}) == []


def test_the_mean_under_the_own_conditioning_has_an_interval_over_users() -> None:
    matrix = make_matrix(GENERATOR(0), 5.0)["contexts"]
    own = np.diag(pmi_matrix(matrix.initial))
    users = {prompt: str(index % 4) for index, prompt in enumerate(matrix.prompt_ids)}
    (by_user,) = heat_maps({"base": {"contexts": matrix}}, Clusters(users, {prompt: prompt for prompt in users}))
    (alone,) = heat_maps({"base": {"contexts": matrix}})
    known = bootstrap_mean(own, [users[prompt] for prompt in matrix.prompt_ids], samples=2000, seed=0)
    found = re.match(r"own user: (\S+) \[(\S+), (\S+)\] nats on average; others: ", by_user.maps[0].summary)
    assert found is not None
    figures = [float(text.replace("\u2212", "-")) for text in found.groups()]
    assert figures == pytest.approx([own.mean(), known.low, known.high], abs=0.51)
    assert by_user.maps[0].summary != alone.maps[0].summary


def test_equal_columns_are_drawn_and_large_matrices_have_no_numbers() -> None:
    flat = Matrix(prompt_ids=["x", "y"], labels=["x", "y"], initial=[[-5.0, -5.0], [-7.0, -7.0]])
    (maps,) = heat_maps({"base": {"prompts": flat}})
    assert {cell.number for cell in maps.maps[0].cells} == {"0.00"}
    large = Matrix(prompt_ids=["x"] * 13, labels=["x"] * 13, initial=GENERATOR(0).normal(size=(13, 13)).tolist())
    assert {cell.number for cell in heat_maps({"base": {"prompts": large}})[0].maps[0].cells} == {""}


# Flow


def test_the_flow_tells_a_round_in_order() -> None:
    stages = [
        ShownStage(1, "generate", 1.0, counts={"prompts": 5}),
        ShownStage(1, "train", 1.0, counts={"steps": 3, "tokens": 1234, "first_loss": 0.6931, "last_loss": 0.5}),
        ShownStage(1, "evaluate", 1.0, counts={"responses": 40}),
    ]
    (flow,) = flows(stages, {1: make_statistics()})
    assert [(step.count, step.label) for step in flow.steps] == [
        ("5", "prompts"), ("10", "conditioned rows"), ("900", "tokens sampled"), ("1", "rows dropped"), ("9", "pairs"),
        ("3", "optimizer steps"), ("round 1", "policy"), ("40", "held-out answers")
    ]  # fmt: skip
    assert sorted(flow.steps[1].details) == ["random_prompt: 8", "some text: 2"]
    assert flow.steps[3].details == ["some text: 1"]
    assert flow.steps[5].details == ["1,234 tokens trained", "loss 0.6931 to 0.5000"]
    assert [(part.name, part.percent) for part in flow.parts] == [("kept", 90.0), ("some text", 10.0)]


def test_pairs_that_exist_were_neither_conditioned_nor_sampled() -> None:
    given = StrategyStatistics(rows=4, kept=3)
    dropped = {"too_long": 1}
    statistics = PairStatistics(rows=4, kept=3, dropped=dropped, by_strategy={"given": given}, generated_tokens=0)
    (flow,) = flows([], {0: statistics})
    assert [(step.count, step.label) for step in flow.steps] == [
        ("4", "pairs that exist"), ("1", "rows dropped"), ("3", "pairs")
    ]  # fmt: skip


def test_an_unfinished_round_flows_as_far_as_it_came() -> None:
    (flow,) = flows([], {0: PairStatistics(rows=4, kept=3, dropped={"empty": 1})})
    assert [step.label for step in flow.steps] == ["conditioned rows", "rows sampled", "rows dropped", "pairs"]


# Tasks and judge


def test_comparisons_take_the_newest_round_and_say_it_plainly() -> None:
    evaluation = make_evaluation(GENERATOR(5))
    found = {comparison.what: comparison for comparison in comparisons(evaluation)}
    assert set(found) == {
        "arc_easy_likelihood accuracy", "svamp accuracy", "the judge's pairwise verdict", "the judge's rating"
    }  # fmt: skip
    better = found["arc_easy_likelihood accuracy"]
    assert better.word == evaluation["1"]["arc_easy_likelihood"].metrics["accuracy"].verdict == "better"
    assert "arc_easy_likelihood accuracy is better than the base" in better.sentence
    assert "exact McNemar p" in better.sentence
    assert found["svamp accuracy"].word == "not distinguishable"
    assert found["the judge's pairwise verdict"].sentence.startswith("Judged in pairs, round 1 is")
    said = headline(list(found.values()))
    assert said.startswith("Against the base, round 1 is better in arc_easy_likelihood accuracy")
    assert "not distinguishable in svamp accuracy" in said
    assert "round 0" not in said


def test_what_only_an_earlier_round_was_measured_in_is_said_of_that_round() -> None:
    def measured(change: float, p_value: float) -> Evaluated:
        return task(accuracy=entry(0.5 + change, change, fixed=9, broken=3, p_value=p_value))

    evaluation = {
        "base": {"x": task(accuracy=entry(0.5)), "svamp": task(accuracy=entry(0.5))},
        "9": {"x": measured(0.1, 0.001), "svamp": measured(0.1, 0.001)},
        "10": {"x": measured(-0.1, 0.001)},
    }
    said = headline(comparisons(evaluation))
    assert said == "Against the base, round 10 is worse in x accuracy; round 9 is better in svamp accuracy."
    del evaluation["10"]
    assert headline(comparisons(evaluation)) == "Against the base, round 9 is better in x accuracy, svamp accuracy."


@pytest.mark.parametrize(
    ("change", "p_value", "word"),
    [(0.1, 0.001, "better"), (-0.1, 0.001, "worse"), (0.01, 0.4, "not distinguishable"),
     (0.1, 0.2, "not distinguishable")],
)  # fmt: skip
def test_a_verdict_that_is_not_written_down_is_worked_out(change: float, p_value: float, word: str) -> None:
    figures = {"fixed": 9, "broken": 3, "p_value": p_value}
    evaluation = {
        "base": {"x": task(accuracy=entry(0.5))},
        "0": {"x": task(accuracy=entry(0.5 + change, change, **figures))},
    }
    (comparison,) = comparisons(evaluation)
    assert comparison.word == word
    assert word in comparison.sentence
    assert word in headline([comparison])


def test_results_made_in_another_way_are_not_compared() -> None:
    base, new = task(accuracy=entry(0.5)), task(accuracy=entry(0.6, 0.1))
    assert len(comparisons({"base": {"x": base}, "0": {"x": new}})) == 1
    for field, value in (("version", 2), ("prompt_hash", "ffff"), ("data", "b.parquet")):
        evaluation = {"base": {"x": base}, "0": {"x": dataclasses.replace(new, **{field: value})}}
        assert comparisons(evaluation) == []
        assert len(definitions(evaluation)) == 2
    assert comparisons({"0": {"x": new}}) == comparisons({"base": {"x": base}}) == comparisons({}) == []
    assert headline([]) == ""


def test_tasks_have_a_row_for_each_metric_and_a_chart_for_the_main_one() -> None:
    evaluation = {
        "base": {"x": task(accuracy=entry(0.5), no_answer=entry(0.1))},
        "0": {"x": task(accuracy=entry(0.625, 0.125, fixed=30, broken=5, p_value=0.00002, verdict="better"))},
    }
    accuracy, no_answer = task_rows(evaluation)
    assert (accuracy.task, accuracy.metric, accuracy.n) == ("x", "accuracy", "200")
    assert [score.value for score in accuracy.scores] == ["0.500", "0.625"]
    assert accuracy.scores[1].interval == "[0.585, 0.665]"
    assert accuracy.scores[1].test == "30 fixed, 5 broken, p = 2e-05"
    assert [score.value for score in no_answer.scores] == ["0.100", ""]
    (chart,) = task_charts(evaluation)
    assert [bar.label for bar in chart.bars] == ["0.500", "0.625"]
    assert chart.trend


def test_the_pairwise_judge_has_a_bar_for_each_round_with_all_its_checks() -> None:
    pairwise, pointwise = judgings(make_evaluation(GENERATOR(5)))
    assert pairwise.prompt == JUDGE_PROMPT
    assert pairwise.judge == "judges/large-instruct"
    assert [judged.policy for judged in pairwise.policies] == ["round 0", "round 1"]
    for judged in pairwise.policies:
        assert [part.name for part in judged.outcomes] == ["win", "tie", "loss"]
        assert sum(part.percent for part in judged.outcomes) == pytest.approx(100)
        assert [name for name, _ in judged.checks] == ["position bias", "self consistency", "unreadable"]
    assert [judged.policy for judged in pointwise.policies] == ["base", "round 0", "round 1"]
    assert all(judged.outcomes == [] and judged.checks[0][0] == "rating" for judged in pointwise.policies)


def test_a_page_without_a_part_leaves_its_section_out() -> None:
    whole = render_report(
        make_run(evaluation=make_evaluation(GENERATOR(5)), matrices={"base": make_matrix(GENERATOR(0), 3.0)})
    )
    plain = render_report(make_run())
    for section in ("tasks", "judge", "matrix"):
        assert f'<h2 id="{section}">' in whole
        assert f'<h2 id="{section}">' not in plain
    only_judge = {key: {name: each for name, each in of.items() if name == "judge_pairwise"}
                  for key, of in make_evaluation(GENERATOR(5)).items()}  # fmt: skip
    judged = render_report(make_run(evaluation=only_judge))
    assert '<h2 id="judge">' in judged
    assert '<h2 id="tasks">' not in judged


def test_a_hostile_judge_prompt_and_label_stay_text() -> None:
    hostile = "</pre><script>alert(1)</script>"
    evaluation = make_evaluation(GENERATOR(5))
    evaluation["1"]["judge_pairwise"] = dataclasses.replace(evaluation["1"]["judge_pairwise"], prompt=hostile)
    matrix = make_matrix(GENERATOR(0), 3.0)
    matrix["prompts"].labels[0] = hostile
    html = render_report(make_run(evaluation=evaluation, matrices={"base": matrix}))
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") == 2


# Beyond length and verbatim copies


def test_effects_stand_beside_the_change_of_each_pmi_with_their_words() -> None:
    results = make_results(context_pmi_initial=2.5, context_pmi_matched=0.01)
    results["1"]["context_pmi_echo"] = Entry(0.61, 0.41, 0.81, 20, "share")
    rows = {(row.round, row.title): row.cells for row in effect_rows(results)}
    assert list(rows) == [(key, title) for key in "01" for title in ("context PMI", "leave-one-out PMI")]
    whole, per_token, matched, adjusted, copy_free, echo = rows["1", "context PMI"]
    assert (whole.shown, whole.word) == ("+2.500 [+2.450, +2.550]", "rose")
    assert (matched.shown, matched.word) == ("+0.0100 [-0.0400, +0.0600]", "not distinguishable")
    assert per_token.word == adjusted.word == copy_free.word == "not distinguishable"
    assert (echo.shown, echo.word) == ("0.610 [0.410, 0.810]", "")
    html = render_report(make_run(results=results))
    for shown in ("0.610 [0.410, 0.810]", "+2.500 [+2.450, +2.550]"):
        assert shown in html


def test_a_run_of_an_earlier_version_says_that_effects_were_not_measured() -> None:
    earlier = {
        key: {name: one for name, one in entries.items() if name in ("pmi_initial", "pmi_initial_per_token")}
        for key, entries in make_results(pmi_initial=1.0).items()
    }
    assert effect_rows({"base": earlier["base"]}) == []
    first = effect_rows(earlier)[0]
    assert [cell.shown for cell in first.cells[2:]] == [NOT_MEASURED] * 4
    assert first.cells[1].shown != NOT_MEASURED
    # The rounds that follow know their own figures, and no change from such a base.
    without = dataclasses.replace(make_results()["1"]["pmi_copy_free"], change=None, change_low=None, change_high=None)
    (row,) = effect_rows({"base": earlier["base"], "0": earlier["0"] | {"pmi_copy_free": without}})
    assert [cell.shown for cell in row.cells[4:]] == [NOT_MEASURED] * 2


def test_where_every_length_changed_by_as_much_the_change_at_equal_length_is_not_known() -> None:
    results = make_results()
    for policy in ("0", "1"):
        del results[policy]["pmi_adjusted"]
    assert [row.cells[3].shown for row in effect_rows(results) if row.title != "context PMI"] == [NOT_KNOWN] * 2


def test_without_a_rise_there_is_no_echo_share() -> None:
    results = make_results(pmi_initial=-1.0)
    for policy in results.values():
        for name in ("pmi_echo", "context_pmi_echo"):
            del policy[name]
    assert {row.cells[-1].shown for row in effect_rows(results)} == {NO_RISE}


# Charts and cost


def test_a_figure_without_an_interval_is_drawn() -> None:
    results = make_results()
    (chart,) = [chart for chart in drift_charts(results) if "in all answers" in chart.title]
    assert all(bar.low == bar.y == bar.high for bar in chart.bars)
    assert len(re.findall("[ML]", chart.trend)) == 3
    alone = interval_chart("x", ["base"], [entry(0.5)])
    assert alone.trend == ""


def test_cost_adds_up() -> None:
    stages = [
        ShownStage("base", "evaluate", 100.0, counts={"responses": 4, "generated_tokens": 50}),
        ShownStage(0, "train", 200.0, 4.0, {"steps": 3, "tokens": 3000}),
    ]
    cost = run_cost(stages)
    assert cost is not None
    assert cost.total == (
        "All finished stages together: 5 min 00 s, 50 tokens generated, 3,000 tokens trained on, "
        "at most 13 min 20 s of GPU time reserved."
    )
    assert [dataclasses.astuple(stage)[3:] for stage in cost.stages] == [
        ("1 min 40 s", 50.0, "50", "", "0.5", "", "responses 4"),
        ("3 min 20 s", 100.0, "", "3,000", "15.0", "4", "steps 3"),
    ]
    assert run_cost([]) is None
    without = run_cost(stages[:1])
    assert without is not None
    assert without.total.endswith("no GPU.")
    assert not without.any_gpus


# Where the gain sits


HOSTILE = "</p><script>alert(1)</script>"


def gains_of(*changes: float, count: int | None = None) -> Gains:
    groups = [
        GainGroup(label=f"{HOSTILE} {index}", n=3, change=change, low=change - 1, high=change + 1, longer=-2.5)
        for index, change in enumerate(changes)
    ]
    single = GainGroup(label="a single prompt", n=1, change=-0.5, longer=0.0)
    found = GainsBy(count=count or len(changes) + 1, gained=len(changes), groups=[*groups, single])
    return Gains(measure="context_pmi_initial", by={"users": found, "questions": GainsBy(count=1, gained=1, groups=[])})


def test_groups_stand_with_their_changes_and_single_ones_without_interval() -> None:
    (table,) = gain_tables(gains_of(4.0, 2.0, count=30))  # one question alone says nothing
    assert (table.title, table.heading, table.note) == (
        "Users",
        "user",
        "2 of 30 gained; 27 in the middle are not shown",
    )
    assert table.rows[0][1:] == ("3", "+4.000 [+3.000, +5.000]", "-2.5")
    assert table.rows[2] == ("a single prompt", "1", "-0.500", "0")


def scored(answers: list[str], pmi: list[float], context: bool = True) -> MeasuredRows:
    count, none = len(answers), -np.array(pmi)
    zeros, empty = np.zeros(count), np.empty(0)
    return MeasuredRows(
        [f"p{row // 2}" for row in range(count)], answers, [f"{HOSTILE} prompt {row // 2}" for row in range(count)],
        np.full(count, 5), zeros.astype(bool), zeros, np.nan_to_num(none)[:, None], none if context else None,
        zeros, zeros[:, None], None, [], empty, empty, empty, empty,
    )  # fmt: skip


@pytest.mark.parametrize("context", [True, False])
def test_the_answers_that_moved_most_stand_beside_those_of_the_base(context: bool) -> None:
    count = 2 * MOST_MOVED + 8
    before = scored([f"before {row}" for row in range(count)], [1.0] * count, context)
    after = scored([f"after {row}" for row in range(count)], [1.0 + (row - 12) for row in range(count)], context)
    rises, falls = most_moved(before, after)
    assert [one["final_answer"] for one in rises] == [f"after {row}" for row in range(count - 1, count - 11, -1)]
    assert [one["base_answer"] for one in falls] == [f"before {row}" for row in range(10)]
    assert [one["change"] for one in falls[:2]] == [-12.0, -11.0]
    assert most_moved(before, before) == [[], []]


def test_a_row_without_a_context_beside_others_has_no_pmi_to_show() -> None:
    before, after = scored(["a", "b"], [1.0, math.nan]), scored(["c", "d"], [3.0, math.nan])
    assert [one["final_answer"] for one in most_moved(before, after)[0]] == ["c"]
    shown = [{**answer, "base_pmi": None, "final_pmi": None} for answer in make_run().answers]
    section = render_report(make_run(answers=shown)).split('<h2 id="answers">')[1].split("</section>")[0]
    assert "PMI" not in section


def test_texts_of_where_the_gain_sits_stay_text_and_what_is_missing_is_said() -> None:
    moved = most_moved(scored([HOSTILE] * 4, [1.0] * 4), scored([HOSTILE] * 4, [2.0, 3.0, 0.0, 1.0]))
    html = render_report(make_run(gains=gains_of(4.0), most_moved=moved))
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") == 1 + 3 * 3  # a label, and of three answers all texts
    assert "The largest rises: 2 answers" in html
    assert "The largest falls: 1 answer<" in html
    assert "PMI 3.000 nats (+2.000)" in html
    earlier = render_report(make_run(most_moved=moved))
    assert "By user, question and length it was not measured" in earlier
    assert '<h2 id="gains">' not in render_report(make_run())
