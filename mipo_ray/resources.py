"""What a run asks of a cluster, and whether the cluster has it. Pure: no Ray import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mipo_ray.config import Config
from mipo_ray.errors import UserError

# A vLLM actor that reserves every logical CPU starves the read and write tasks beside it.
MINIMUM_LOCAL_CPUS = 6
TASK_CPUS = 1.0


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
            "CPU": train.num_workers * train.cpus_per_worker + TASK_CPUS,
            "GPU": train.num_workers * resources.gpus_per_worker,
        },
    }


def check_resources(config: Config, resources: Resources, cluster: Mapping[str, float]) -> None:
    """Raises ResourceError when a phase needs more than the whole cluster has, unless the cluster grows on demand."""
    if config.ray.autoscaling:
        return
    keys = {
        "generation": "generation.pool.min_size",
        "training": "train.num_workers",
    }
    for phase, needs in phases(config, resources).items():
        for kind, amount in needs.items():
            if amount > cluster.get(kind, 0.0):
                raise ResourceError(
                    f"{phase} needs {amount:g} {kind}s and the cluster has {cluster.get(kind, 0.0):g}: lower "
                    f"{keys[phase]}, add nodes, or set ray.autoscaling=true where the cluster adds them itself"
                )
