"""The live view of a run on a terminal, drawn by rich below what is said."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mipo_ray.monitoring.library_output import Streams
from mipo_ray.monitoring.run_lines import details, duration, status
from mipo_ray.monitoring.run_state import Event, RunState, StageState

LABEL_WIDTH = 17
# As long as a terminal has room for it beside the words.
SHORTEST_BAR, LONGEST_BAR, WORDS_WIDTH = 8, 30, 40


class LiveView:
    """Draws what is under way at the foot of a terminal; what is said stands above it and stays."""

    refresh_seconds = 0.25

    def __init__(self, streams: Streams, console: Console | None = None) -> None:
        self._streams = streams
        self._console = console or Console(file=streams.out, highlight=False)
        self._live: Live | None = None

    @property
    def can_draw(self) -> bool:
        """Whether the stream is a terminal that can be written over."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def say(self, text: str, is_error: bool) -> None:
        """Above what is drawn, as it is: no markup, no lines broken by words."""
        if self._live is None and is_error:
            self._streams.err.write(text)
            self._streams.err.flush()
        else:
            self._console.print(Text(text), end="", soft_wrap=True, style="red" if is_error else None)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The view is there while the block runs and leaves nothing behind."""
        live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        with live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def show(self, run: RunState, news: Sequence[Event], now: float) -> None:
        """Draws the run anew, as wide as the terminal now is."""
        assert self._live is not None
        # rich itself asks the descriptors 0 to 2, which are elsewhere.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            size = os.get_terminal_size(self._streams.out.fileno())
            if size.columns and size.lines:  # some terminals do not say
                self._console.size = size
        self._live.update(drawing(run, now, self._console.width), refresh=True)


def drawing(run: RunState, now: float, width: int) -> Group:
    """The stages of the round, the time that is left, and a bar or a wait for each stage under way.

    width: of the terminal, in characters.
    """
    bar_width = max(SHORTEST_BAR, min(LONGEST_BAR, width - LABEL_WIDTH - WORDS_WIDTH))
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(no_wrap=True, min_width=LABEL_WIDTH)
    table.add_column(no_wrap=True, width=bar_width)
    table.add_column(no_wrap=True, overflow="ellipsis")
    parts = []
    for state in run.under_way.values():
        table.add_row(Text(state.label), _bar(state, now, bar_width), Text(_beside(state, now)))
        if numbers := details(state.phase):
            parts.append(Text(f"         {', '.join(numbers)}", style="cyan", no_wrap=True, overflow="ellipsis"))
    return Group(_head(run, now), table, *parts)


def _head(run: RunState, now: float) -> Text:
    """The round's stages in their order, and what the run took so far and has left."""
    head, rest = Text(no_wrap=True, overflow="ellipsis"), run.seconds_left(now)
    under_way = {key[1] for key in run.under_way if key[0] == run.round_index}
    for number, (name, took, done) in enumerate(run.of_round()):
        head.append(" > " if number else "", style="dim")
        style = "green" if done else "bold" if name in under_way else "dim"
        head.append(name if took is None else f"{name} {duration(took)}", style=style)
    head.append(f"{'   ' if head else ''}run {duration(now - run.began)}")
    head.append("" if rest is None else f", {duration(rest)} left", style="bold")
    return head


def _bar(state: StageState, now: float, width: int) -> ProgressBar | Text:
    phase = state.phase
    if phase is None or phase.waits_for or phase.total is None:
        # A wait is no bar at 0 %: nothing of what the bar would count has begun.
        return Text("|/-\\"[int(4 * now) % 4], style="yellow")
    return ProgressBar(total=phase.total, completed=phase.done, width=width)


def _beside(state: StageState, now: float) -> str:
    left = None if state.phase is None else state.phase.seconds_left(now)
    return status(state, now) + ("" if left is None else f", {duration(left)} left")
