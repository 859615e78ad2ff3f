"""Ray Data as this project uses it: blocks of rows in a fixed order, worked on as whole Arrow tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from mipo_ray.config.generation import EnginePoolConfig
from mipo_ray.ray_cluster.growth import allow_gpus
from mipo_ray.ray_cluster.resources import Request
from mipo_ray.ray_cluster.tables import WrittenIds
from mipo_ray.ray_cluster.watch import watch_actors


def map_blocks(dataset: ray.data.Dataset, function: Callable[..., pa.Table], **arguments: Any) -> ray.data.Dataset:
    """Applies `function(block, **arguments)` to every block; one block in, one block out."""
    callable_: Any = function  # Ray's own annotation does not know functions over Arrow tables alone
    return dataset.map_batches(callable_, batch_format="pyarrow", batch_size=None, fn_kwargs=arguments)


def map_actors(
    dataset: ray.data.Dataset,
    actor_class: type,
    arguments: tuple[Any, ...],
    *,
    request: Request,
    pool: ActorPoolStrategy,
    wait_minutes: float,
) -> ray.data.Dataset:
    """Sends every block through an actor of a pool, made with `arguments`, on the nodes that `request` names; lazy.

    The execution raises WaitTimeoutError when no actor gets a node within `wait_minutes`.
    """
    watch_actors(dataset, request, wait_minutes)
    allow_gpus(dataset.context.execution_options, request)
    # As map_batches, which refuses a block as the batch of an actor with GPUs: one block may be too much for a model.
    # Here the actor itself feeds its engine, or cuts what it scores.
    return dataset.map_batches_internal(
        actor_class,
        fn_constructor_args=arguments,
        batch_format="pyarrow",
        batch_size=None,
        compute=pool,
        num_cpus=request.cpus,
        num_gpus=request.gpus or None,
        label_selector=dict(request.selector) or None,
    )


def map_clients(
    dataset: ray.data.Dataset, actor_class: type, arguments: tuple[Any, ...], *, pool: ActorPoolStrategy
) -> ray.data.Dataset:
    """Sends every block through an actor of a pool that reserves nothing, as the work is done in other actors; lazy."""
    return dataset.map_batches(
        actor_class, fn_constructor_args=arguments, batch_format="pyarrow", batch_size=None, compute=pool, num_cpus=0
    )


def named(dataset: ray.data.Dataset, name: str) -> ray.data.Dataset:
    """The dataset under a name: what the Ray dashboard's Data page and Ray Data's own metrics call it."""
    dataset.set_name(name)
    return dataset


@contextmanager
def ordered_context() -> Iterator[DataContext]:
    """A Ray Data context of its own in which rows keep their order, whatever the parallelism."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    with DataContext.current(context):
        yield context


@contextmanager
def resumed_context(notes: str, filesystem: pyarrow.fs.FileSystem, id_column: str) -> Iterator[DataContext]:
    """`ordered_context` of an execution that is to be gone on with: what it has written is noted in the directory
    `notes`, by `id_column`, and rows that are noted there are left out."""
    with ordered_context() as context:
        context.checkpoint_config = CheckpointConfig(
            id_column=id_column,
            checkpoint_path=notes,
            delete_checkpoint_on_success=False,
            override_filesystem=filesystem,
            checkpoint_manager_cls=WrittenIds,
        )
        yield context


def engine_pool(pool: EnginePoolConfig, request: Request) -> ActorPoolStrategy:
    """An autoscaling pool of as many actors as `request` says, each of which works on several blocks at the same
    time."""
    return ActorPoolStrategy(
        min_size=request.fewest,
        max_size=request.most,
        max_tasks_in_flight_per_actor=2 * pool.batches_in_flight,
        max_concurrent_calls_per_actor=pool.batches_in_flight,
    )
