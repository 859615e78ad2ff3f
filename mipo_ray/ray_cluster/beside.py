"""Work that goes through Ray Data in threads beside the driver's main thread, which Ray Train and signals need."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

Result = TypeVar("Result")

# Between two looks at what is waited for. A wait without end would not be woken by a signal that comes in the moment in
# which it begins.
LOOK_SECONDS = 0.1

# By number: a context, and with it the callback, is also sent to Ray's tasks.
_stopped: set[int] = set()
_numbers = itertools.count()


class StoppedBeside(ExecutionTimeoutError):
    """What an execution raises in its thread when the main thread has no more use for it; Ray Data does not print a
    traceback of it, as of a fault of its own."""


class _EndWhenStopped(ExecutionCallback):
    def __init__(self, number: int) -> None:
        self._number = number

    def on_execution_step(self, executor: Any) -> None:
        if self._number in _stopped:
            raise StoppedBeside("the main thread has no more use for this execution")


@contextmanager
def work_beside(work: Callable[[], Result], name: str) -> Iterator[Future[Result]]:
    """Runs `work` in a thread of this name while the block runs, and waits for it when the block ends.

    A block that fails, or is interrupted, ends the Ray Data execution that the thread is in. After one that ends well
    this raises what the work raised. The work has a Ray Data context of its own, as the block had it when it began.
    """
    number = next(_numbers)
    context = DataContext.get_current().copy()
    end_when_stopped: Any = partial(_EndWhenStopped, number)  # Ray Data makes one for each execution
    context.custom_execution_callback_classes.append(end_when_stopped)

    def in_own_context() -> Result:
        _of_thread.context = context
        return work()

    _tell_threads_apart()
    with ThreadPoolExecutor(1, thread_name_prefix=name) as thread:
        try:  # from its first moment on: a signal may come before the block begins
            done = thread.submit(in_own_context)
            yield done
        except BaseException:
            _stopped.add(number)
            raise
        done.result()


def wait_for(wanted: Sequence[Future[Any]], beside: Sequence[Future[Any]] = ()) -> None:
    """Returns when all that is wanted has ended well. Raises the first error of any, of those beside them too, as soon
    as there is one."""
    futures = {*wanted, *beside}
    while True:
        done = {future for future in futures if future.done()}
        for future in done:
            future.result()
        if done.issuperset(wanted):
            return
        time.sleep(LOOK_SECONDS)


class _OfThread(threading.local):
    """The context of a thread that works beside; None in every other one."""

    context: DataContext | None = None


# Ray Data has one current context for the whole process: of two threads that set theirs and set it back, each would
# make its datasets with the other's, and the last one would leave it behind. Here a thread beside has one to itself. A
# dataset keeps the context that it was made with, so that Ray Data's own threads go by the right one later.
_of_thread = _OfThread()
_of_process = DataContext.get_current, DataContext._set_current


def _current() -> DataContext:
    return _of_process[0]() if _of_thread.context is None else _of_thread.context


def _set_current(context: DataContext | None) -> DataContext | None:
    if _of_thread.context is None or context is None:
        return _of_process[1](context)
    before, _of_thread.context = _of_thread.context, context
    return before


def _tell_threads_apart() -> None:
    patched: Any = DataContext
    patched.get_current, patched._set_current = staticmethod(_current), staticmethod(_set_current)
