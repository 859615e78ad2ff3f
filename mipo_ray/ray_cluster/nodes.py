"""The connected Ray cluster: its nodes, and what its autoscaler is doing.

Ray keeps the autoscaler's side of this behind internal interfaces; they are used here and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray

from mipo_ray.ray_cluster.resources import Node, Request
from mipo_ray.ray_cluster.waiting import Autoscaling, NoAnswerError

_SECONDS_TO_ANSWER = 10


def present_nodes() -> list[Node]:
    """The nodes that are there now."""
    return [Node(dict(node["Resources"]), dict(node["Labels"])) for node in ray.nodes() if node["Alive"]]


def autoscaling(request: Request) -> Autoscaling | None:
    """What the autoscaler does, and whether it calls this request infeasible; None where none reports (or is there).

    Raises NoAnswerError when the cluster's head does not answer.
    """
    from ray.core.generated import autoscaler_pb2

    status = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    try:
        status.ParseFromString(_head().get_cluster_status(timeout_s=_SECONDS_TO_ANSWER))
    except ray.exceptions.RayError as error:
        raise NoAnswerError(str(error)) from error
    return read_status(status, request)


def read_status(status: Any, request: Request) -> Autoscaling | None:
    """What a `GetClusterStatusReply` of Ray's autoscaler v2 says; see `autoscaling`."""
    state = status.autoscaling_state
    if not status.HasField("autoscaling_state") or not state.autoscaler_state_version:
        return None
    starting: Counter[str] = Counter()
    for pending in state.pending_instance_requests:
        starting[pending.ray_node_type_name] += pending.count
    for instance in state.pending_instances:
        starting[instance.ray_node_type_name] += 1
    failed = sorted(state.failed_instance_requests, key=lambda one: one.failed_ts)
    gangs = [one for gang in state.infeasible_gang_resource_requests for one in _bundles(gang)]
    infeasible = [*state.infeasible_resource_requests, *gangs]
    return Autoscaling(
        starting=dict(starting),
        failed=tuple(f"{one.ray_node_type_name}: {one.reason}" for one in failed),
        infeasible=any(_is_same(one, request) for one in infeasible),
    )


def placed_actors(is_wanted: Callable[[str], bool]) -> int:
    """How many of this job's actors, chosen by their class name, have a node, whether they are ready or still start.

    Raises NoAnswerError when the cluster's head does not answer.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())

    async def table() -> dict[Any, Any]:
        # Held until the answer is there. Two threads that ask for the first time at once make a client each, of which
        # one is kept, and a call whose client is gone never ends, whatever its timeout.
        head = _head()
        found: dict[Any, Any] = await head.async_get_all_actor_info(job_id=job, timeout=_SECONDS_TO_ANSWER)
        return found

    try:
        actors = asyncio.run(table()).values()
    except ray.exceptions.RayError as error:
        raise NoAnswerError(str(error)) from error
    return sum(_has_node(actor) for actor in actors if is_wanted(actor.class_name))


def _head() -> Any:
    """A client of the cluster's head (its control service, the GCS) whose calls take a timeout.

    `ray._private.state` asks without one, and waits for as long as the head is away.
    """
    return _client(ray.get_runtime_context().gcs_address)


@functools.lru_cache(maxsize=1)
def _client(address: str) -> Any:
    # Kept: the making of one waits half a minute for a head that is away, whatever timeout its calls have.
    raylet: Any = ray._raylet
    return raylet.GcsClient(address=address)


def _has_node(actor: Any) -> bool:
    # The node's id is there from the beginning, of the node that looks for a place; the worker's own address comes with
    # the place. A restarting actor still names the one that it lost.
    return actor.state in (actor.PENDING_CREATION, actor.ALIVE) and bool(actor.address.ip_address)


def _bundles(gang: Any) -> list[Any]:
    """The requests of a placement group, in the newer or the older form."""
    return [*gang.requests, *(one for selector in gang.bundle_selectors for one in selector.resource_requests)]


def _is_same(found: Any, request: Request) -> bool:
    """Whether an autoscaler's request is one of these: the same CPUs, GPUs and label keys.

    Ray Data adds memory, and placement groups resources of their own.
    """
    bundle = dict(found.resources_bundle)
    keys = {constraint.label_key for selector in found.label_selectors for constraint in selector.label_constraints}
    return (
        bundle.get("CPU", 0.0) == request.cpus
        and bundle.get("GPU", 0.0) == request.gpus
        and keys == set(request.selector)
    )
