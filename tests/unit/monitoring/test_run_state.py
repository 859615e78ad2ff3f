"""What a run does and how long it will take, from the events of a run.

python -m pytest tests/unit/monitoring/test_run_state.py
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.monitoring.run_lines import duration, line, status, values
from mipo_ray.monitoring.run_state import Agenda, RunState, StageState
from tests.helpers.recorded_events import START, recorded_events, until

STAGES = ((None, "evaluate"), (0, "generate"), (0, "train"), (0, "evaluate"))
AGENDA = Agenda(STAGES)


def state_after(seconds: float, agenda: Agenda = AGENDA) -> RunState:
    run = RunState(agenda, START)
    for event in until(seconds):
        run.take(event)
    return run


def only(run: RunState) -> StageState:
    (state,) = run.under_way.values()
    return state


def said(seconds: float, agenda: Agenda = AGENDA) -> str:
    run = state_after(seconds, agenda)
    return line(only(run), run, START + seconds)


def test_a_wait_says_for_what_and_how_long() -> None:
    assert said(12.5) == "base     answer    waits for engines to start, 12 s"
    assert said(20.0) == "base     answer    waits for the first answers, 5 s"
    assert said(33.0) == "base     score     waits for scorers to start, 2 s"
    assert said(103.0) == "round 0  train     waits for training workers to start, 10 s"
    assert said(108.0) == "round 0  train     waits for the first step, 4 s"
    run = state_after(108.0)
    assert values(only(run), run, START + 108.0) == {
        "event": "progress",
        "time": START + 108.0,
        "round": 0,
        "stage": "train",
        "phase": "train",
        "unit": "steps",
        "done": 0,
        "waits_for": "the first step",
        "waits_seconds": 4.0,
    }


def test_answers_tokens_and_pairs_are_counted_as_they_finish() -> None:
    """72 rows took 24.8 s, so that 24 more take 8 s, of which 2 have gone by. Before a block was finished no speed is
    known: rows are under way at the same time."""
    assert said(84.2) == "round 0  generate  48 of 96 rows (50%), 96 answers, 3,600 tokens, 180 tokens/s"
    assert said(90.0) == (
        "round 0  generate  72 of 96 rows (75%), 144 answers, 5,480 tokens, 221 tokens/s, 16 pairs kept, 48 dropped; "
        "6 s left"
    )


def test_training_says_loss_margin_accuracy_and_memory() -> None:
    """The speed is that of the steps, from the beginning of the first one: 18.5 s for four."""
    assert said(126.6) == (
        "round 0  train     4 of 6 steps (67%), 175 tokens/s, loss 0.6208, margin +0.156, accuracy 1.00, "
        "memory 3.1 GiB; 9 s left, run 71 s left"
    )


def test_nothing_is_guessed() -> None:
    """Before the stages that are left were measured there is no time of the run, nor before an answer of the phase."""
    for seconds in (5.0, 50.0, 84.2):
        assert state_after(seconds).seconds_left(START + seconds) is None
    assert "left" not in said(20.0)


def test_the_time_that_is_left_adds_up_what_stages_took() -> None:
    """Training may go on for 9 s; the evaluation of the base took 61.8 s."""
    run = state_after(126.6)
    assert run.seconds_left(START + 126.6) == pytest.approx(9.25 + 61.8, abs=0.1)
    # By what earlier runs took, from the first second on: 60 s of each of three stages, less the second that is gone.
    measured = Agenda(STAGES, frozenset(), {"generate": 60.0, "train": 60.0, "evaluate": 60.0})
    assert state_after(1.0, measured).seconds_left(START + 1.0) == pytest.approx(239.0)
    # Stages that were finished before take none.
    half = Agenda(STAGES, frozenset(STAGES[:2]), measured.seconds)
    assert RunState(half, START).seconds_left(START) == pytest.approx(120.0)
    assert RunState(Agenda(STAGES, frozenset(STAGES)), START).seconds_left(START) is None


def test_a_stage_that_takes_longer_than_it_did_has_no_time_left_to_tell() -> None:
    """It is answering, and the 10 s that such a stage took have gone by."""
    slower = Agenda(STAGES[:1], frozenset(), {"evaluate": 10.0})
    assert state_after(8.0, slower).seconds_left(START + 8.0) == pytest.approx(2.0)
    assert state_after(20.0, slower).seconds_left(START + 20.0) is None
    assert state_after(50.0, slower).seconds_left(START + 50.0) == pytest.approx(11.0)


def test_stages_took_what_adds_up_to_the_run() -> None:
    run = state_after(1000.0)
    assert not run.under_way
    assert list(run.took) == list(STAGES)
    assert sum(run.took.values()) == pytest.approx(205.3)


def test_two_stages_at_once_are_both_there() -> None:
    run = RunState(AGENDA, START)
    for event in recorded_events():
        if event["round"] == 0 and event["stage"] in ("generate", "train") and event["event"] != "stage":
            run.take(event)
            if event["event"] == "phase_start" and event["stage"] == "train":
                break
    assert [state.key for state in run.under_way.values()] == [(0, "generate"), (0, "train")]
    assert [name for name, _, _ in run.of_round()] == ["generate", "train", "evaluate"]


def evaluated_beside(*ends: tuple[float, int | None, str]) -> RunState:
    """The base is evaluated while round 0 is generated, of stages that took 60 s and 30 s; `ends` are those that ended,
    with the seconds of that."""
    run = RunState(Agenda(STAGES, frozenset(), {"evaluate": 60.0, "generate": 30.0, "train": 45.0}), START)
    begins = [(0.0, None, "evaluate", "stage_start"), (0.0, 0, "generate", "stage_start")]
    for seconds, index, stage, kind in [*begins, *((*end, "stage") for end in ends)]:
        run.take({"time": START + seconds, "round": index, "stage": stage, "event": kind})
    return run


def test_of_an_evaluation_beside_the_next_rounds_generation_that_rounds_stages_are_shown() -> None:
    run = evaluated_beside()
    assert [state.label for state in run.under_way.values()] == ["base     evaluate", "round 0  generate"]
    assert (run.round_index, [name for name, _, _ in run.of_round()]) == (0, ["generate", "train", "evaluate"])
    later = evaluated_beside((40.0, 0, "generate"))
    assert (later.round_index, [name for name, _, _ in later.of_round()]) == (None, ["evaluate"])


def test_the_time_of_stages_at_once_is_that_of_all_of_them() -> None:
    """60 + 30 s of the two, 45 + 60 s of what comes after; what went by counts once."""
    assert evaluated_beside().seconds_left(START + 20.0) == pytest.approx(90 - 20 + 45 + 60)
    # The longer one's time is not over because the shorter one's would be.
    assert evaluated_beside().seconds_left(START + 70.0) == pytest.approx(90 - 70 + 45 + 60)
    assert evaluated_beside().seconds_left(START + 90.0) is None
    # What ended first took 40 s, of the other one 60 s are known: of 10 more seconds 50 are left.
    ended = evaluated_beside((40.0, 0, "generate"))
    assert ended.seconds_left(START + 50.0) == pytest.approx(60 - 10 + 45 + 60)
    both = evaluated_beside((40.0, 0, "generate"), (55.0, None, "evaluate"))
    assert both.took == {(0, "generate"): pytest.approx(40.0), (None, "evaluate"): pytest.approx(15.0)}


def test_between_two_phases_a_stage_is_at_work() -> None:
    run = state_after(61.5)
    assert status(only(run), START + 61.5) == "at work, 0 s"


def test_a_block_that_is_answered_again_counts_once() -> None:
    run = state_after(84.2)
    death: dict[str, Any] = {"round": 0, "stage": "generate", "event": "engine_death", "engine": "9d0b", "error": "oom"}
    run.take({**death, "time": START + 85})
    phase = only(run).phase
    assert phase is not None
    assert phase.done == 0
    assert run.take_warnings() == ["warning: engine 9d0b died and is started anew: oom"]
    assert run.take_warnings() == []


def test_a_prompt_that_is_set_aside_is_told_at_once() -> None:
    run = state_after(84.2)
    aside: dict[str, Any] = {"round": 0, "stage": "generate", "event": "quarantined", "time": START + 85}
    run.take({**aside, "quarantined_prompts": 1, "prompt_id": "p-7", "step": "sample", "reason": "oom"})
    assert run.take_warnings() == ["warning: engines died of prompt 'p-7' alone, and it is set aside: oom"]


def test_events_of_nobody_who_is_watched_change_nothing() -> None:
    """A view that begins late, and events that a later version adds."""
    run = RunState(AGENDA, START)
    for event in recorded_events():
        if event["event"] not in ("stage_start", "phase_start"):
            run.take(event)
    run.take({"time": START, "round": 7, "stage": "else", "event": "something_new"})
    assert not run.under_way
    assert list(run.took) == list(STAGES)


@given(st.integers(0, len(recorded_events())), st.floats(0, 1000))
def test_times_are_never_negative_and_shares_never_above_one(count: int, later: float) -> None:
    run = RunState(Agenda(STAGES, frozenset(), {"train": 1.0}), START)
    events = recorded_events()[:count]
    for event in events:
        run.take(event)
    now = (events[-1]["time"] if events else START) + later
    left = run.seconds_left(now)
    assert left is None or left >= 0
    for state in run.under_way.values():
        assert state.phase is None or state.phase.total is None or state.phase.done <= state.phase.total
        assert line(state, run, now)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99.4, "99 s"), (100, "1 min 40 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
