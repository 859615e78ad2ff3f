"""The pool of vLLM actors as one step of a Ray Data pipeline, and the actor: it samples the responses of several blocks
at the same time, with an engine of its own or as the client of one that outlives the stage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from mipo_ray.config.generation import EnginePoolConfig
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.engine import Engine, Sampling, engine_death
from mipo_ray.generation.vllm_arguments import EngineSettings, end_with_engine, engine_settings, is_dead_engine
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.monitoring.progress import Tally
from mipo_ray.pairs.schema import SCORES
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors, map_clients
from mipo_ray.ray_cluster.living import Lease, LivingActors
from mipo_ray.ray_cluster.resources import Request, Resources, engine_request
from mipo_ray.ray_cluster.watch import watch_actors
from mipo_ray.session import Session
from mipo_ray.storage.manifests import TrainFacts
from mipo_ray.storage.rounds import Round

# Ray restarts an actor without end: a block that kills every engine must not look like a hang.
MOST_ENGINE_DEATHS = 5

# From a sampled block to the responses that are to be scored, row by row (see `assemble.to_score`).
ToScore = Callable[[pa.Table], list[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Engines:
    """A pool of engines of one model: how each is started, what it reserves, how many there are and how long the first
    may wait for a node. `living`: those of the run, which take the model's weights; None: they live for one stage.
    `are_shared`: another stage works with them at the same time, and counts the time in which they have no work."""

    settings: EngineSettings
    request: Request
    pool: EnginePoolConfig
    wait_minutes: float
    living: LivingActors | None = None
    are_shared: bool = False


def policy_engines(config: Config, policy: str, resources: Resources) -> Engines:
    """The engines that sample from a policy (any model path), in the run's own window, for one stage."""
    return Engines(
        settings=engine_settings(config, policy, resources),
        request=engine_request(config, resources),
        pool=config.generation.pool,
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def round_engines(session: Session, round: Round) -> Engines:
    """The engines that sample from the policy that stands after a round: the run's living ones, where it has them."""
    engines = policy_engines(session.config, session.policy(round), session.resources)
    probes = None
    if not round.is_base and (trained := session.stage(round, "train").read_manifest(TrainFacts)) is not None:
        probes = trained.facts.summary.probe_logprobs
    settings = replace(engines.settings, probe_logprobs=None if probes is None else tuple(probes))
    return replace(engines, settings=settings, living=session.living_engines, are_shared=session.shares_engines)


def sample_responses(
    rows: ray.data.Dataset,
    engines: Engines,
    sampling: Sampling,
    events: Events,
    to_score: ToScore | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through a pool of vLLM actors; a block stays a block.

    With `to_score` also `scores`: log-probs of the responses that it gives for each block.
    """
    if engines.living is None:
        use = EngineUse(engines.settings, engines.request.gpus)
        return map_actors(
            rows,
            Sampler,
            (use, sampling, events, to_score),
            request=engines.request,
            pool=engine_pool(engines.pool, engines.request),
            wait_minutes=engines.wait_minutes,
        )
    living = engines.living
    watch_actors(rows, living.request, engines.wait_minutes, living.class_name)
    use = EngineUse(engines.settings, 0.0 if engines.are_shared else living.request.gpus, living.lease())
    pool = engine_pool(engines.pool, living.request)
    return map_clients(rows, Sampler, (use, sampling, events, to_score), pool=pool)


@dataclass(frozen=True)
class EngineUse:
    """What a sampling actor needs to have its engine: what the engine is to be, how many GPUs the actor counts as
    reserved for it, and from whom it takes one; None: it starts its own."""

    settings: EngineSettings
    gpus: float
    lease: Lease | None = None


class Sampler:
    """A Ray Data actor: adds `responses` to blocks that hold `requests` (see engine.REQUESTS, pairs.RESPONSES).

    With `to_score` it also adds `scores` (pairs.SCORES): the log-probs of given responses under given prompts.
    """

    def __init__(self, use: EngineUse, sampling: Sampling, events: Events, to_score: ToScore | None = None):
        self._idle = IdleClock(use.gpus)
        if (deaths := events.total("engine_deaths")) >= MOST_ENGINE_DEATHS:
            raise RuntimeError(
                f"vLLM engines died {deaths:.0f} times in this stage; metrics.jsonl holds each error (engine_death), "
                "logs/ beside it what vLLM said last"
            )
        self._sampling = sampling
        self._window = use.settings.max_model_len
        self._events = events
        self._to_score = to_score
        self._blocks_in_flight = 0
        self._refusal: UserError | None = None
        try:
            self._engine = OwnEngine(use.settings, events) if use.lease is None else LeasedEngine(use, events)
        except UserError as error:  # raised by the first block: of an error here Ray keeps the text alone
            self._refusal = error

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Samples every request of the block; yields the block once, with its `responses`.

        Raises the UserError for which the engine could not be started.
        """
        if self._refusal is not None:
            raise self._refusal
        started = time.monotonic()
        self._blocks_in_flight += 1
        self._idle.work_begins()
        try:
            responses = await self._engine.respond(block["requests"], self._sampling)
            block = block.drop_columns(["requests"]).append_column("responses", responses)
            if self._to_score is not None:
                # In a thread: other blocks' requests must not wait while this one's filters run.
                wanted = await asyncio.to_thread(self._to_score, block)
                scores = await self._engine.score(wanted, self._window)
                block = block.append_column("scores", pa.array(scores, type=SCORES))
        except Exception as error:
            if self._engine.is_gone(error):
                end_with_engine()  # an exception would fail the whole stage
            raise
        finally:
            self._idle.work_ends()
            self._blocks_in_flight -= 1
        self._events.emit(
            {
                "event": "generated",
                "rows": block.num_rows,
                "generated_tokens": _sampled_tokens(responses),
                "block_seconds": time.monotonic() - started,
                "blocks_in_flight": self._blocks_in_flight,
                **self._idle.take(),
                "engine": self._engine.name,
            }
        )
        yield block

    def __del__(self) -> None:
        # Ray Data makes a pool smaller while the rest of it goes on: another actor may need the engine.
        if (engine := getattr(self, "_engine", None)) is not None:
            with contextlib.suppress(Exception):  # Ray may be gone by then, and nobody is left to be told
                engine.give_back()


def _sampled_tokens(responses: pa.Array) -> int:
    """Tokens that the engine gave, with those that were cut off."""
    each = responses.flatten()
    return len(each.field("token_ids").flatten()) + (pc.sum(each.field("trimmed_tokens")).as_py() or 0)


class OwnEngine:
    """An engine in the actor itself, which ends with it; `name`: the beginning of the actor's id, by which the Ray
    dashboard finds it."""

    def __init__(self, settings: EngineSettings, events: Events):
        started = time.monotonic()
        self.name = str(ray.get_runtime_context().get_actor_id())[:8]
        self._events = events
        self._tally = Tally(events)
        self._engine = Engine(settings)
        seconds = time.monotonic() - started
        start = {"event": "engine_start", "engine_starts": 1, "engine_start_seconds": seconds}
        events.emit({**start, "engine": self.name})
        events.tell({"event": "ready", "engine": self.name})

    async def respond(self, requests: pa.ChunkedArray, sampling: Sampling) -> pa.Array:
        """See `Engine.respond`."""
        return await self._engine.respond(requests, sampling, self._tally)

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        """See `Engine.score`."""
        return await self._engine.score(rows, window)

    def is_gone(self, error: Exception) -> bool:
        """Whether the error says that the engine's process is gone; the event of its death is written by then."""
        if is_dead_engine(error):
            self._events.emit_and_wait(engine_death(self.name, error))
        return is_dead_engine(error)

    def give_back(self) -> None:
        """Ends the engine."""
        self._engine.shutdown()


class LeasedEngine:
    """An engine that outlives the stage, in an actor of its own (`LivingEngine`); `name` is of that actor."""

    def __init__(self, use: EngineUse, events: Events):
        assert use.lease is not None
        self._events = events
        self._lease = use.lease
        self._actor = use.lease.take()
        self.name = self._actor._actor_id.hex()[:8]
        ray.get(self._actor.hold.remote(use.settings, events))

    async def respond(self, requests: pa.ChunkedArray, sampling: Sampling) -> pa.Array:
        """See `Engine.respond`."""
        responses: pa.Array = await self._actor.respond.remote(requests, sampling, self._events)
        return responses

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        """See `Engine.score`."""
        scores: list[list[dict[str, Any]]] = await self._actor.score.remote(rows, window, self._events)
        return scores

    def is_gone(self, error: Exception) -> bool:
        """Whether the error says that the engine's actor is gone, which said so itself."""
        return isinstance(error, ray.exceptions.RayActorError)

    def give_back(self) -> None:
        """Lets another client have the engine."""
        self._lease.give_back()
