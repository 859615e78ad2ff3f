"""Work that goes through Ray Data in a thread beside the driver's main thread, which Ray Train and signals need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

Result = TypeVar("Result")

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
    this raises what the work raised.
    """
    number = next(_numbers)
    context = DataContext.get_current().copy()
    end_when_stopped: Any = partial(_EndWhenStopped, number)  # Ray Data makes one for each execution
    context.custom_execution_callback_classes.append(end_when_stopped)
    with DataContext.current(context), ThreadPoolExecutor(1, thread_name_prefix=name) as thread:
        done = thread.submit(work)
        try:
            yield done
        except BaseException:
            _stopped.add(number)
            raise
        done.result()
