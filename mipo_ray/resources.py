"""What a run asks of a cluster, and whether the cluster has it. Pure: no Ray import."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.config import Config
from mipo_ray.errors import UserError

# A vLLM actor that reserves every logical CPU starves the read and write tasks beside it.
MINIMUM_LOCAL_CPUS = 6
TASK_CPUS = 1.0

# Backends of train.attention, and what of them does not run on CPUs.
TRAINS_ON_GPUS_ONLY = {
    "flex_attention": "on CPUs it has no backward pass",
    "flash_attention_2": "its kernels do not run on CPUs",
}


class ResourceError(UserError):
    """The cluster cannot hold what the configuration asks for."""


@dataclass(frozen=True)
class Resources:
    """Resolved resources: `dtype` of the policy, and what one actor or worker of each kind reserves."""

    on_gpu: bool
    dtype: str
    gpus_per_engine: float
    gpus_per_worker: float


def local_cpus(config: Config) -> int:
    """Logical CPUs of a local cluster."""
    return config.ray.num_cpus or max(os.cpu_count() or 1, MINIMUM_LOCAL_CPUS)


def resolve(config: Config, cluster: Mapping[str, float]) -> Resources:
    """Fills in what the configuration leaves open (`null`, `auto`) from the cluster's resources."""
    pool, train = config.generation.pool, config.train
    on_gpu = cluster.get("GPU", 0) > 0
    asked = [gpus for gpus in (pool.gpus_per_engine, train.gpus_per_worker) if gpus is not None]
    if asked and not any(asked):
        on_gpu = False
    elif any(asked):
        on_gpu = True
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    return Resources(
        on_gpu=on_gpu,
        dtype=dtype,
        gpus_per_engine=pool.gpus_per_engine
        if pool.gpus_per_engine is not None
        else float(pool.tensor_parallel_size if on_gpu else 0),
        gpus_per_worker=train.gpus_per_worker if train.gpus_per_worker is not None else float(on_gpu),
    )


def total(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The resources of a whole cluster: the sums over its nodes."""
    kinds = {kind for node in nodes for kind in node}
    return {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in kinds}


def phases(config: Config, resources: Resources) -> dict[str, dict[str, float]]:
    """The least that each phase reserves: phase -> {"CPU": ..., "GPU": ...}."""
    pool, train = config.generation.pool, config.train
    return {
        "generation": {
            "CPU": pool.min_size * pool.cpus_per_engine + TASK_CPUS,
            "GPU": pool.min_size * resources.gpus_per_engine,
        },
        # Ray Train's own controller takes no CPU; the pairs are read by a task beside the workers.
        "training": {
            "CPU": train.fewest_workers * train.cpus_per_worker + TASK_CPUS,
            "GPU": train.fewest_workers * resources.gpus_per_worker,
        },
    }


def check_resources(
    config: Config,
    resources: Resources,
    cluster: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Raises ResourceError when a phase needs more than the cluster has, unless the cluster grows on demand.

    `cluster` are the totals; with `nodes` (what each one has) every engine and worker must also fit on one node.
    An attention backend that cannot train on CPUs is refused for training without GPUs in any case.
    """
    _check_attention(config, resources)
    if config.ray.autoscaling:
        return
    keys = {
        "generation": "generation.pool.min_size",
        "training": "train.num_workers" if config.train.min_workers is None else "train.min_workers",
    }
    for phase, needs in phases(config, resources).items():
        for kind, amount in needs.items():
            if amount > cluster.get(kind, 0.0):
                raise ResourceError(
                    f"{phase} needs {amount:g} {kind}s and the cluster has {cluster.get(kind, 0.0):g}: lower "
                    f"{keys[phase]}, add nodes, or set ray.autoscaling=true where the cluster adds them itself"
                )
    if nodes is None:
        return
    pool, train = config.generation.pool, config.train
    engine = {"CPU": pool.cpus_per_engine, "GPU": resources.gpus_per_engine}
    worker = {"CPU": train.cpus_per_worker, "GPU": resources.gpus_per_worker}
    for phase, count, needs in (("generation", pool.min_size, engine), ("training", train.fewest_workers, worker)):
        room = sum(_places(node, needs) for node in nodes)
        if room < count:
            raise ResourceError(
                f"{phase}: the nodes have room for {room} of the {count} that {keys[phase]} asks for, with "
                f"{needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs on one node each"
            )


def _check_attention(config: Config, resources: Resources) -> None:
    attention = config.train.attention
    if attention in TRAINS_ON_GPUS_ONLY and not resources.gpus_per_worker:
        raise ResourceError(
            f"train.attention: {attention} trains on GPUs only ({TRAINS_ON_GPUS_ONLY[attention]}), and training has "
            "none: choose attention sdpa, or give each worker a GPU (train.gpus_per_worker)"
        )


def _places(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many actors with these needs one node can hold."""
    return min(int(node.get(kind, 0.0) / amount) for kind, amount in needs.items() if amount)
