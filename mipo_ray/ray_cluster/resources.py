"""What a run asks of a cluster, and whether the cluster has it. Pure: no Ray import."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mipo_ray.config.label_selectors import matches, shown
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError


def most_gpus(request: Request) -> float:
    """How many GPUs a stage reserves at most; scoring actors take the places of engines."""
    return request.most * request.gpus


# A vLLM actor that reserves every logical CPU starves the read and write tasks beside it.
MINIMUM_LOCAL_CPUS = 6
TASK_CPUS = 1.0

# Backends of train.attention, and what of them does not run on CPUs.
TRAINS_ON_GPUS_ONLY = {
    "flex_attention": "on CPUs it has no backward pass",
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


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what it has in total, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The actors of one kind that a phase asks for: `fewest` to `most`, each on one node that matches the selector.

    key: the field that says how many at least. strategy: how they are spread over nodes, as Ray's placement groups.
    """

    phase: str
    kind: str
    key: str
    fewest: int
    most: int
    cpus: float
    gpus: float
    selector: Mapping[str, str]
    strategy: str = "PACK"

    @property
    def each(self) -> dict[str, float]:
        """What one of them reserves."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    def room(self, nodes: Sequence[Node]) -> int:
        """How many of them these nodes hold when nothing else runs there."""
        return self._spread([_places(node.resources, self.each) for node in nodes if self.accepts(node.labels)])

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels may run them."""
        return matches(labels, self.selector)

    def _spread(self, places: Sequence[int]) -> int:
        if self.strategy == "STRICT_PACK":
            return max(places, default=0)
        return sum(min(count, 1) for count in places) if self.strategy == "STRICT_SPREAD" else sum(places)


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


def total(nodes: Sequence[Node]) -> dict[str, float]:
    """The resources of a whole cluster: the sums over its nodes."""
    kinds = {kind for node in nodes for kind in node.resources}
    return {kind: sum(node.resources.get(kind, 0.0) for node in nodes) for kind in kinds}


def requests(config: Config, resources: Resources) -> list[Request]:
    """What the phases ask for, in order: engines, where the run samples or measures, training workers, with evaluation
    scoring actors, and the judge's own engines.

    The evaluation's engines are the generation's; its scoring actors take the place of an engine each.
    """
    asked = [engine_request(config, resources)] if config.starts_engines else []
    asked.append(worker_request(config, resources))
    if config.evaluate.enabled:
        asked.append(scorer_request(config, resources))
    if config.evaluate.judge.has_own_engines:
        asked.append(judge_request(config, resources))
    return asked


def engine_request(config: Config, resources: Resources) -> Request:
    """The engines of generation, and of the evaluation."""
    pool = config.generation.pool
    place = (pool.cpus_per_engine, resources.gpus_per_engine, pool.label_selector)
    return Request("generation", "engine", "generation.pool.min_size", pool.min_size, pool.max_size, *place)


def scorer_request(config: Config, resources: Resources) -> Request:
    """The scoring actors of the evaluation, in the places of engines."""
    pool = config.generation.pool
    place = (pool.cpus_per_engine, resources.gpus_per_engine, pool.label_selector)
    return Request("evaluation", "scorer", "evaluate.scorers", 1, config.evaluate.scorers, *place)


def worker_request(config: Config, resources: Resources) -> Request:
    """The training workers."""
    train = config.train
    key = "train.num_workers" if train.min_workers is None else "train.min_workers"
    place = (train.cpus_per_worker, resources.gpus_per_worker, train.label_selector, train.placement_strategy)
    return Request("training", "worker", key, train.fewest_workers, train.num_workers, *place)


def judge_resources(config: Config, resources: Resources) -> Resources:
    """`resources` with the dtype and the GPUs of the judge's own engines."""
    judge = config.evaluate.judge
    dtype = ("bfloat16" if resources.on_gpu else "float32") if judge.dtype == "auto" else judge.dtype
    gpus = resources.gpus_per_engine
    if judge.tensor_parallel_size is not None:
        gpus = float(judge.tensor_parallel_size if resources.on_gpu else 0)
    return replace(resources, dtype=dtype, gpus_per_engine=gpus)


def judge_request(config: Config, resources: Resources) -> Request:
    """The judge's own engines, as many as those of generation and in their places."""
    pool = config.generation.pool
    place = (pool.cpus_per_engine, judge_resources(config, resources).gpus_per_engine, pool.label_selector)
    return Request("judging", "judge", "generation.pool.min_size", pool.min_size, pool.max_size, *place)


def phases(config: Config, resources: Resources) -> dict[str, dict[str, float]]:
    """The least that each phase reserves: phase -> {"CPU": ..., "GPU": ...}."""
    return _least(requests(config, resources))


def _least(asked: Sequence[Request]) -> dict[str, dict[str, float]]:
    # Beside the actors a task reads or writes; Ray Train's own controller takes no CPU.
    return {
        request.phase: {"CPU": request.fewest * request.cpus + TASK_CPUS, "GPU": request.fewest * request.gpus}
        for request in asked
        if request.kind != "scorer"  # never more than the engines before them
    }


def check_resources(
    config: Config,
    resources: Resources,
    cluster: Mapping[str, float],
    nodes: Sequence[Node] | None = None,
    *,
    engines_alone: bool = False,
) -> None:
    """Raises ResourceError when a phase needs more than the cluster has, unless it grows on demand (ray.autoscaling).

    `cluster` are the totals; with `nodes` every engine and worker must also fit on one node that its selector names. An
    attention backend that cannot train on CPUs is refused without GPUs in any case.

    engines_alone: for a command that trains nothing and scores nothing: engines, the judge's own among them.
    """
    if engines_alone:
        asked = [engine_request(config, resources)]
        asked += [judge_request(config, resources)] if config.evaluate.judge.has_own_engines else []
    else:
        asked = requests(config, resources)
        _check_attention(config, resources)
    if config.ray.autoscaling:
        return
    keys = {request.phase: request.key for request in asked}
    for phase, needs in _least(asked).items():
        for kind, amount in needs.items():
            if amount > cluster.get(kind, 0.0):
                raise ResourceError(
                    f"{phase} needs {amount:g} {kind}s and the cluster has {cluster.get(kind, 0.0):g}: lower "
                    f"{keys[phase]}, add nodes, or set ray.autoscaling=true where the cluster adds them itself"
                )
    for request in asked:
        if nodes is not None:
            check_places(request, nodes)


def check_places(request: Request, nodes: Sequence[Node]) -> None:
    """Raises ResourceError where these nodes have no room for the fewest actors of a request."""
    if (room := request.room(nodes)) < request.fewest:
        raise ResourceError(_too_small(request, room, nodes))


def _too_small(request: Request, room: int, nodes: Sequence[Node]) -> str:
    which = "the nodes have"
    if request.selector:
        matching = sum(request.accepts(node.labels) for node in nodes)
        which = f"the {matching} of {len(nodes)} nodes that match the labels {shown(request.selector)} have"
    strategy = "" if request.strategy in ("PACK", "SPREAD") else f" and strategy {request.strategy}"
    return (
        f"{request.phase}: {which} room for {room} of the {request.fewest} that {request.key} asks for, with "
        f"{request.cpus:g} CPUs and {request.gpus:g} GPUs on one node each{strategy}"
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
    return int(min(node.get(kind, 0.0) / amount for kind, amount in needs.items() if amount))
