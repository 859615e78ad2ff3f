"""How a run is shown: on a terminal, in a log, to machines, and quietly; and that libraries do not come between.

python -m pytest tests/unit/monitoring/test_views.py
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from rich.console import Console

from mipo_ray.errors import UserError
from mipo_ray.monitoring import watch
from mipo_ray.monitoring.display import current_view, said_as, shown, tell, view_of
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.library_output import Streams
from mipo_ray.monitoring.live_view import LiveView, drawing
from mipo_ray.monitoring.run_state import Agenda, RunState
from mipo_ray.monitoring.views import JsonLines, Lines, Quiet, View
from mipo_ray.storage.run_directory import RunDirectory, open_run
from mipo_ray.terminal import say, say_error
from tests.helpers.recorded_events import START, recorded_events, until

AGENDA = Agenda(((None, "evaluate"), (0, "generate"), (0, "train"), (0, "evaluate")))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def streams(out: io.StringIO | None = None) -> Streams:
    return Streams(out or io.StringIO(), io.StringIO())


def text_of(stream: Any) -> str:
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def replay(view: View, seconds: int, step: float = 1.0) -> None:
    """Shows the recorded run second by second."""
    run, events = RunState(AGENDA, START), iter(recorded_events())
    ahead = next(events, None)
    with view.watching():
        for tick in range(int(seconds / step) + 1):
            now = START + tick * step
            news = []
            while ahead is not None and ahead["time"] <= now:
                news.append(ahead)
                run.take(ahead)
                ahead = next(events, None)
            view.show(run, news, now)


@pytest.fixture
def run_directory(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "run"))


# In a log.


def test_a_log_has_a_line_every_15_seconds_of_each_phase() -> None:
    view = Lines(to := streams())
    replay(view, 206)
    lines = text_of(to.out).splitlines()
    assert [line for line in lines if line.startswith("base")] == [
        "base     answer    waits for the first answers, 1 s",
        "base     score     28 of 70 responses (40%); 15 s left",
        "base     score     70 of 70 responses (100%); 0 s left",
    ]
    assert [line for line in lines if "train" in line] == [
        "round 0  train     waits for the first step, 4 s",
        "round 0  train     3 of 6 steps (50%), 149 tokens/s, loss 0.6961, margin -0.004, accuracy 0.25, "
        "memory 3.1 GiB; 14 s left, run 76 s left",
    ]
    assert len(lines) <= 206 / 15
    assert "\x1b" not in text_of(to.out)


def test_a_phase_of_less_than_15_seconds_has_no_line() -> None:
    view = Lines(to := streams())
    replay(view, 14)
    assert text_of(to.out) == ""


# To machines.


def test_machines_get_one_object_on_each_line() -> None:
    view = JsonLines(to := streams())
    view.say("run directory   runs/demo\n", is_error=False)
    replay(view, 206)
    view.say("warning: an engine\n", is_error=True)
    found = [json.loads(line) for line in text_of(to.out).splitlines()]
    assert all({"event", "time"} <= one.keys() for one in found)
    kinds = [one["event"] for one in found]
    assert kinds.count("stage_start") == kinds.count("stage") == 4
    assert kinds.count("train_step") == 6
    assert {"phase_start", "answered", "scored", "ready"} & set(kinds) == set()
    (step,) = [one for one in found if one["event"] == "progress" and one.get("loss")]
    assert (step["total"], step["unit"], step["loss"], step["memory_bytes"]) == (6, "steps", 0.6961, 3_328_599_655)
    assert step["run_seconds_left"] > step["seconds_left"] > 0
    assert [one["text"] for one in found if one["event"] == "message"] == [
        "run directory   runs/demo",
        "warning: an engine",
    ]
    assert text_of(to.err) == "warning: an engine\n"


def test_quiet_is_errors_alone() -> None:
    view = Quiet(to := streams())
    view.say("round 0  generate  started\n", is_error=False)
    view.say("warning: an engine\n", is_error=True)
    assert (text_of(to.out), text_of(to.err)) == ("", "warning: an engine\n")


def test_an_error_is_an_object_too_and_the_end_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with said_as("json"):
        say("said")
        tell({"event": "end", "findings": []}, "the end as text")
    with pytest.raises(UserError), said_as("json"):
        raise UserError("prompts.path: expected a file")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["event"] for one in found] == ["message", "end", "error"]
    assert found[2]["text"] == "prompts.path: expected a file"
    with pytest.raises(KeyboardInterrupt), said_as("json"):
        raise KeyboardInterrupt
    assert json.loads(capsys.readouterr().out)["kind"] == "KeyboardInterrupt"
    with said_as("auto"):
        tell({"event": "end"}, "the end as text")
    assert capsys.readouterr().out == "the end as text\n"


# On a terminal.


def drawn(seconds: float, width: int = 120) -> str:
    run = RunState(AGENDA, START)
    for event in until(seconds):
        run.take(event)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with console.capture() as capture:
        console.print(drawing(run, START + seconds, width))
    return capture.get()


def test_a_terminal_shows_the_rounds_stages_a_bar_and_the_numbers() -> None:
    text = drawn(126.6)
    head, bar, numbers = [line.rstrip() for line in text.splitlines()]
    assert head == "generate 31 s > train > evaluate   run 2 min 07 s, 71 s left"
    assert bar.startswith("round 0  train    ━━━━")
    assert bar.endswith(" 4 of 6 steps (67%), 9 s left")
    assert numbers.strip() == "175 tokens/s, loss 0.6208, margin +0.156, accuracy 1.00, memory 3.1 GiB"


def test_a_policy_that_is_evaluated_beside_the_next_round_has_a_line_of_its_own() -> None:
    """The evaluation of the round that is shown has not begun: it stands as dim as training."""
    run = RunState(AGENDA, START)
    for index, stage in ((None, "evaluate"), (0, "generate")):
        run.take({"time": START, "round": index, "stage": stage, "event": "stage_start"})
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    with console.capture() as capture:
        console.print(drawing(run, START + 4.0, 100))
    head, *lines = capture.get().splitlines()
    assert "\x1b[1mgenerate\x1b[0m" in head
    assert "\x1b[2mtrain\x1b[0m" in head
    assert "\x1b[2mevaluate\x1b[0m" in head
    assert [line[:17] for line in lines] == ["base     evaluate", "round 0  generate"]


@pytest.mark.parametrize("seconds", [5.0, 20.0, 33.0, 100.0, 108.0])
def test_a_wait_is_no_bar(seconds: float) -> None:
    text = drawn(seconds)
    assert "waits for" in text
    assert "━" not in text


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_cuts_and_breaks_no_line(width: int) -> None:
    for seconds in (5.0, 84.2, 126.6):
        lines = drawn(seconds, width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= 3


def test_what_is_said_stands_above_the_view_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    view = LiveView(to := streams(terminal), Console(file=terminal, force_terminal=True, width=100, highlight=False))
    assert view.can_draw
    run = RunState(AGENDA, START)
    for event in until(84.2):
        run.take(event)
    with view.watching():
        view.show(run, [], START + 84.2)
        view.say("round 0  [generate]  http://a/b 12\n", is_error=False)
        view.show(run, [], START + 85.2)
    assert "round 0  [generate]  http://a/b 12\n" in terminal.getvalue()  # no markup, no colours of its own
    assert "48 of 96 rows (50%)" in terminal.getvalue()
    view.say("error: afterwards\n", is_error=True)
    assert text_of(to.err) == "error: afterwards\n"


def test_colours_are_left_out_where_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunState(AGENDA, START)
    for event in until(126.6):
        run.take(event)
    found = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
        with console.capture() as capture:
            console.print(drawing(run, START + 126.6, 100))
        found[value] = capture.get()
    assert "\x1b[32m" in found[""]
    assert "\x1b[3" not in found["1"]


def test_the_view_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(view_of(streams(), "auto")) is Lines
    assert type(view_of(streams(Terminal()), "auto")) is LiveView
    assert type(view_of(streams(Terminal()), "quiet")) is Quiet
    assert type(view_of(streams(Terminal()), "json")) is JsonLines
    monkeypatch.setenv("TERM", "dumb")
    assert type(view_of(streams(Terminal()), "auto")) is Lines


# Around a run.


class FakeWriter:
    """The writer of events, which `ray.get` reads; `fails` makes it answer with an error."""

    def __init__(self, news: list[dict[str, Any]], fails: Exception | None = None) -> None:
        self._news = news
        self._fails = fails
        self.asked = threading.Event()
        self.news = SimpleNamespace(remote=self._take)

    def _take(self) -> list[dict[str, Any]]:
        self.asked.set()
        if self._fails is not None:
            raise self._fails
        news, self._news = self._news, []
        return news


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(watch, "ASK_SECONDS", 0.0)
    yield
    assert current_view() is None


def test_a_run_is_watched_from_its_events(run_directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning of an actor is said, which would otherwise be among the lines of libraries."""
    news = [{"time": START, "round": None, "stage": "run", "event": "warning", "text": "tracker wandb failed"}]
    with shown(run_directory, "auto"):
        say("round 0  generate  started")
        print("noise of a library")
        with watched_once(FakeWriter(news)):
            pass
    captured = capsys.readouterr()
    assert captured.out == "round 0  generate  started\n"
    assert captured.err == "tracker wandb failed\n"


def watched_once(writer: FakeWriter) -> Any:
    return watch.watched(Events(writer), Agenda())


@pytest.mark.parametrize("error", [ray.exceptions.RayError("the head is away"), RuntimeError("a fault")])
def test_a_view_that_fails_ends_no_run(
    run_directory: RunDirectory, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    writer = FakeWriter([], error)
    with shown(run_directory, "auto"), watched_once(writer):
        assert writer.asked.wait(10)
        done.append(True)
    assert done == [True]
    said = capsys.readouterr().err
    assert ("not shown any more: RuntimeError: a fault" in said) == isinstance(error, RuntimeError)


def test_without_a_command_nobody_is_asked() -> None:
    writer = FakeWriter([])
    with watched_once(writer):
        pass
    assert not writer.asked.is_set()


def test_errors_are_seen_in_every_display(run_directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    for display in ("auto", "quiet", "json"):
        with shown(run_directory, display):
            say_error("error: seen")
        assert capsys.readouterr().err == "error: seen\n"
