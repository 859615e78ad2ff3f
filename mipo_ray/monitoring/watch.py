"""Hears what the stages of a run tell, and shows it through the view of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import ray

from mipo_ray.monitoring.display import current_view
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.run_state import Agenda, RunState
from mipo_ray.monitoring.views import View
from mipo_ray.stop_signals import thread_beside
from mipo_ray.terminal import say_error

# Between two questions to the writer of events, and how long it may take to answer.
ASK_SECONDS, ANSWER_SECONDS = 1.0, 10.0


@contextlib.contextmanager
def watched(events: Events, agenda: Agenda) -> Iterator[None]:
    """While the block runs, what the stages tell is shown; a view that fails ends alone, and the run goes on."""
    view = current_view()
    if view is None:
        yield
        return
    run = RunState(agenda, time.time())

    def follow(stop: threading.Event) -> None:
        try:
            with view.watching():
                _follow(view, run, events, stop)
        except Exception as error:
            say_error(f"warning: the run is not shown any more: {type(error).__name__}: {error}")

    with thread_beside(follow, "watch-run"):
        yield


def _follow(view: View, run: RunState, events: Events, stop: threading.Event) -> None:
    asked, finished = 0.0, False
    while not finished:
        finished = stop.wait(view.refresh_seconds)
        news = []
        if finished or time.monotonic() - asked >= ASK_SECONDS:
            with contextlib.suppress(ray.exceptions.RayError):  # a head that is away for a moment
                news = ray.get(events.writer.news.remote(), timeout=ANSWER_SECONDS)
            asked = time.monotonic()
        for event in news:
            run.take(event)
        for warning in run.take_warnings():
            say_error(warning)
        view.show(run, news, time.time())
