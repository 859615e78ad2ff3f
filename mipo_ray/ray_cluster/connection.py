"""Joining or starting a Ray cluster, and leaving it: what the commands share."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.ray_cluster.protection import is_on_loopback, on_loopback, protect_local_cluster
from mipo_ray.ray_cluster.resources import Node, ResourceError, local_cpus
from mipo_ray.stop_signals import kept_handlers

# Ray ends a worker that was idle for a second where there are more than this, and by default it is the number of CPUs.
# Actors count, so that each pass over data would start new processes for its tasks and import everything again: half
# of the CPU time of all tasks of a small run.
WORKERS_KEPT = "RAY_num_workers_soft_limit"
_ACTORS = 16  # that a run has at once, its own, Ray Data's and Ray Train's


def ray_address(config: Config) -> str | None:
    """The cluster to join; None: a local one of this machine."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def nodes_for_dry_run(config: Config) -> list[Node]:
    """What a run would find: this machine, without starting anything, or the nodes of the cluster that it joins."""
    if ray_address(config) is None:
        return [Node({"CPU": float(local_cpus(config)), "GPU": _local_gpus()})]
    return connect(config)


def unbounded_node(config: Config) -> tuple[Node, bool]:
    """A node for a first plan from what this machine knows, so that most mistakes are told before Ray starts.

    Returns it and whether it is this machine; of another cluster nothing is known yet, so it holds everything.
    """
    is_local = ray_address(config) is None
    return Node({"CPU": float(local_cpus(config)) if is_local else float("inf"), "GPU": float("inf")}), is_local


def connect(config: Config) -> list[Node]:
    """Joins or starts a Ray cluster; returns its nodes."""
    import ray
    import ray.data

    from mipo_ray.ray_cluster.growth import keep_to_group
    from mipo_ray.ray_cluster.nodes import present_nodes

    address = ray_address(config)
    quiet = ray.LoggingConfig(log_level="WARNING")
    with kept_handlers(), on_loopback(address is None or is_on_loopback(address)):
        if address is None:
            protect_local_cluster()
            os.environ.setdefault(WORKERS_KEPT, str(local_cpus(config) + _ACTORS))
            with address_known_beforehand():
                ray.init(
                    address="local",
                    num_cpus=local_cpus(config),
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    logging_level=logging.WARNING,
                    logging_config=quiet,
                )
        else:
            try:
                ray.init(address=address, logging_level=logging.WARNING, logging_config=quiet)
            except (ConnectionError, ValueError) as error:  # nobody answers; no address
                raise ResourceError(f"ray.address {address!r}: cannot join this cluster: {error}") from None
    # The stages show their own progress; Ray Data's would repeat every operator of every small pass.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A UserError in a task must reach `user_error` as what it is, and not wrapped as a failed transformation.
    context.raise_original_map_exception = True
    keep_to_group(context.execution_options, config, training=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return present_nodes()


@contextlib.contextmanager
def address_known_beforehand() -> Iterator[None]:
    """A local cluster that starts inside tells its processes its own address.

    Otherwise Ray Train's monitors look for any cluster on the machine, and beside a second one they fail: "Found
    multiple active Ray instances". Ray takes the port from the environment, and its processes inherit RAY_ADDRESS.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            raise ResourceError(
                f"127.0.0.1: a cluster of this machine listens there, also where its network has IPv6 alone: {error}"
            ) from None
        port = str(probe.getsockname()[1])
    variables = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def connected_work() -> Iterator[None]:
    """For the work of a command: raises the UserError that a Ray task failed with as what it is, and leaves Ray."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        if (cause := user_error(error)) is not None:
            raise cause from None
        raise
    finally:
        ray.shutdown()


def _local_gpus() -> float:
    """GPUs that a local cluster would find, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # -1 is the usual way to hide every GPU.
        return float(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return float(len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]))


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that a Ray task or actor failed with, if that is what happened."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        # Ray raises a task's UserError as a class of its own, too, whose text is the whole traceback.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return type(error)(str(error.args[0])) if error.args else error
        error = cause
    return None
