"""Whether the policy's engines live as long as the run: where they and all that comes beside them fit at once.

Arithmetic over what the configuration asks for and what the nodes have. No torch, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mipo_ray.config.schema import Config
from mipo_ray.models.shape import model_shape
from mipo_ray.planning.estimates import BYTES, engine_memory, training_memory
from mipo_ray.ray_cluster.resources import (
    TASK_CPUS,
    Node,
    Request,
    ResourceError,
    Resources,
    engine_request,
    requests,
)

# What vLLM takes for its cache on a CPU (generation.vllm_arguments), and a process that has torch and vllm in it.
CACHE_BYTES = 1024**3
PROCESS_BYTES = 1024**3


@dataclass(frozen=True)
class Lifetime:
    """How long the policy's engines live, and why. `most`: how many there may be at once. `keeps_scorers`: whether a
    scorer lives as long as the run, too."""

    is_run: bool
    why: str
    most: int
    keeps_scorers: bool = False

    @property
    def living(self) -> int:
        """How many engines may outlive a stage; 0: none."""
        return self.most if self.is_run else 0

    def __str__(self) -> str:
        return f"{'run' if self.is_run else 'stage'} ({self.why})"


def one_stage(lifetime: Lifetime) -> Lifetime:
    """For a session that samples from one policy in one stage, where there is nothing to outlive."""
    return Lifetime(False, "one stage alone", lifetime.most)


def engine_lifetime(
    config: Config, resources: Resources, nodes: Sequence[Node] | None, *, engines_alone: bool = False
) -> Lifetime:
    """How long the engines live, as `generation.pool.lifetime` says or, where it says auto, as the nodes allow.

    nodes: None where it is not known which there will be. engines_alone: for a command that trains and scores nothing.
    Raises ResourceError where they are to live as long as the run and there is no room for what comes beside them.
    """
    if not config.starts_engines and not engines_alone:
        return Lifetime(False, "no engine", 0)
    chosen, engines = config.generation.pool.lifetime, engine_request(config, resources)
    most = engines.most
    if nodes is not None and not config.ray.autoscaling:
        most = max(engines.fewest, min(most, engines.room(nodes)))
    if chosen == "stage":
        return Lifetime(False, "generation.pool.lifetime", most)
    if nodes is None or config.ray.autoscaling:
        # Nodes that come on demand can go as well; engines that stay would keep theirs.
        return Lifetime(chosen == "run", "generation.pool.lifetime" if chosen == "run" else "nodes on demand", most)
    beside = _beside(config, resources, engines_alone=engines_alone)
    missing = [what for what in (no_room(engines, other, nodes) for other in beside) if what]
    if what := no_memory(config, resources, nodes, workers=0 if engines_alone else config.train.num_workers):
        missing.append(what)
    if not missing:
        keeps = not engines_alone and keeps_scorers(config, resources, nodes)
        return Lifetime(True, "generation.pool.lifetime" if chosen == "run" else "all fits at once", most, keeps)
    if chosen == "run":
        raise ResourceError(f"generation.pool.lifetime=run: {missing[0]}; set it to stage, or add nodes")
    return Lifetime(False, missing[0], most)


def _beside(config: Config, resources: Resources, *, engines_alone: bool) -> list[Request]:
    """What runs while the engines live, one after the other."""
    others = [request for request in requests(config, resources) if request.kind != "engine"]
    if engines_alone:
        return [request for request in others if request.kind == "judge"]
    if config.embeds_prompts:
        others.append(replace(engine_request(config, resources), kind="embedding engine", most=1))
    return others


def no_room(engines: Request, other: Request, nodes: Sequence[Node]) -> str:
    """Why `other` may find no room beside the engines; "" where it does wherever Ray puts them."""
    shared = [node for node in nodes if engines.accepts(node.labels) and other.accepts(node.labels)]
    lost = 0
    if shared:
        # An engine that stands in the way of others, at the worst place.
        shares = [math.ceil(amount / other.each[kind]) for kind, amount in engines.each.items() if other.each[kind]]
        lost = engines.fewest * max(shares, default=0)
    room = other.room(nodes) - lost
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    needed = engines.fewest * engines.cpus + other.fewest * other.cpus + TASK_CPUS
    if room >= other.fewest and cpus >= needed:
        return ""
    return f"no room for {engines.fewest} engines and {other.fewest} {other.kind}s at once"


def keeps_scorers(config: Config, resources: Resources, nodes: Sequence[Node]) -> bool:
    """Whether a scorer may outlive its evaluation, beside engines that do: on CPUs, where it takes memory alone. A GPU
    would stand idle for it while answers are generated and trained on, which costs more than its start."""
    if resources.on_gpu or not config.evaluate.enabled:
        return False
    return not no_memory(config, resources, nodes, workers=config.train.num_workers, scorers=1)


def no_memory(config: Config, resources: Resources, nodes: Sequence[Node], *, workers: int, scorers: int = 0) -> str:
    """Why engines and so many training workers and scorers may not have the memory at once; "" where they do, or nobody
    knows.

    A GPU's memory is its actor's alone; without GPUs all share that of the nodes, from which Ray has taken the object
    store's part.
    """
    shape = model_shape(config.model.source)
    memory = sum(node.resources.get("memory", math.inf) for node in nodes)
    if resources.on_gpu or isinstance(shape, str) or math.isinf(memory):
        return ""
    if config.evaluate.judge.has_own_engines:
        return "a judge's own engines share the memory"
    engines = engine_request(config, resources).fewest
    engine = engine_memory(shape, resources.dtype, 1, config.model.max_model_len).weights + CACHE_BYTES + PROCESS_BYTES
    worker = training_memory(shape, config.train, resources.dtype, config.train.num_workers, on_gpu=False)
    scorer = 2 * shape.parameters * BYTES[resources.dtype] + PROCESS_BYTES  # the initial model and a policy
    needed = engines * engine + workers * (worker.device + worker.host + PROCESS_BYTES) + scorers * scorer
    if needed <= memory:
        return ""
    return f"engines and workers need {needed / 1024**3:.1f} GiB at once, the nodes have {memory / 1024**3:.1f}"
