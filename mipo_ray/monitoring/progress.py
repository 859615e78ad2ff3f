"""A progress bar on the driver over one stage, fed by its events."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import ray

from mipo_ray.monitoring.events import Events
from mipo_ray.stop_signals import thread_beside


@contextlib.contextmanager
def progress(events: Events, event: str, count: str, description: str, total: int | None = None) -> Iterator[None]:
    """A progress bar on the driver over one stage, fed by its events of one kind.

    `count` names the field to follow: a counted one (`EventWriter.state`) is summed up; `step` is taken as it is, with
    the event's `total_steps` and, where the objective has them, its loss, reward margin and reward accuracy beside the
    bar.
    """
    from tqdm import tqdm

    interval = 1.0 if sys.stderr.isatty() else 15.0  # seconds between two lines in a log file

    def follow(stop: threading.Event) -> None:
        with tqdm(desc=description, total=total, unit=count.removesuffix("s"), mininterval=interval) as bar:
            finished = False
            while not finished:
                finished = stop.wait(1.0)
                state = ray.get(events.writer.state.remote(events.round.index, events.stage))
                newest = state["latest"].get(event, {})
                if "total_steps" in newest:
                    bar.total = newest["total_steps"]
                    names = [name for name in ("loss", "reward_margin", "reward_accuracy") if name in newest]
                    shown = {name: f"{newest[name]:.4g}" for name in names}
                    bar.set_postfix(shown, refresh=False)
                done = newest.get(count, 0) if "total_steps" in newest else state["sums"].get(count, 0)
                bar.update(done - bar.n)

    with thread_beside(follow, "progress"):
        yield
