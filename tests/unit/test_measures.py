"""The registry of measures: every table of a run finds its columns there, and a title is never said twice.

python -m pytest tests/unit/test_measures.py
"""

import pytest

from mipo_ray.comparison.findings import COMPARED, COMPARED_TASK_METRICS
from mipo_ray.evaluation.intervals import word_against
from mipo_ray.measures import HELD_OUT, JUDGED, TASKS, measure_of


def test_no_two_measures_are_called_the_same():
    titles = [measure.title for measure in (*HELD_OUT.values(), *TASKS.values(), *JUDGED.values())]
    assert len(set(titles)) == len(titles) == 44
    assert not TASKS.keys() & JUDGED.keys()


def test_a_comparison_shows_measures_of_the_registry():
    assert all(measure_of(name) is HELD_OUT[name] for name in COMPARED)
    assert {measure_of(f"task.{name}").better for name in COMPARED_TASK_METRICS} == {"higher"}


def test_a_task_is_part_of_its_measures_title():
    measure = measure_of("judge_pairwise.net_win")
    assert (measure.name, measure.heading) == ("judge_pairwise.net_win", "judge_pairwise net win, share")
    assert measure_of("a.b.accuracy").title == "a.b accuracy"
    with pytest.raises(KeyError, match="nothing"):
        measure_of("task.nothing")


def test_words_are_joined_to_what_was_compared():
    assert word_against("better", "the base") == "better than the base"
    assert word_against("not distinguishable", "sft") == "not distinguishable from sft"
