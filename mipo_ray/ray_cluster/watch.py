"""Waiting for nodes in a Ray cluster: the watch over a Ray Data execution's engines, and that over training workers.

Both print what `waiting` says, and end the stage with its error: the first inside Ray Data's own loop, the
second from a thread beside Ray Train's blocking call.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from mipo_ray.ray_cluster.nodes import autoscaling, placed_actors
from mipo_ray.ray_cluster.resources import Request
from mipo_ray.ray_cluster.waiting import Autoscaling, NoAnswerError, Wait, WaitTimeoutError
from mipo_ray.stop_signals import thread_beside
from mipo_ray.terminal import say

LOOK_SECONDS = 5.0
TRAINING_WORKER = "RayTrainWorker"


class PoolWaitTimeoutError(WaitTimeoutError, ExecutionTimeoutError):
    """No actor of a pool got a node in time; Ray Data does not print a traceback of it, as of a fault of its own."""


class WatchActors(ExecutionCallback):
    """Watches the actor pool of a Ray Data execution; `on_execution_step` raises WaitTimeoutError, which ends it.

    waited_for: the class of the actors that need nodes, where those of the pool are clients of them; None: the pool's.
    """

    def __init__(self, request: Request, limit_minutes: float, waited_for: str | None = None) -> None:
        self._wait = Wait(request, limit_minutes)
        self._waited_for = waited_for
        self._next_look = 0.0

    def on_execution_step(self, executor: Any) -> None:
        if time.monotonic() < self._next_look:
            return
        pools = [pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools()]
        names = {self._waited_for or pool.map_worker_cls_name for pool in pools}
        # A pool that has done its work gets smaller and waits for nothing. Of those that it has not yet, some have a
        # node and load their weights.
        waits = any(pool.num_pending_actors() or pool.num_restarting_actors() for pool in pools)
        fewest = self._wait.request.fewest
        try:
            _look(self._wait, lambda: placed_actors(names.__contains__) if waits else fewest)
        except WaitTimeoutError as error:
            raise PoolWaitTimeoutError(str(error)) from None
        self._next_look = time.monotonic() + LOOK_SECONDS  # of its end: without an answer a look takes some seconds


def watch_actors(
    dataset: ray.data.Dataset, request: Request, limit_minutes: float, waited_for: str | None = None
) -> None:
    """Makes the execution of `dataset`, whose actors are `request`, tell of waits and end when one is too long; see
    `WatchActors`."""
    watch: Any = partial(WatchActors, request, limit_minutes, waited_for)  # Ray Data makes one for each execution
    dataset.context.custom_execution_callback_classes.append(watch)


class WorkerWatch:
    """The watch over the workers of one training; `failure` is why it ended it, a WaitTimeoutError as a rule."""

    failure: BaseException | None = None


@contextlib.contextmanager
def watch_workers(
    request: Request,
    limit_minutes: float,
    end: Callable[[], None],
    failed_elsewhere: Callable[[], BaseException | None] = lambda: None,
) -> Iterator[WorkerWatch]:
    """Watches this job's training workers while the block runs; calls `end` when they waited too long, or when what
    they wait for has failed elsewhere."""
    watch, wait = WorkerWatch(), Wait(request, limit_minutes)

    def follow(stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            watch.failure = watch.failure or failed_elsewhere()
            if watch.failure is None:
                try:
                    _look(wait, lambda: placed_actors(TRAINING_WORKER.__eq__))
                except Exception as error:  # whatever it is: a watch that ends alone leaves a wait without end
                    watch.failure = error
            if watch.failure is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    end()  # and again, should the training not have begun yet, or the head not answer

    with thread_beside(follow, "watch-workers"):
        yield watch


def _look(wait: Wait, placed_now: Callable[[], int]) -> None:
    """Takes note of how many actors have a node, and of what the autoscaler does where some have none."""
    # While the head does not answer nothing is known to be placed, so that this time counts.
    placed = 0
    found: Autoscaling | NoAnswerError | None = None
    try:
        placed = placed_now()
        if placed < wait.request.fewest:
            found = autoscaling(wait.request)
    except NoAnswerError as error:
        found = error
    if line := wait.observe(placed, found, time.monotonic()):
        say(line)
