"""On a cluster that adds nodes: which of them Ray Data's executions may start, or keep.

Ray Data's tasks, which read, cut and write rows, ask for a CPU of any node. And where an execution uses most of what it
may, Ray Data asks for one more node of every kind that the cluster knows, and for those that are there: reading for
training would start a node of engines, and sampling a node of training.
"""

from __future__ import annotations

from ray.data import ExecutionOptions, ExecutionResources

from mipo_ray.config.label_selectors import off_group
from mipo_ray.config.schema import Config
from mipo_ray.ray_cluster.resources import Request


def keep_to_group(options: ExecutionOptions, config: Config, *, training: bool) -> None:
    """Keeps executions with these options off the nodes of the other phase, where labels tell the two apart, and from
    asking for GPUs that no actor of theirs uses (`allow_gpus`). Without ray.autoscaling nothing is changed.

    training: whether training workers read the rows; else engines do, or scorers, on the nodes of engines.
    """
    if not config.ray.autoscaling:
        return
    engines, workers = config.generation.pool.label_selector, config.train.label_selector
    own, other = (workers, engines) if training else (engines, workers)
    options.label_selector = off_group(own, other) or None
    options.resource_limits = ExecutionResources.for_limits(gpu=0.0)


def allow_gpus(options: ExecutionOptions, request: Request) -> None:
    """Lets an execution ask for the GPUs of these actors beside what it might ask for before."""
    limits = options.resource_limits
    options.resource_limits = limits.copy(gpu=limits.gpu + request.most * request.gpus)
