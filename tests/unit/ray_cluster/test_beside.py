"""Work in threads beside the main one: contexts of Ray Data of their own, and whose error is raised when.

python -m pytest tests/unit/ray_cluster/test_beside.py
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from ray.data import DataContext

from mipo_ray.ray_cluster.beside import wait_for, work_beside
from mipo_ray.ray_cluster.blocks import ordered_context

LONG_SECONDS = 30.0


def test_threads_beside_make_and_leave_contexts_of_their_own() -> None:
    """Entered and left in turn, as two stages do it: with one context for the process the first would leave its
    settings behind, and the second would work with them."""
    steps = [threading.Event() for _ in range(3)]

    def first() -> tuple[bool, bool]:
        with ordered_context() as context:
            context.target_max_block_size = 7
            steps[0].set()
            assert steps[1].wait(LONG_SECONDS)
            found = DataContext.get_current() is context
        steps[2].set()
        return found, DataContext.get_current().target_max_block_size == 7

    def second() -> tuple[bool, bool]:
        assert steps[0].wait(LONG_SECONDS)
        with ordered_context() as context:
            sees_the_first = context.target_max_block_size == 7
            steps[1].set()
            assert steps[2].wait(LONG_SECONDS)
            return DataContext.get_current() is context, sees_the_first

    of_main = DataContext.get_current()
    before = (of_main.execution_options.preserve_order, of_main.target_max_block_size)
    callbacks = list(of_main.custom_execution_callback_classes)
    with work_beside(first, "first") as one, work_beside(second, "second") as other:
        assert DataContext.get_current() is of_main
    assert one.result() == other.result() == (True, False)
    assert DataContext.get_current() is of_main
    assert (of_main.execution_options.preserve_order, of_main.target_max_block_size) == before
    assert of_main.custom_execution_callback_classes == callbacks


def test_a_thread_beside_begins_with_the_context_of_its_block() -> None:
    with DataContext.current(DataContext.get_current().copy()) as _, ordered_context() as context:
        context.target_max_block_size = 11
        with work_beside(lambda: DataContext.get_current().target_max_block_size, "thread") as found:
            pass
    assert found.result() == 11


def ended(value: Any = None) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def test_a_wait_ends_with_what_is_wanted() -> None:
    wait_for([ended(), ended()], beside=[Future()])
    late: Future[None] = Future()
    threading.Timer(0.05, lambda: late.set_result(None)).start()
    wait_for([ended(), late])


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_wait_ends_with_the_first_error_of_any(is_wanted: bool) -> None:
    never: Future[None] = Future()
    with pytest.raises(KeyError, match="at once"):
        wait_for([never, *([ended(KeyError("at once"))] * is_wanted)], beside=[ended(KeyError("at once"))])
    late: Future[None] = Future()
    threading.Timer(0.05, lambda: late.set_exception(ValueError("later"))).start()
    with pytest.raises(ValueError, match="later"):
        wait_for([never, late] if is_wanted else [never], beside=[late])
