"""How a command shows its run: through a view, while what libraries print is kept apart. No Ray, so that a command
that starts nothing answers at once.

`said_as` is for the whole of a command, `shown` for its work on a cluster; `watch.watched` hears the events.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mipo_ray.monitoring.library_output import Streams, apart
from mipo_ray.monitoring.views import Display, JsonLines, Lines, Quiet, View
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.terminal import plain, said_to, say

# The view of this process, as standard output is that of a process; None: what is said is printed.
_view: View | None = None


def current_view() -> View | None:
    """The view that a run is shown through; None: nobody watches."""
    return _view


@contextlib.contextmanager
def said_as(display: Display) -> Iterator[None]:
    """For the whole of a command: with `json` whatever it says is JSON, and so is the error or stop that ends it."""
    if display != "json":
        yield
        return
    with _through(view := JsonLines(Streams(sys.stdout, sys.stderr))):
        try:
            yield
        except BaseException as error:
            view.tell({"event": "error", "time": time.time(), "kind": type(error).__name__, "text": plain(str(error))})
            raise


def tell(event: Mapping[str, Any], text: str) -> None:
    """Says a text or, where the command speaks JSON, the event in its place."""
    if isinstance(_view, JsonLines):
        _view.tell({"time": time.time(), **event})
    else:
        say(text)


@contextlib.contextmanager
def shown(run: RunDirectory, display: Display) -> Iterator[None]:
    """While the block runs, the run is shown as `display` says, and what libraries print goes to its `logs`."""
    with apart(run) as streams, _through(view_of(streams, display)):
        yield


def view_of(streams: Streams, display: Display) -> View:
    """The view that fits: live where standard output is a terminal, else lines."""
    if display == "json":
        return JsonLines(streams)
    if display == "quiet":
        return Quiet(streams)
    if streams.out.isatty():
        from mipo_ray.monitoring.live_view import LiveView

        if (live := LiveView(streams)).can_draw:
            return live
    return Lines(streams)


@contextlib.contextmanager
def _through(view: View) -> Iterator[None]:
    global _view
    before, _view = _view, view
    try:
        with said_to(view.say):
            yield
    finally:
        _view = before
